"""One optimiser step, in two halves.

`gradients` finds the losses and the norm of the gradient, `update` moves the parameters; in between, the trainer may
look at both and stop before anything is spoilt. A step knows nothing of data, logs or files. `PlainStep` is the
formula as it stands, for every architecture: backward, gradient projection, clip to norm 1, Adam, unit rows. A faster
step of an architecture is held against it.

Everything is float32. On a CUDA device the matrix products of a walk read their factors as TF32 (`quick_products`): 10
bits of mantissa, sums in float32, several times as fast. Weights, moments, losses, thresholds and what is measured
afterwards stay in full float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..events import Run
from .coder import Coder
from .micro import Parts, gradients
from .setup import adam

__all__ = ["CLIP", "PlainStep", "Step", "Taken", "quick_products"]

CLIP = 1.0
_CODER = "coder."


@contextmanager
def quick_products(device: torch.device) -> Iterator[None]:
    """Float32 matrix products in TF32 in the body, where `device` is a CUDA device; the process's setting comes back.

    The setting is one for all threads: whoever multiplies at the same time does so in TF32 as well.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.set_float32_matmul_precision(before)


@dataclass(frozen=True)
class Taken:
    """What the first half of a step found; nothing of it has left the device.

    Attributes:
        terms: the loss terms, weighted and detached, scalars; their sum is the loss.
        norm: of the gradient before it is clipped, a scalar.
        fired: [d_sae] bool, latents that were active in the batch.
    """

    terms: Mapping[str, Tensor]
    norm: Tensor
    fired: Tensor


class Step(Protocol):
    """How a coder learns from a batch. `parts` is into how many parts a batch is cut, `name` what a person is told."""

    name: str
    coder: Coder
    parts: Parts

    def gradients(self, x: Tensor, target: Tensor | None, *, dead: Tensor, step: int, seed: int) -> Taken:
        """The first half; no parameter changes. See `PlainStep`."""
        ...

    def update(self, lr: float) -> None:
        """The second half, with this learning rate."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Parameters, buffers and moments, by the names of a checkpoint."""
        ...

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from `state`; further names in `tensors` are left alone."""
        ...


class PlainStep:
    """The step of any architecture.

    Args:
        coder: on its device, and started; with `frozen_decoder` its W_dec is not touched.
        lr: any; `update` is told the rate.
        run: hears of a batch that is cut.

    Raises:
        RuntimeError: the moments do not fit the memory.
    """

    name = "plain"

    def __init__(self, coder: Coder, lr: float, run: Run) -> None:
        self.coder, self.parts = coder, Parts(run)
        self._trained = {n: p for n, p in coder.named_parameters() if not (coder.frozen_decoder and n == "W_dec")}
        self._adam = adam(list(self._trained.values()), lr)

    def __call__(self, x: Tensor, target: Tensor | None, *, dead: Tensor, step: int, lr: float, seed: int) -> Taken:
        """Both halves."""
        taken = self.gradients(x, target, dead=dead, step=step, seed=seed)
        self.update(lr)
        return taken

    def gradients(self, x: Tensor, target: Tensor | None, *, dead: Tensor, step: int, seed: int) -> Taken:
        """Losses and clipped gradients of a batch, in as many parts as the memory asks for.

        Args:
            x: [n, d_in] float32, scaled; target: [n, d_out], for coders that read one.
            dead: [d_sae] bool.
            seed: of whatever the architecture draws in this step.

        Raises:
            ResourceError: the smallest parts do not fit the memory.
        """

        def attempt() -> dict[str, Tensor]:
            torch.manual_seed(seed)
            self._adam.zero_grad(set_to_none=True)
            return gradients(self.coder, self.parts, x, target, dead=dead, step=step)

        terms = self.parts.attempt(attempt, self._undo, x.shape[0])
        self.coder.project_gradients()
        norm = torch.nn.utils.clip_grad_norm_(list(self._trained.values()), CLIP)
        return Taken(terms, norm, self.coder.take_fired(x))

    def update(self, lr: float) -> None:
        """Adam, then whatever the architecture does after a step (unit rows, thresholds)."""
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)  # others may need the memory until the next step
        self.coder.after_step()

    def state(self) -> dict[str, Tensor]:
        """`coder.NAME` and `adam.NAME.{step,exp_avg,exp_avg_sq}`."""
        tensors = {f"{_CODER}{k}": v for k, v in self.coder.state_dict().items()}
        for name, parameter in self._trained.items():
            tensors |= {f"adam.{name}.{k}": v for k, v in self._adam.state[parameter].items()}
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from `state`."""
        own = {k.removeprefix(_CODER): v for k, v in tensors.items() if k.startswith(_CODER)}
        self.coder.load_state_dict(own)
        for name, parameter in self._trained.items():
            for key, value in self._adam.state[parameter].items():
                value.copy_(tensors[f"adam.{name}.{key}"])

    def _undo(self) -> None:
        """Forget an attempt that ran out of memory."""
        self._adam.zero_grad(set_to_none=True)
        self.coder._fired = None
