"""Matryoshka: a nest of autoencoders that share latents (Bussmann et al. 2025, arXiv 2503.17547).

    a   as BatchTopK, the selection over all d_sae latents
    x^_j = a_1..m_j W_dec_1..m_j + b_dec                      for widths m_1 < … < m_J = d_sae
    loss = mean over j of |x - x^_j|^2 / d_in + alpha AuxK        (mean over the batch)

The first latents must do without the later ones, so they keep to general features instead of leaving the common
cases to specialists (absorption). The paper sums over j; the mean keeps the terms in the proportion of the other
architectures. AuxK works on the residual of the full reconstruction. Read and saved like a BatchTopK: as a JumpReLU
with one threshold.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from .batchtopk import BatchTopK
from .coder import CoderConfig
from .topk import TopKConfig

__all__ = ["Matryoshka", "MatryoshkaConfig"]

_GROUPS = (1 / 32, 1 / 16, 1 / 8, 1 / 4)  # shares of d_sae; the last group is the rest, 17/32


class MatryoshkaConfig(TopKConfig):
    """Settings of `matryoshka`."""

    widths: tuple[int, ...] | None = Field(
        None, description="latents of each nested autoencoder, rising, the last d_sae (1/32, 3/32, 7/32, 15/32, 1)"
    )

    @field_validator("widths", mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        return value.replace(",", " ").split() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _widths_rise_to_d_sae(self) -> MatryoshkaConfig:
        widths = self.widths
        if widths and (list(widths) != sorted(set(widths)) or widths[0] < 1 or widths[-1] != self.d_sae):
            raise ValueError(f"widths {widths} do not rise from 1 or more to d_sae = {self.d_sae}")
        return self


class Matryoshka(BatchTopK):
    """Nested reconstructions of one BatchTopK code."""

    name: ClassVar[str] = "matryoshka"
    Config: ClassVar[type[CoderConfig]] = MatryoshkaConfig
    config: MatryoshkaConfig

    @property
    def widths(self) -> tuple[int, ...]:
        """Prefixes of the latents that must each reconstruct alone; the last is d_sae."""
        if self.config.widths:
            return self.config.widths
        d_sae, ends, end = self.config.d_sae, [], 0.0
        for share in _GROUPS:
            end += share
            ends.append(int(end * d_sae))
        return (*sorted({e for e in ends if 0 < e < d_sae}), d_sae)

    def errors(self, x: Tensor, target: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of the prefixes' reconstruction losses, and the residual of the full reconstruction."""
        residual, total, start = target - self.b_dec, [], 0
        for width in self.widths:
            residual = residual - latents[:, start:width] @ self.W_dec[start:width]
            total.append(residual.square().mean())
            start = width
        return torch.stack(total).mean(), residual

    def _details(self) -> dict[str, object]:
        return {**super()._details(), "matryoshka_widths": list(self.widths), "use_matryoshka_aux_loss": False}
