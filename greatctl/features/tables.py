"""One pass over all activations: how often, how strongly and where each latent fires.

The activations of a layer do not fit in memory, and neither do the latents of one shard; so whole windows are
encoded a few at a time and folded into sums. What is kept grows with latents, documents and examples, not
with tokens. Everything is added in the order of the shards, so two passes give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["AFTER", "BEFORE", "BINS", "FeatureTables", "bin_edges", "scan"]

BEFORE, AFTER = 24, 12  # tokens shown around an example's strongest token
BINS = 40  # half octaves from 2^-10 to 2^10; what lies beyond falls into the outer bins
_LOWEST = -10
_BUDGET = 32 * 2**20  # latents held at once (float32: 128 MiB)


@dataclass(frozen=True)
class FeatureTables:
    """What the pass found. L latents, D documents, K examples; special tokens (BOS…) count nowhere.

    Attributes:
        n_tokens: tokens that were read.
        fired: tokens on which a latent is above 0, int64 [L]; total: sum of its activations, float64 [L].
        peak: largest activation, float32 [L].
        histogram: tokens by activation, int64 [L, BINS], over the bins of `bin_edges`.
        document_tokens: int64 [D]; document_total float64 [D, L] and document_fired int64 [D, L] are `total`
            and `fired` of each document.
        top_activation: float32 [L, K], falling; 0 where a latent fires in fewer than K windows. One example a
            window.
        top_window, top_position: int64 [L, K] of the examples, -1 where there is none.
        top_heat: float32 [L, K, BEFORE + 1 + AFTER], the latent around its example (0 beyond the window's
            ends).
    """

    n_tokens: int
    fired: Tensor
    total: Tensor
    peak: Tensor
    histogram: Tensor
    document_tokens: Tensor
    document_total: Tensor
    document_fired: Tensor
    top_activation: Tensor
    top_window: Tensor
    top_position: Tensor
    top_heat: Tensor

    @property
    def document_means(self) -> np.ndarray:
        """Mean activation over a document's tokens, float64 [D, L]; 0 for a document without tokens."""
        return (self.document_total / self.document_tokens.clamp_min(1)[:, None]).numpy()


def bin_edges() -> list[float]:
    """Lower edges of the histogram's bins."""
    return [2.0 ** (_LOWEST + i / 2) for i in range(BINS)]


