"""Gated: one path decides which latents are active, another how much (Rajamanoharan et al. 2024, arXiv 2404.16014).

    h  = (x - b_dec) W_enc
    g  = h + b_gate                                     the gate's pre-activation
    a  = 1[g > 0] * relu(h e^{r_mag} + b_mag)
    x^ = a W_dec + b_dec,  rows of W_dec of norm 1
    loss = |x - x^|^2 / d_in + lambda sum_i relu(g)_i / sqrt(d_in) + |x - sg(decode)(relu(g))|^2 / d_in

The penalty falls on the gate alone, so magnitudes are not pulled towards zero. The step function has no gradient: the
gate learns from the penalty and from the third term, a reconstruction by the gate itself through a decoder that is
held still (sg). lambda grows from 0 as in `relu`, and is steered to L0 = k where `k` is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from .coder import Coder, CoderConfig, Inference, k_fits
from .steering import Steering, even_steps

__all__ = ["Gated", "GatedConfig"]


class GatedConfig(CoderConfig):
    """Settings of `gated`."""

    k: int | None = Field(None, ge=1, description="wanted L0: the L1 weight is steered to it; none: it stays")
    l1_coefficient: float = Field(
        0.2, ge=0, description="weight of the gate's L1 penalty, relative to the input's norm"
    )
    l1_warmup_steps: int = Field(
        0, ge=0, description="steps over which the L1 weight grows to its value; to `train`, 0 is 5 % of the run"
    )

    _k_fits = model_validator(mode="after")(k_fits)


class Gated(Coder):
    """A gate and a magnitude that share the encoder's directions."""

    name: ClassVar[str] = "gated"
    Config: ClassVar[type[CoderConfig]] = GatedConfig
    config: GatedConfig

    def __init__(self, config: GatedConfig) -> None:
        super().__init__(config)
        del self.b_enc  # the two paths have a bias each
        self.b_gate = nn.Parameter(torch.zeros(config.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(config.d_sae))
        self.r_mag = nn.Parameter(torch.zeros(config.d_sae))
        self.steering = Steering(config.k, config.l1_warmup_steps)

    def pre_acts(self, x: Tensor) -> Tensor:
        """The gate's pre-activations g, [n, d_sae]: positive where a latent is active."""
        return self._directions(x) + self.b_gate

    def encode(self, x: Tensor) -> Tensor:
        """Magnitudes where the gate is open, [n, d_sae]."""
        return self._open(self._directions(x))

    def losses(self, x: Tensor, *, dead: Tensor, step: int) -> Mapping[str, Tensor]:
        """`mse`, `l1` and `gate` (the gate's own reconstruction)."""
        h = self._directions(x)
        latents = self._open(h)
        self.steering.note(latents, first=self._fired is None)
        self.note_fired(latents)
        gate = (h + self.b_gate).relu()
        alone = gate @ self.W_dec.detach() + self.b_dec.detach()
        weight = self.l1_weight(step)
        return {
            "mse": (x - self.decode(latents)).square().mean(),
            "l1": weight * gate.sum(dim=1).mean() / self.config.d_in**0.5,
            "gate": (x - alone).square().mean(),
        }

    def l1_weight(self, step: int) -> Tensor:
        """lambda at a step (counted from 0), a scalar."""
        warm = self.config.l1_warmup_steps
        grown = self.config.l1_coefficient * (min(1.0, (step + 1) / warm) if warm else 1.0)
        return (grown * self.steering.factor).to(self.W_dec.dtype)

    def project_gradients(self) -> None:
        """As everywhere; and every step weighs alike in Adam's memory (see `even_steps`)."""
        super().project_gradients()
        even_steps(self, self.config.d_in)

    def after_step(self) -> None:
        """Unit rows; the L1 weight moves towards the wanted L0."""
        super().after_step()
        self.steering.step()

    def fold(self, scale: float) -> None:
        """Raw inputs with unit rows kept: h keeps its scale's direction, every bias and activation shrinks by `scale`."""
        with torch.no_grad():
            self.b_gate /= scale
            self.b_mag /= scale
            self.b_dec /= scale

    def inference_state(self) -> Inference:
        """SAELens `gated`."""
        details = {
            "decoder_init_norm": self.decoder_init_norm,
            "l1_coefficient": self.config.l1_coefficient,
            "l1_warm_up_steps": self.config.l1_warmup_steps,
        }
        return Inference("gated", self.tensors("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"), details=details)

    def _directions(self, x: Tensor) -> Tensor:
        return (x - self.b_dec) @ self.W_enc

    def _open(self, h: Tensor) -> Tensor:
        return (h + self.b_gate > 0) * (h * self.r_mag.exp() + self.b_mag).relu()
