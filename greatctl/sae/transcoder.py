"""Transcoder: reads the input of a part of the model and writes that part's output (Dunefsky et al. 2024, arXiv
2406.11944).

    p = x W_enc + b_enc                                   (b_dec belongs to the output and is not subtracted)
    a   as BatchTopK: the n k largest p of a batch of n tokens; one threshold theta when reading
    y^ = a W_dec + b_dec,  rows of W_dec of norm 1
    loss = |y - y^|^2 / d_out + alpha AuxK                (mean over the batch)

The paper has a ReLU and an L1 penalty; the sparsity here is BatchTopK's, which sets L0 directly. x and y are two
hook points of the same tokens, each scaled to its own norm in training. b_dec starts at the mean of y, and b_enc at
-mean(x) W_enc, which is what subtracting the mean of x does. On disk: SAELens `jumprelu_transcoder`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from .batchtopk import BatchTopK
from .coder import CoderConfig, Inference
from .topk import TopKConfig
from .whole import Whole

__all__ = ["Transcoder", "TranscoderConfig"]


class TranscoderConfig(TopKConfig):
    """Settings of `transcoder` and `skip-transcoder`."""

    d_out: int | None = Field(None, ge=1, description="width of the activations that are written (d_in)")


class Transcoder(BatchTopK):
    """From one site to another through BatchTopK latents."""

    name: ClassVar[str] = "transcoder"
    Config: ClassVar[type[CoderConfig]] = TranscoderConfig
    reads_target: ClassVar[bool] = True
    layout: ClassVar[str] = "jumprelu_transcoder"
    config: TranscoderConfig

    def __init__(self, config: TranscoderConfig) -> None:
        super().__init__(config)
        columns = torch.randn(config.d_in, config.d_sae)
        with torch.no_grad():  # input and output are different spaces: nothing to tie
            self.W_enc = torch.nn.Parameter(columns / columns.norm(dim=0))

    def start(self, mean: Tensor, target_mean: Tensor | None = None) -> None:
        """b_dec at the mean of the target, b_enc where the mean of the input gives 0."""
        super().start(mean if target_mean is None else target_mean)
        with torch.no_grad():
            self.b_enc.copy_(-(mean.to(self.W_enc) @ self.W_enc))

    def pre_acts(self, x: Tensor) -> Tensor:
        """x W_enc + b_enc, [n, d_sae]."""
        return x @ self.W_enc + self.b_enc

    def losses(  # type: ignore[override]
        self, x: Tensor, *, dead: Tensor, step: int, target: Tensor, shared: Whole | None = None
    ) -> Mapping[str, Tensor]:
        """`mse` to the target [n, d_out] and, where it is on, `auxk`."""
        return self.terms(x, target, dead, shared)

    def fold(self, scale: float, target_scale: float = 1.0) -> None:  # type: ignore[override]
        """Raw inputs and outputs with unit decoder rows kept: every activation shrinks by `target_scale`."""
        with torch.no_grad():
            self.W_enc *= scale / target_scale
            self.b_enc /= target_scale
            self.b_dec /= target_scale
            self.threshold /= target_scale

    def inference_state(self) -> Inference:
        """SAELens `jumprelu_transcoder`, the threshold repeated for each latent."""
        found = super().inference_state()
        extra = {"d_out": self.d_out, "apply_b_dec_to_input": False}
        return Inference(self.layout, found.tensors, extra, found.details)
