"""A run that has lost its way is stopped, and nothing that it touched is kept.

Two signs: a loss or a gradient norm that is not finite, and a loss that stays above ten times its running median.
One bad batch is no divergence (a rare document can cost as much), and during warm-up losses move for good reasons;
so the second sign counts after the warm-up, and only when several steps in a row show it.

Looking at a number on a GPU makes the CPU wait for everything queued before it. So the numbers stay on the device
until there are enough of them, or until a checkpoint is due: no checkpoint is written before its steps were looked
at.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from .rows import Cursor

__all__ = ["Trouble", "Watch"]

EXPLODED = 10.0
_PATIENCE = 8  # steps in a row
_HISTORY, _ENOUGH = 200, 50  # losses that the median is taken over, and how many it needs
_FLOOR = 1e-3  # inputs have a mean square of about 1: below a thousandth of it nothing has exploded


@dataclass(frozen=True)
class Trouble:
    """The first bad step: its number, the cursor of the batch after it, and in words what was seen."""

    step: int
    cursor: Cursor
    words: str


class Watch:
    """Collects each step's loss and gradient norm, and judges them in order.

    Args:
        warmup_steps: explosions are not judged before.
        every: steps between two looks.
    """

    def __init__(self, warmup_steps: int, every: int) -> None:
        self.warmup_steps, self.every = warmup_steps, every
        self._values: list[Tensor] = []
        self._steps: list[tuple[int, Cursor]] = []
        self._losses: deque[float] = deque(maxlen=_HISTORY)
        self._above = 0

    def note(self, step: int, cursor: Cursor, loss: Tensor, norm: Tensor) -> None:
        """Remember a step's loss and gradient norm (scalars, left where they are)."""
        self._values.append(torch.stack((loss.detach().float(), norm.detach().float())))
        self._steps.append((step, cursor))

    @property
    def due(self) -> bool:
        """Whether enough steps are waiting to be looked at."""
        return len(self._steps) >= self.every

    def look(self) -> Trouble | None:
        """Judge what is waiting; the first trouble, if there is any."""
        if not self._steps:
            return None
        values, steps = torch.stack(self._values).tolist(), self._steps
        self._values, self._steps = [], []
        for (step, cursor), (loss, norm) in zip(steps, values, strict=True):
            if words := self._judge(step, loss, norm):
                return Trouble(step, cursor, words)
        return None

    def state(self) -> dict[str, object]:
        """What a resumed run must know (call after `look`)."""
        return {"losses": list(self._losses), "above": self._above}

    def restore(self, state: dict) -> None:
        """Go on from `state`."""
        self._losses.extend(state["losses"])
        self._above = int(state["above"])

    def _judge(self, step: int, loss: float, norm: float) -> str:
        if not math.isfinite(loss + norm):
            return f"the loss or its gradient is not finite (loss {loss:g}, gradient norm {norm:g})"
        usual = median(self._losses) if len(self._losses) >= _ENOUGH else math.inf
        high = step >= self.warmup_steps and loss > max(EXPLODED * usual, _FLOOR)
        self._above = self._above + 1 if high else 0
        if self._above >= _PATIENCE:
            return (
                f"the loss has been above {EXPLODED:g} times its usual {usual:.3g} for {_PATIENCE} steps ({loss:.3g})"
            )
        if not high:  # an explosion must not become what is usual
            self._losses.append(loss)
        return ""
