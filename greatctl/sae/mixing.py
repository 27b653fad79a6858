"""How well batches are mixed: counted, and held against a perfect shuffle.

Rows that come from few windows at a time make gradients that follow the document of the moment. Three numbers say
how far a batch is from that: how many windows and works it holds, and the entropy (nats) of its rows over windows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .rows import generator

__all__ = ["Mixing", "measured", "perfect"]

_DRAWS = 8


@dataclass(frozen=True)
class Mixing:
    """Means over batches: distinct windows, distinct works, entropy over windows in nats."""

    windows: float
    works: float
    entropy: float


def measured(batches: Iterable[Tensor], work_of: Tensor) -> Mixing:
    """Of batches given as the window number [n] of each row; work_of: [n_windows], the document of each window."""
    rows = torch.tensor([_one(windows, work_of) for windows in batches], dtype=torch.float64)
    return Mixing(*rows.mean(dim=0).tolist())


def perfect(rows_of: Tensor, work_of: Tensor, batch_size: int) -> Mixing:
    """What batches drawn from all rows at once hold, by trying.

    Args:
        rows_of: [n_windows] usable rows of each window.
        work_of: [n_windows] document of each window.
    """
    ends = rows_of.cumsum(dim=0)
    g = generator(0, "mixing")
    draws = [torch.randint(int(ends[-1]), (batch_size,), generator=g) for _ in range(_DRAWS)]
    return measured((torch.searchsorted(ends, draw, right=True) for draw in draws), work_of)


def _one(windows: Tensor, work_of: Tensor) -> tuple[float, float, float]:
    distinct, counts = windows.unique(return_counts=True)
    shares = counts.double() / windows.numel()
    return distinct.numel(), work_of[distinct].unique().numel(), float(-(shares * shares.log()).sum())
