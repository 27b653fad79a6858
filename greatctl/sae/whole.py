"""What a loss needs to know of a whole batch while it sees one part of it.

A batch that does not fit the memory is cut into parts. Most terms are means over rows and do not notice; three
things do not fall apart like that: the threshold of a BatchTopK batch, the variance that normalises AuxK, and a
penalty on the mean L0. They are found first, part by part, without gradients.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Whole", "spread_of"]


@dataclass(frozen=True)
class Whole:
    """Scalars of a batch.

    Attributes:
        lowest: the smallest pre-activation that BatchTopK keeps.
        spread: mean over the rows of |e - mean(e)|^2, e the residual (float64).
        l0: mean number of active latents a row.
    """

    lowest: Tensor | None = None
    spread: Tensor | None = None
    l0: Tensor | None = None


def spread_of(residuals: Iterable[Tensor]) -> Tensor:
    """`Whole.spread` of the residuals [n_i, d] of all parts."""
    rows, total, square = 0, torch.zeros(()), torch.zeros((), dtype=torch.float64)
    for part in residuals:
        e = part.double()
        rows, total, square = rows + len(e), total.to(e) + e.sum(dim=0), square.to(e.device) + e.square().sum()
    return (square - total.square().sum() / rows) / rows
