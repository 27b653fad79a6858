"""ISTA: latents that look at what they leave unexplained (Gregor & LeCun 2010, "Learning Fast Approximations
of Sparse Coding").

The built-in encoders decide in one matrix product; two latents with similar directions cannot tell each other
that one of them is enough. Here the first guess is corrected a few times by a step of iterative shrinkage on
the decoder:

    a <- relu((x - b_dec) W_enc + b_enc)                                  the guess of a ReLU autoencoder
    a <- relu(a + eta (x - a W_dec - b_dec) W_dec^T - eta lambda)         `iterations` times
    loss = |x - x^|^2 / d_in + l1 sum(a) / d_in

eta = 1 / (1 + sqrt(d_sae / d_in))^2, the inverse of the largest eigenvalue of W_dec W_dec^T for random unit
rows, below which each step lowers the error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from greatctl.sae.coder import Coder, CoderConfig


class IstaConfig(CoderConfig):
    """Settings of `ista`: each field with its default, its bounds and what it means."""

    iterations: int = Field(2, ge=0, le=16, description="shrinkage steps after the encoder's guess")
    shrinkage: float = Field(0.1, ge=0, description="lambda: what each step takes from every latent")
    l1_coefficient: float = Field(1.0, ge=0, description="weight of the L1 penalty (inputs: norm sqrt(d_in))")


class Ista(Coder):
    """A ReLU encoder followed by shrinkage steps; the base class brings parameters and unit decoder rows."""

    name: ClassVar[str] = "ista"
    Config: ClassVar[type[CoderConfig]] = IstaConfig
    config: IstaConfig
    eta: Tensor
    toll: Tensor

    def __init__(self, config: IstaConfig) -> None:
        super().__init__(config)
        # A buffer, since `fold` changes it and it has to be saved: state lives in tensors alone.
        self.register_buffer("eta", torch.tensor((1 + (config.d_sae / config.d_in) ** 0.5) ** -2))
        self.register_buffer("toll", self.eta * config.shrinkage)

    def encode(self, x: Tensor) -> Tensor:
        """Latents [n, d_sae] of x [n, d_in]."""
        latents = self.pre_acts(x).relu()
        for _ in range(self.config.iterations):
            latents = (latents + self.eta * (x - self.decode(latents)) @ self.W_dec.T - self.toll).relu()
        return latents

    def losses(self, x: Tensor, *, dead: Tensor, step: int) -> Mapping[str, Tensor]:
        """`mse` and `l1`. Dead latents get no help: the shrinkage steps reach every latent through W_dec."""
        latents = self.encode(x)
        self.note_fired(latents)
        l1 = self.config.l1_coefficient * latents.sum(dim=1).mean() / self.config.d_in
        return {"mse": (x - self.decode(latents)).square().mean(), "l1": l1}

    def fold(self, scale: float) -> None:
        """From `scale * x` to raw x: residual and decoder shrink by `scale`, so eta grows by its square."""
        super().fold(scale)
        self.eta *= scale**2
