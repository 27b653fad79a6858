"""Which latents a batch's tokens activate, and how strongly: the entries of a sparse matrix [n, d_sae].

By token for the reconstruction, by latent for the gradients. Nothing here waits for a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Codes"]


@dataclass(frozen=True)
class Codes:
    """The entries, token after token; those behind `start[n]` have the value 0 and count for nothing.

    Attributes:
        values: [m] float32, at least 0.
        index: [m] int32, the latent.
        token: [m] int32, the row.
        start: [n + 1] int32, where each row's entries begin.
        d_sae: latents.
        width: the same number of entries in every row, or 0.
    """

    values: Tensor
    index: Tensor
    token: Tensor
    start: Tensor
    d_sae: int
    width: int = 0

    @classmethod
    def of_rows(cls, values: Tensor, index: Tensor, d_sae: int) -> Codes:
        """From values [n, k] >= 0 and their latents [n, k]."""
        n, k = values.shape
        start = torch.arange(0, n * k + 1, k, dtype=torch.int32, device=values.device)
        token = torch.arange(n * k, dtype=torch.int32, device=values.device) // k
        return cls(values.flatten(), index.int().flatten(), token, start, d_sae, k)

    @property
    def n(self) -> int:
        """Rows."""
        return self.start.shape[0] - 1

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor]:
        """[d_sae + 1] int32 and [m] int32: where each latent's entries begin in the list of entries sorted by latent."""
        found, pair = torch.sort(self.index, stable=True)
        edges = torch.arange(self.d_sae + 1, dtype=torch.int32, device=found.device)
        return torch.searchsorted(found, edges, out_int32=True), pair.int()

    @cached_property
    def busiest(self) -> Tensor:
        """Latents [d_sae] int32 by the number of their entries, most first: long work begins early."""
        begin, _ = self.by_latent
        return begin.diff().argsort(descending=True).int()

    def sums(self, numbers: Tensor) -> Tensor:
        """Numbers [m] of the entries, summed a latent: [d_sae] float32."""
        return torch.zeros(self.d_sae, device=numbers.device).index_add_(0, self.index, numbers)

    @property
    def fired(self) -> Tensor:
        """[d_sae] bool: latents with a positive value."""
        return self.sums((self.values > 0).float()) > 0
