"""The standard sparse autoencoder: a ReLU and an L1 penalty.

    a = relu((x - b_dec) W_enc + b_enc)
    x^ = a W_dec + b_dec
    loss = |x - x^|^2 / d_in + lambda sum_i a_i n_i / sqrt(d_in)          (mean over the batch)

n_i is the norm of decoder row i, which is then free (Anthropic, "Circuits Updates", April 2024), or 1 with
unit rows (Bricken et al. 2023, "Towards Monosemanticity"). lambda grows linearly from 0 over the first steps,
since a full penalty at the start kills latents before they have found anything. Inputs have norm sqrt(d_in)
on average, so both terms are relative to the input and one lambda serves every width (the papers' unscaled
form has lambda sqrt(d_in) instead). With `k`, lambda is steered so that L0 comes out as k (see `steering`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from .coder import Coder, CoderConfig, Inference, k_fits
from .steering import Steering, even_steps

__all__ = ["Relu", "ReluConfig"]

_UNIT, _FREE = 1.0, 0.1  # row norms at the start


class ReluConfig(CoderConfig):
    """Settings of `relu`."""

    k: int | None = Field(None, ge=1, description="wanted L0: the L1 weight is steered to it; none: it stays")
    l1_coefficient: float = Field(0.1, ge=0, description="weight of the L1 penalty, relative to the input's norm")
    l1_warmup_steps: int = Field(
        0, ge=0, description="steps over which the L1 weight grows to its value; to `train`, 0 is 5 % of the run"
    )
    decoder_norm_weighted: bool = Field(
        True, description="weight each latent by its decoder norm and leave the norms free; else unit norms"
    )

    _k_fits = model_validator(mode="after")(k_fits)


class Relu(Coder):
    """ReLU with an L1 penalty."""

    name: ClassVar[str] = "relu"
    Config: ClassVar[type[CoderConfig]] = ReluConfig
    config: ReluConfig

    def __init__(self, config: ReluConfig) -> None:
        self.unit_decoder = not config.decoder_norm_weighted
        self.decoder_init_norm = _UNIT if self.unit_decoder else _FREE
        super().__init__(config)
        self.steering = Steering(config.k, config.l1_warmup_steps)

    def encode(self, x: Tensor) -> Tensor:
        """relu of the pre-activations, [n, d_sae]."""
        return self.pre_acts(x).relu()

    def losses(self, x: Tensor, *, dead: Tensor, step: int) -> Mapping[str, Tensor]:
        """`mse` and `l1`."""
        latents = self.encode(x)
        self.steering.note(latents, first=self._fired is None)
        self.note_fired(latents)
        mse = (x - self.decode(latents)).square().mean()
        norms = self.W_dec.norm(dim=1) if self.config.decoder_norm_weighted else None
        penalty = latents if norms is None else latents * norms
        l1 = self.l1_weight(step) * penalty.sum(dim=1).mean() / self.config.d_in**0.5
        return {"mse": mse, "l1": l1}

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
        """Unit rows, where they are; and the L1 weight moves towards the wanted L0."""
        super().after_step()
        self.steering.step()

    def fold(self, scale: float) -> None:
        """Raw inputs, and unit decoder rows: each latent's activation takes up its row's norm."""
        super().fold(scale)
        with torch.no_grad():
            norms = self.W_dec.norm(dim=1)
            self.W_dec /= torch.where(norms > 0, norms, 1.0)[:, None]
            self.W_enc *= norms
            self.b_enc *= norms

    def inference_state(self) -> Inference:
        """SAELens `standard`."""
        details = {
            "decoder_init_norm": self.decoder_init_norm,
            "l1_coefficient": self.config.l1_coefficient,
            "lp_norm": 1.0,
            "l1_warm_up_steps": self.config.l1_warmup_steps,
        }
        return Inference("standard", self.tensors("W_enc", "b_enc", "W_dec", "b_dec"), details=details)
