"""JumpReLU: each latent has a threshold of its own, learnt through a straight-through estimator (Rajamanoharan et al.
2024, arXiv 2407.14435).

    p  = (x - b_dec) W_enc + b_enc
    a  = p * 1[p > theta],  theta = e^t                           t = log theta, so that theta stays positive
    x^ = a W_dec + b_dec,  rows of W_dec of norm 1
    loss = |x - x^|^2 / d_in + penalty                            (mean over the batch)
    penalty = mu (L0 / k - 1)^2                                   where `k` is given, L0 the mean of the batch
            = lambda L0 / d_in                                    else

Neither the step in a nor the step in L0 = sum_i 1[p_i > theta_i] has a gradient in theta. The mean over many tokens
has one, estimated with a box kernel K of width eps (K(u) = 1 for |u| < 1/2):

    da/dtheta  = -(theta / eps) K((p - theta) / eps)              dL0/dtheta = -(1 / eps) K((p - theta) / eps)

The gradient in p is that of a ReLU where p > theta; L0 has none in p. The paper's eps is 0.001 for inputs of norm 1
and billions of tokens; a wide kernel gives steadier gradients, which short runs need. With `k`, all thresholds start
where the first batch has L0 = k. They are float32 on disk too, in whatever precision the rest is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from .batchtopk import kth_largest, lowest_kept
from .coder import Coder, CoderConfig, Inference, k_fits
from .whole import Whole

__all__ = ["JumpRelu", "JumpReluConfig"]


class JumpReluConfig(CoderConfig):
    """Settings of `jumprelu`."""

    k: int | None = Field(None, ge=1, description="wanted L0; none: it follows from l0_coefficient")
    target_coefficient: float = Field(3.0, ge=0, description="mu, the weight of (L0 / k - 1)^2, where k is given")
    l0_coefficient: float = Field(0.1, ge=0, description="lambda, the weight of L0 / d_in, where k is not given")
    l0_warmup_steps: int = Field(
        0, ge=0, description="steps over which the penalty's weight grows to its value; to `train`, 0 is 5 % of the run"
    )
    bandwidth: float = Field(1.0, gt=0, description="eps, the kernel's width (inputs: norm sqrt(d_in))")
    initial_threshold: float = Field(0.5, gt=0, description="thresholds at the start, where k is not given")

    _k_fits = model_validator(mode="after")(k_fits)


class JumpRelu(Coder):
    """A ReLU that jumps at a learnt threshold."""

    name: ClassVar[str] = "jumprelu"
    Config: ClassVar[type[CoderConfig]] = JumpReluConfig
    separable: ClassVar[bool] = False  # the penalty is a square of the batch's mean
    config: JumpReluConfig
    begun: Tensor

    def __init__(self, config: JumpReluConfig) -> None:
        super().__init__(config)
        self.log_threshold = nn.Parameter(torch.full((config.d_sae,), config.initial_threshold).log())
        self.register_buffer("begun", torch.tensor(config.k is None))
        self._known = False  # that `begun` is set; asking a GPU at each step would make the CPU wait for it

    @property
    def threshold(self) -> Tensor:
        """theta, [d_sae] > 0."""
        return self.log_threshold.exp()

    def encode(self, x: Tensor) -> Tensor:
        """Pre-activations above their threshold, [n, d_sae]."""
        pre_acts = self.pre_acts(x)
        return pre_acts * (pre_acts > self.threshold)

    def losses(self, x: Tensor, *, dead: Tensor, step: int, shared: Whole | None = None) -> Mapping[str, Tensor]:
        """`mse` and `l0`."""
        pre_acts = self.pre_acts(x)
        if not self._known:
            self._begin(pre_acts, shared)
        theta, eps = self.threshold, self.config.bandwidth
        latents = _Jump.apply(pre_acts, theta, eps)
        l0 = _Step.apply(pre_acts, theta, eps).sum(dim=1).mean()
        self.note_fired(latents)
        penalty = self._penalty(l0, l0.detach() if shared is None or shared.l0 is None else shared.l0.to(l0))
        warm = self.config.l0_warmup_steps
        grown = min(1.0, (step + 1) / warm) if warm else 1.0
        return {"mse": (x - self.decode(latents)).square().mean(), "l0": grown * penalty}

    def prepare(self, parts: Sequence[Tensor], *, dead: Tensor, targets: Sequence[Tensor] | None = None) -> Whole:
        """The batch's L0, and at the first step the threshold that makes it k."""
        pre_acts = (self.pre_acts(part) for part in parts)
        if not self.begun and self.config.k is not None:
            lowest = lowest_kept(lambda: map(self.pre_acts, parts), self.config.k)
            active = sum(((p > lowest).sum() for p in pre_acts), torch.zeros(()))
        else:
            lowest, theta = None, self.threshold
            active = sum(((p > theta).sum() for p in pre_acts), torch.zeros(()))
        return Whole(lowest=lowest, l0=active / sum(map(len, parts)))

    def fold(self, scale: float) -> None:
        """Raw inputs with unit rows kept: biases, thresholds and activations shrink by `scale`."""
        with torch.no_grad():
            self.b_enc /= scale
            self.b_dec /= scale
            self.log_threshold -= torch.tensor(scale, dtype=torch.float64).log()

    def inference_state(self) -> Inference:
        """SAELens `jumprelu`."""
        tensors = self.tensors("W_enc", "b_enc", "W_dec", "b_dec")
        tensors["threshold"] = self.threshold.detach().cpu().float().contiguous()
        details = {
            "decoder_init_norm": self.decoder_init_norm,
            "jumprelu_init_threshold": self.config.initial_threshold,
            "jumprelu_bandwidth": self.config.bandwidth,
            "jumprelu_sparsity_loss_mode": "step",
            "l0_coefficient": self.config.l0_coefficient if self.config.k is None else self.config.target_coefficient,
            "l0_warm_up_steps": self.config.l0_warmup_steps,
            "target_l0": self.config.k,
        }
        return Inference("jumprelu", tensors, details=details)

    def _begin(self, pre_acts: Tensor, shared: Whole | None) -> None:
        """Thresholds where the first batch has L0 = k; once in a run."""
        self._known = True
        if self.config.k is None or bool(self.begun):
            return
        with torch.no_grad():
            found = shared.lowest if shared is not None else None
            lowest = kth_largest(pre_acts, len(pre_acts) * self.config.k) if found is None else found
            self.log_threshold.fill_(lowest.log())
            self.begun.fill_(True)

    def _penalty(self, l0: Tensor, whole: Tensor) -> Tensor:
        """The penalty on a part's `l0`, given that of the whole batch.

        The square is written as its value plus its slope times (l0 - whole): for a whole batch value and gradient are
        the square's, and those of parts add up to them.
        """
        if self.config.k is None:
            return self.config.l0_coefficient * l0 / self.config.d_in
        gap = whole / self.config.k - 1
        return self.config.target_coefficient * (gap**2 + 2 * gap * (l0 - whole) / self.config.k)


class _Jump(torch.autograd.Function):
    """p * 1[p > theta] with the estimated gradient in theta."""

    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, theta: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(pre_acts, theta)
        ctx.eps = eps
        return pre_acts * (pre_acts > theta)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        pre_acts, theta = ctx.saved_tensors
        near = _kernel(pre_acts, theta, ctx.eps)
        return grad * (pre_acts > theta), -(theta / ctx.eps) * (grad * near).sum(dim=0), None


class _Step(torch.autograd.Function):
    """1[p > theta] with the estimated gradient in theta, and none in p."""

    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, theta: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(pre_acts, theta)
        ctx.eps = eps
        return (pre_acts > theta).to(pre_acts.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        (grad,) = grads
        pre_acts, theta = ctx.saved_tensors
        near = _kernel(pre_acts, theta, ctx.eps)
        return None, -(grad * near).sum(dim=0) / ctx.eps, None


def _kernel(pre_acts: Tensor, theta: Tensor, eps: float) -> Tensor:
    """K((p - theta) / eps): whether a pre-activation lies within eps / 2 of its threshold."""
    return (pre_acts - theta).abs() < eps / 2
