"""Latents of a fixed sample of windows, kept whole but sparse.

Deciles need the largest activation, which is known only at the end, and co-firing needs pairs of latents, of which
there are too many to count on every token. Both are taken from windows spread evenly over the corpus. Their number
is bounded, and so are their entries: where latents fire too densely, every second window is dropped again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from .best import Best, Fired, Kept, heat_around, signatures

__all__ = ["COFIRING", "DECILES", "DECILE_EXAMPLES", "Cofiring", "Sample", "Sampler", "cofiring", "decile_examples"]

DECILES, DECILE_EXAMPLES = 10, 2
COFIRING = 5  # latents named beside each
_WINDOWS = 1024
_ENTRIES = 2**24  # 8 bytes each
_FEWEST_TOGETHER = 5  # tokens; fewer shared ones say little
_PAIR_ROWS = 2**16  # tokens on which pairs are counted
_BLOCK = 2**22  # pairs, or entries, looked at at once


@dataclass(frozen=True)
class Sample:
    """Rows of the sampled windows, whole windows in order.

    Attributes:
        window, position, token: int32 [n].
        start: int64 [n + 1], where a row's entries begin.
        latent: int32 [entries]; value: float32 [entries], above 0.
    """

    window: NDArray[np.int32]
    position: NDArray[np.int32]
    token: NDArray[np.int32]
    start: NDArray[np.int64]
    latent: NDArray[np.int32]
    value: NDArray[np.float32]


class Sampler:
    """Collects the sample. Every `stride`th window is in it; the stride doubles when the entries grow too many."""

    def __init__(self, n_windows: int, *, windows: int = _WINDOWS, entries: int = _ENTRIES) -> None:
        self.stride = max(1, -(-n_windows // windows))
        self._entries = entries
        self._parts: list[dict[str, NDArray]] = []

    def takes(self, window: NDArray) -> NDArray[np.bool_]:
        """Which rows are in the sample, by their windows."""
        return window % self.stride == 0

    def add(self, where: Mapping[str, NDArray], fired: Fired) -> None:
        """Add those rows (window, position and token, [n] each) that are in the sample."""
        stay = self.takes(where["window"])
        if not stay.any():
            return
        entries = stay[fired.row]
        count = np.bincount(fired.row, minlength=len(stay))[stay]
        part = {name: where[name][stay].astype(np.int32) for name in ("window", "position", "token")}
        part |= {"count": count, "latent": fired.latent[entries].astype(np.int32), "value": fired.value[entries]}
        self._parts.append(part)
        while sum(len(p["value"]) for p in self._parts) > self._entries and self._thin():
            continue

    def _thin(self) -> bool:
        """Drop every second window; False where one alone is left."""
        self.stride *= 2
        before = len({int(w) for p in self._parts for w in np.unique(p["window"])})
        if before <= 1:
            return False
        thinned = []
        for part in self._parts:
            stay = part["window"] % self.stride == 0
            entries = np.repeat(stay, part["count"])
            thinned.append({k: v[entries if k in ("latent", "value") else stay] for k, v in part.items()})
        self._parts = [part for part in thinned if len(part["window"])]
        return True

    def sample(self) -> Sample:
        """All that was collected."""
        whole = self._joined()
        start = np.concatenate([[0], np.cumsum(whole.pop("count"))]).astype(np.int64)
        return Sample(start=start, **whole)  # type: ignore[arg-type]

    def _joined(self) -> dict[str, NDArray]:
        kinds = {"window": np.int32, "position": np.int32, "token": np.int32, "count": np.int64, "latent": np.int32}
        kinds |= {"value": np.float32}  # type: ignore[dict-item]
        return {
            name: np.concatenate([np.zeros(0, kind), *(part[name].astype(kind, copy=False) for part in self._parts)])
            for name, kind in kinds.items()
        }

    def state(self) -> dict[str, Tensor]:
        """Everything, to go on later."""
        joined = {name: torch.from_numpy(values) for name, values in self._joined().items()}
        return joined | {"stride": torch.tensor([self.stride])}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`."""
        self.stride = int(state["stride"])
        self._parts = [{name: tensor.numpy().copy() for name, tensor in state.items() if name != "stride"}]


