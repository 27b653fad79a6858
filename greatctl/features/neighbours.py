"""Decoder neighbours: latents that write nearly the same."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["NEIGHBOURS", "neighbours"]

NEIGHBOURS = 5
_BUDGET = 2**24  # cosines held at once


def neighbours(directions: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest rows of each row by cosine: (row int64, cosine float32), each [n, min(NEIGHBOURS, n - 1)].

    Args:
        directions: [n, d], rows of W_dec.
    """
    rows = normalize(directions.detach().float(), dim=1)
    k = min(NEIGHBOURS, max(len(rows) - 1, 0))
    found, cosines = [], []
    for block in torch.arange(len(rows), device=rows.device).split(max(1, _BUDGET // max(len(rows), 1))):
        cosine = rows[block] @ rows.T
        cosine[torch.arange(len(block), device=rows.device), block] = -2.0
        best = cosine.topk(k, dim=1)
        found.append(best.indices.cpu())
        cosines.append(best.values.cpu())
    if not found:
        return torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, 0)
    return torch.cat(found), torch.cat(cosines)
