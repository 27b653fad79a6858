"""Skip-transcoder: a transcoder whose linear part goes past the latents (Paulo et al. 2025, arXiv 2501.18823).

    a   as `transcoder`
    y^ = a W_dec + b_dec + x W_skip^T                     W_skip [d_out, d_in], 0 at the start
    loss = |y - y^|^2 / d_out + alpha AuxK

What a linear map can do needs no latents, so they are left with what is not linear. The reconstruction depends on x
directly: `reconstruct` has the skip in it, `decode` of latents alone has not. On disk: SAELens
`jumprelu_skip_transcoder`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .coder import Inference
from .transcoder import Transcoder, TranscoderConfig

__all__ = ["SkipTranscoder"]


class SkipTranscoder(Transcoder):
    """A transcoder with a linear path beside it."""

    name: ClassVar[str] = "skip-transcoder"
    layout: ClassVar[str] = "jumprelu_skip_transcoder"
    W_skip: Tensor

    def __init__(self, config: TranscoderConfig) -> None:
        super().__init__(config)
        self.W_skip = torch.nn.Parameter(torch.zeros(self.d_out, config.d_in))

    def errors(self, x: Tensor, target: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The reconstruction loss with the skip in it, and the residual."""
        return super().errors(x, target - x @ self.W_skip.T, latents)

    def reconstruct(self, x: Tensor) -> Tensor:
        """decode(encode(x)) + x W_skip^T, [n, d_out]."""
        return super().reconstruct(x) + x @ self.W_skip.T

    def fold(self, scale: float, target_scale: float = 1.0) -> None:  # type: ignore[override]
        """As the transcoder; the skip takes the input's scale and loses the target's."""
        super().fold(scale, target_scale)
        with torch.no_grad():
            self.W_skip *= scale / target_scale

    def inference_state(self) -> Inference:
        """SAELens `jumprelu_skip_transcoder`."""
        found = super().inference_state()
        return Inference(found.architecture, {**found.tensors, **self.tensors("W_skip")}, found.extra, found.details)