def decile_examples(sample: Sample, peak: NDArray[np.float32]) -> Kept:
    """Passages of each tenth of a latent's range (0, peak], drawn evenly, at most one a window.

    Args:
        peak: largest activation of each latent [L].

    Returns:
        Passages of slot latent * DECILES + decile, ranked by a fixed random number instead of their activation.
    """
    n_latents = len(peak)
    best = Best(n_latents * DECILES, DECILE_EXAMPLES)
    ends = np.flatnonzero(np.diff(sample.window, append=-1)) + 1
    first = 0
    for last, following in zip_longest(ends.tolist(), ends[1:].tolist()):
        if following is None or sample.start[following] - sample.start[first] > _PAIR_ROWS:
            _offer_deciles(best, sample, first, last, peak)
            first = last
    return best.kept()


def _offer_deciles(best: Best, sample: Sample, first: int, last: int, peak: NDArray[np.float32]) -> None:
    """Offer the rows first to last, which are whole windows."""
    entries = slice(sample.start[first], sample.start[last])
    latent, value = sample.latent[entries].astype(np.int64), sample.value[entries]
    row = np.repeat(np.arange(last - first), np.diff(sample.start[first : last + 1]))
    window = sample.window[first:last].astype(np.int64)
    decile = np.clip(np.ceil(DECILES * value.astype(np.float64) / peak[latent]) - 1, 0, DECILES - 1).astype(np.int64)
    slot, drawn = latent * DECILES + decile, _drawn(latent, window[row])
    chosen = best.wanted(slot, drawn)
    # one a window: the first of a slot's entries there
    _, once = np.unique(slot[chosen] * (int(window.max()) + 1) + window[row[chosen]], return_index=True)
    chosen = chosen[np.sort(once)]
    if not len(chosen):
        return
    at = row[chosen]
    alike = signatures(sample.token[first:last], window)
    new_slot, rank, offer = best.offer(
        slot[chosen], drawn[chosen], window[at], sample.position[first:last][at].astype(np.int64), alike[at]
    )
    fired = Fired(row, latent, value, len(peak))
    best.heat[new_slot, rank] = heat_around(fired, window, at[offer], new_slot // DECILES)


def _drawn(latent: NDArray[np.int64], window: NDArray[np.int64]) -> NDArray[np.float32]:
    """A fixed random number in (0, 1] for each latent and window."""
    with np.errstate(over="ignore"):
        mixed = (latent * 1_000_003 + window + 1).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    return ((mixed >> np.uint64(40)).astype(np.float32) + 1) / np.float32(2**24)


@dataclass(frozen=True)
class Cofiring:
    """Latents that fire on the same tokens; each [L, COFIRING], best first.

    Attributes:
        latent: int64, -1 where there is none.
        jaccard: shared tokens over tokens on which either fires, float64.
        n_tokens: tokens that were looked at.
    """

    latent: NDArray[np.int64]
    jaccard: NDArray[np.float64]
    n_tokens: int


def cofiring(sample: Sample, n_latents: int) -> Cofiring:
    """Count shared tokens on evenly spaced windows of the sample, some latents at a time."""
    rows = _even_rows(sample)
    keep = np.repeat(rows, np.diff(sample.start))
    count = np.concatenate([[0], np.cumsum(np.diff(sample.start)[rows])])
    ones = np.ones(int(keep.sum()), dtype=np.int32)
    fired = sparse.csr_matrix((ones, sample.latent[keep], count), shape=(int(rows.sum()), n_latents))
    each = np.asarray(fired.sum(axis=0)).ravel()
    by_latent = fired.T.tocsr()
    names = np.full((n_latents, COFIRING), -1, dtype=np.int64)
    shares = np.zeros((n_latents, COFIRING))
    step = max(1, _BLOCK // max(n_latents, 1))
    for first in range(0, n_latents, step):
        block = np.arange(first, min(first + step, n_latents))
        shared = np.asarray((by_latent[block] @ fired).todense(), dtype=np.float64)
        shared[np.arange(len(block)), block] = 0
        jaccard = np.where(
            shared >= _FEWEST_TOGETHER, shared / np.maximum(each[block][:, None] + each - shared, 1), 0.0
        )
        best = np.argsort(-jaccard, axis=1, kind="stable")[:, :COFIRING]
        value = np.take_along_axis(jaccard, best, axis=1)
        names[block, : best.shape[1]] = np.where(value > 0, best, -1)
        shares[block, : best.shape[1]] = value
    return Cofiring(names, shares, int(rows.sum()))


def _even_rows(sample: Sample) -> NDArray[np.bool_]:
    """Rows of evenly spaced windows, at most about _PAIR_ROWS of them."""
    numbers = np.unique(sample.window)
    every = max(1, -(-len(sample.window) // _PAIR_ROWS))
    return np.isin(sample.window, numbers[::every])