def scan(
    shards: Iterable[Mapping[str, Tensor]],
    encode: Callable[[Tensor], Tensor],
    d_sae: int,
    document_of_window: Sequence[int],
    *,
    n_documents: int,
    special_ids: Sequence[int] = (),
    top_k: int = 10,
    device: str | torch.device = "cpu",
    said: Callable[[int], None] = lambda rows: None,
) -> FeatureTables:
    """Read every shard once.

    Args:
        shards: dicts with acts [rows, d_model], window, position, token int [rows]; a window's rows lie
            together, in order, within one shard.
        encode: [n, d_model] float32 on `device` -> latents [n, d_sae] >= 0.
        document_of_window: number of the document of each window.
        said: called with the number of rows read, a chunk at a time; it may raise to stop.
    """
    owner = torch.tensor(list(document_of_window), dtype=torch.int64)
    sums = _Sums(d_sae, n_documents, top_k)
    special = torch.tensor(list(special_ids), dtype=torch.int64)
    for shard in shards:
        keep = ~torch.isin(shard["token"].long(), special)
        window, position = shard["window"][keep].long(), shard["position"][keep].long()
        acts = shard["acts"][keep]
        for first, last in _chunks(window, max(1, _BUDGET // d_sae)):
            with torch.no_grad():
                latents = encode(acts[first:last].to(device, torch.float32)).cpu()
            sums.add(latents, window[first:last], position[first:last], owner)
            said(last - first)
        said(len(keep) - len(acts))
    return sums.tables()


def _chunks(window: Tensor, rows: int) -> Iterator[tuple[int, int]]:
    """Row ranges of whole windows with about `rows` rows (never less than one window)."""
    ends = torch.unique_consecutive(window, return_counts=True)[1].cumsum(0).tolist()
    first = 0
    for here, following in zip(ends, [*ends[1:], None], strict=True):
        if following is None or following - first > rows:
            yield first, here
            first = here


class _Sums:
    """The running sums of a pass."""

    def __init__(self, d_sae: int, n_documents: int, top_k: int) -> None:
        self.n_tokens = 0
        self.peak = torch.zeros(d_sae)
        self.histogram = torch.zeros(d_sae * BINS, dtype=torch.int64)
        self.document_tokens = torch.zeros(n_documents, dtype=torch.int64)
        self.document_total = torch.zeros(n_documents, d_sae, dtype=torch.float64)
        self.document_fired = torch.zeros(n_documents, d_sae, dtype=torch.int64)
        self.activation = torch.zeros(d_sae, top_k)
        self.window = torch.full((d_sae, top_k), -1)
        self.position = torch.full((d_sae, top_k), -1)
        self.heat = torch.zeros(d_sae, top_k, BEFORE + 1 + AFTER)

    def add(self, latents: Tensor, window: Tensor, position: Tensor, owner: Tensor) -> None:
        """Fold in the latents [n, d_sae] of whole windows; only those above 0 are touched."""
        n, d_sae = latents.shape
        numbers, local, counts = torch.unique_consecutive(window, return_inverse=True, return_counts=True)
        row, latent = (latents > 0).nonzero(as_tuple=True)
        value = latents[row, latent]
        one = torch.ones_like(latent)
        # index_add_ on one dimension adds in order, so the sums do not depend on where chunks end
        cell = owner[window[row]] * d_sae + latent
        self.document_total.view(-1).index_add_(0, cell, value.double())
        self.document_fired.view(-1).index_add_(0, cell, one)
        self.document_tokens.index_add_(0, owner[numbers], counts)
        place = (2 * (value.log2() - _LOWEST)).floor().clamp(0, BINS - 1).long()
        self.histogram.index_add_(0, latent * BINS + place, one)
        peaks = torch.zeros(len(numbers), d_sae)
        peaks.view(-1).scatter_reduce_(0, local[row] * d_sae + latent, value, "amax")
        self.n_tokens += n
        self.peak = torch.maximum(self.peak, peaks.amax(dim=0))
        ends = counts.cumsum(0)
        starts = list(zip((ends - counts).tolist(), counts.tolist(), strict=True))
        self._add_examples(latents, numbers, starts, peaks, position)

    def _add_examples(
        self, latents: Tensor, numbers: Tensor, starts: list[tuple[int, int]], peaks: Tensor, position: Tensor
    ) -> None:
        """Merge the strongest windows of this chunk into the examples; an earlier window wins a tie."""
        k = self.activation.shape[1]
        rows = (peaks.amax(dim=0) > self.activation[:, -1]).nonzero().squeeze(1)  # whose list changes
        if not len(rows):
            return
        peaks = peaks.T[rows].contiguous()
        best, which = (part[:, :k] for part in peaks.sort(dim=1, descending=True, stable=True))
        best = torch.where(best > self.activation[rows, -1:], best, 0.0)
        places, heat = torch.full(best.shape, -1), torch.zeros(*best.shape, BEFORE + 1 + AFTER)
        found = best > 0
        for i in which[found].unique().tolist():
            at = ((which == i) & found).nonzero(as_tuple=True)
            start, count = starts[i]
            block = latents[start : start + count, rows[at[0]]].numpy()
            top = block.argmax(axis=0)  # numpy: the first of equals
            places[at] = position[start + torch.from_numpy(top)]
            heat[at] = torch.from_numpy(_around(block, top))
        window = torch.where(found, numbers[which], -1)
        merged = torch.cat([self.activation[rows], best], dim=1)
        merged, order = merged.sort(dim=1, descending=True, stable=True)
        order = order[:, :k]
        self.activation[rows] = merged[:, :k]
        self.window[rows] = torch.cat([self.window[rows], window], dim=1).gather(1, order)
        self.position[rows] = torch.cat([self.position[rows], places], dim=1).gather(1, order)
        heats = torch.cat([self.heat[rows], heat], dim=1)
        self.heat[rows] = heats.gather(1, order[:, :, None].expand(-1, -1, heats.shape[2]))

    def tables(self) -> FeatureTables:
        """The finished tables."""
        return FeatureTables(
            n_tokens=self.n_tokens,
            fired=self.document_fired.sum(dim=0),
            total=self.document_total.sum(dim=0),
            peak=self.peak,
            histogram=self.histogram.view(-1, BINS),
            document_tokens=self.document_tokens,
            document_total=self.document_total,
            document_fired=self.document_fired,
            top_activation=self.activation,
            top_window=self.window,
            top_position=self.position,
            top_heat=self.heat,
        )


def _around(block: np.ndarray, top: np.ndarray) -> np.ndarray:
    """Activations around row `top[j]` of column j, [n_columns, BEFORE + 1 + AFTER]; 0 beyond the ends."""
    rows = top[:, None] + np.arange(-BEFORE, AFTER + 1)[None, :]
    inside = (rows >= 0) & (rows < len(block))
    values = block[np.clip(rows, 0, len(block) - 1), np.arange(len(top))[:, None]]
    return np.where(inside, values, 0.0).astype(np.float32)
