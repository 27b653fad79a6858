"""Steering a penalty so that L0 comes out as wanted.

A penalised autoencoder (ReLU, gated) has no k: its L0 follows from a coefficient that has to be searched anew for every
site and width. Here the coefficient is c * exp(u), and after each step u moves with how far the batch's L0 is from k, on
a logarithmic scale:

    trend = log L0 - its exponential mean over the last steps
    gap   = s (log(L0 / k) + A trend, limited to [-1, 1])
    u     = integral + P gap,      integral <- integral + I gap

The integral removes any lasting difference. The trend looks ahead: while L0 is on its way to k nothing is added, since
a coefficient that grows beyond its place meanwhile shrinks all activations, and they do not grow back. For the same
reason s is 0 while the penalty warms up and then rises to 1 over three times as many steps: at the start half of all
latents are active, whatever the coefficient, and L0 falls by itself. u is a buffer, so a resumed run goes on to the
bit; two runs with the same seed steer alike.

`even_steps` is the other thing that penalised autoencoders share. Their gradient falls by an order of magnitude while
the penalty thins the latents out, and Adam's second moment remembers the first large ones for a thousand steps: a
short run then ends at a fraction of its rate.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["Steering", "even_steps"]

_PROPORTIONAL, _INTEGRAL = 0.3, 0.01
_AHEAD, _MEMORY = 2.0, 0.02
_SETTING_IN = 3  # times the rest


@torch.no_grad()
def even_steps(coder: nn.Module, d_in: int) -> None:
    """Turn the gradients into those of d_in times the loss: of |x - x^|^2 rather than its mean over the inputs.

    Their norm is then above 1 all along, so that the trainer's clip to norm 1 makes every step weigh alike in Adam's
    second moment. Adam itself does not see the factor.
    """
    for parameter in coder.parameters():
        if parameter.grad is not None:
            parameter.grad *= d_in


class Steering(nn.Module):
    """The factor exp(u) on a penalty's coefficient.

    Args:
        k: the wanted L0; None: the factor stays 1.
        rest: steps without steering; over three times as many it then sets in.
    """

    integral: Tensor
    exponent: Tensor
    slow: Tensor
    steps: Tensor

    def __init__(self, k: int | None, rest: int = 0) -> None:
        super().__init__()
        self.k, self.rest = k, rest
        self.register_buffer("integral", torch.zeros((), dtype=torch.float64))
        self.register_buffer("exponent", torch.zeros((), dtype=torch.float64))
        self.register_buffer("slow", torch.zeros((), dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._active: Tensor | None = None
        self._rows = 0

    @property
    def factor(self) -> Tensor:
        """exp(u), a scalar."""
        return self.exponent.exp()

    def note(self, latents: Tensor, *, first: bool) -> None:
        """Count the active latents of rows that are being learnt from; the parts of a batch after the `first` add up."""
        if self.k is None:
            return
        if first:
            self._active, self._rows = None, 0
        active = (latents.detach() > 0).sum()
        self._active = active if self._active is None else self._active + active
        self._rows += latents.shape[0]

    def step(self) -> None:
        """Move the exponent after an optimiser step."""
        if self.k is None or self._active is None:
            return
        log_l0 = (self._active.double() / self._rows).clamp_min(1e-3).log()
        self.slow.copy_(torch.where(self.steps == 0, log_l0, self.slow))
        self.steps += 1
        trend = log_l0 - self.slow
        self.slow += _MEMORY * trend
        share = ((self.steps - self.rest) / max(1, _SETTING_IN * self.rest)).clamp(0, 1).double()
        gap = share * (log_l0 - math.log(self.k) + _AHEAD * trend).clamp(-1, 1)
        self.integral += _INTEGRAL * gap
        self.exponent.copy_(self.integral + _PROPORTIONAL * gap)
        self._active, self._rows = None, 0
