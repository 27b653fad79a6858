"""TopK: each token keeps its k largest pre-activations (Gao et al. 2024, arXiv 2406.04093).

    p = (x - b_dec) W_enc + b_enc
    a = relu(p_i) for the k largest p_i of the token, else 0
    x^ = a W_dec + b_dec,  rows of W_dec of norm 1
    loss = |x - x^|^2 / d_in + alpha AuxK                        (mean over the batch)

k sets L0 directly; no penalty pulls activations towards zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from .auxk import auxk
from .coder import Coder, CoderConfig, Inference, k_fits
from .whole import Whole, spread_of

__all__ = ["TopK", "TopKConfig"]


class TopKConfig(CoderConfig):
    """Settings of `topk`."""

    k: int = Field(32, ge=1, description="active latents a token; at most d_sae")
    aux_coefficient: float = Field(1 / 32, ge=0, description="weight alpha of the AuxK loss for dead latents; 0 = off")

    _k_fits = model_validator(mode="after")(k_fits)


class TopK(Coder):
    """The k largest pre-activations of each token."""

    name: ClassVar[str] = "topk"
    Config: ClassVar[type[CoderConfig]] = TopKConfig
    separable: ClassVar[bool] = False  # AuxK is divided by a variance of the batch
    config: TopKConfig

    def select(self, pre_acts: Tensor, whole: Whole | None = None) -> Tensor:
        """Latents [n, d_sae] from pre-activations [n, d_sae]; `whole` where they are a part of a batch."""
        values, places = pre_acts.topk(self.config.k, dim=1, sorted=False)
        return torch.zeros_like(pre_acts).scatter_(1, places, values.relu())

    def encode(self, x: Tensor) -> Tensor:
        """Latents [n, d_sae], at most k of them positive in a row."""
        return self.select(self.pre_acts(x))

    def losses(self, x: Tensor, *, dead: Tensor, step: int, shared: Whole | None = None) -> Mapping[str, Tensor]:
        """`mse` and, where it is on, `auxk`."""
        return self.terms(x, x, dead, shared)

    def terms(self, x: Tensor, target: Tensor, dead: Tensor, whole: Whole | None) -> dict[str, Tensor]:
        """The losses of writing `target` [n, d_out] from `x` [n, d_in]."""
        pre_acts = self.pre_acts(x)
        latents = self.select(pre_acts, whole)
        self.note_fired(latents)
        mse, residual = self.errors(x, target, latents)
        terms = {"mse": mse}
        if self.config.aux_coefficient > 0:
            extra = auxk(pre_acts, residual, self.W_dec, dead, None if whole is None else whole.spread)
            if extra is None:
                self.counts["auxk_not_finite"] += 1
                extra = pre_acts.new_zeros(())
            terms["auxk"] = self.config.aux_coefficient * extra
        return terms

    def errors(self, x: Tensor, target: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The reconstruction loss, a scalar, and the residual [n, d_out]."""
        residual = target - self.decode(latents)
        return residual.square().mean(), residual

    def prepare(self, parts: Sequence[Tensor], *, dead: Tensor, targets: Sequence[Tensor] | None = None) -> Whole:
        """The spread of the residual, for AuxK."""
        return self._with_spread(Whole(), parts, targets or parts)

    def _with_spread(self, whole: Whole, parts: Sequence[Tensor], targets: Sequence[Tensor]) -> Whole:
        pairs = zip(parts, targets, strict=True)
        residuals = (self.errors(x, y, self.select(self.pre_acts(x), whole))[1] for x, y in pairs)
        return Whole(whole.lowest, spread_of(residuals))

    def fold(self, scale: float) -> None:
        """Raw inputs with the decoder's unit rows kept: every activation shrinks by the one factor `scale`.

        One factor for all leaves the ranking, and so the k winners, as they are.
        """
        with torch.no_grad():
            self.b_enc /= scale
            self.b_dec /= scale

    def inference_state(self) -> Inference:
        """SAELens `topk`."""
        return Inference(
            "topk",
            self.tensors("W_enc", "b_enc", "W_dec", "b_dec"),
            extra={"k": self.config.k, "rescale_acts_by_decoder_norm": False},
            details=self._details(),
        )

    def _details(self) -> dict[str, object]:
        return {
            "decoder_init_norm": self.decoder_init_norm,
            "use_sparse_activations": False,
            "aux_loss_coefficient": self.config.aux_coefficient,
        }
