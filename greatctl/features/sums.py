"""The running sums of a pass over activations.

What is kept depends on the numbers of latents L, documents D and examples, never on tokens: per latent and document
sums (16 D L bytes), per latent and stretch of a document (4 D S L bytes, S chosen so that this stays below 256 MiB),
per latent and token bucket (8 B L bytes, B chosen so that this stays below 128 MiB), the best passages (160 bytes
each), and a sample of windows (at most 128 MiB). Only entries above 0 are touched, one after another in the order of
the corpus, so the sums do not depend on how the corpus is cut into pieces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .best import Best, Fired, heat_around, signatures
from .sample import Sampler

__all__ = ["BINS", "LOWEST", "NEAR", "POSITIONS", "Frame", "Near", "Piece", "Sums"]

BINS = 40  # half octaves from 2^-10 to 2^10; what lies beyond falls into the outer bins
LOWEST = -10
POSITIONS = 32  # half octaves of the position in its window
NEAR = 3  # near misses of each latent
_STRETCHES = 50  # of each document, where there is room
_STRETCH_BYTES, _BUCKET_BYTES = 2**28, 2**27
_NEAR_WINDOWS = 1024
_IDS = 2**14  # buckets where nobody counted the tokens


@dataclass(frozen=True)
class Frame:
    """What the sums are over.

    Attributes:
        owner: document of each window, int64 [W]; stretch: stretch of its document, int64 [W].
        stretches: of a document, at most.
        bucket: bucket of each token id, int64 [V]; own: ids that share their bucket with no other, bool [V].
        near_stride: near misses are looked for in every so manyth window.
    """

    d_sae: int
    n_documents: int
    top_k: int
    owner: Tensor
    stretch: Tensor
    stretches: int
    bucket: Tensor
    own: Tensor
    near_stride: int

    @classmethod
    def of(
        cls,
        d_sae: int,
        document_of_window: Sequence[int],
        n_documents: int,
        top_k: int,
        token_count: Tensor | None,
    ) -> Frame:
        """A frame whose tables stay within their budgets.

        Args:
            token_count: how often each id occurs [V]; the most frequent get buckets of their own. None: ids below
                the number of buckets do.
        """
        owner = torch.tensor(list(document_of_window), dtype=torch.int64)
        most = max(1, min(_STRETCHES, _STRETCH_BYTES // (4 * max(d_sae * n_documents, 1))))
        windows = owner.bincount(minlength=n_documents)
        first = windows.cumsum(0) - windows
        order = owner.argsort(stable=True)
        rank = torch.empty_like(owner)
        rank[order] = torch.arange(len(owner)) - first[owner[order]]
        stretch = rank * windows.clamp_max(most)[owner] // windows[owner].clamp_min(1)
        bucket, own = _buckets(token_count, max(16, _BUCKET_BYTES // (8 * d_sae)))
        near = max(1, -(-len(owner) // _NEAR_WINDOWS))
        return cls(d_sae, n_documents, top_k, owner, stretch, most, bucket, own, near)


def _buckets(token_count: Tensor | None, most: int) -> tuple[Tensor, Tensor]:
    """(bucket, own) of every id: the most frequent ones alone, the others together in the second half."""
    if token_count is None or len(token_count) <= most:
        size = min(most, _IDS) if token_count is None else len(token_count)
        return torch.arange(size), torch.ones(size, dtype=torch.bool)
    bucket = most // 2 + torch.arange(len(token_count)) % (most - most // 2)
    frequent = token_count.argsort(descending=True, stable=True)[: most // 2]
    bucket[frequent] = torch.arange(len(frequent))
    own = torch.zeros(len(token_count), dtype=torch.bool)
    own[frequent] = True
    return bucket, own


@dataclass(frozen=True)
class Near:
    """The closest passages in which latents are silent: window and row numbers [w], cosine and row [w, L]."""

    window: NDArray[np.int64]
    cosine: NDArray[np.float32]
    row: NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """Some whole windows, encoded.

    Attributes:
        window, position, token: int64 [n].
        windows: the windows' numbers [w], and how many rows each has: counts [w].
        x_sum: raw activations summed a window, float64 [w, d_in].
    """

    fired: Fired
    window: Tensor
    position: Tensor
    token: Tensor
    windows: Tensor
    counts: Tensor
    x_sum: Tensor
    near: Near | None


class Sums:
    """See the module."""

    def __init__(self, frame: Frame, d_in: int) -> None:
        d, n = frame.d_sae, frame.n_documents
        buckets = int(frame.bucket.max()) + 1
        self.frame = frame
        self.sampler = Sampler(len(frame.owner))
        self.top, self.near = Best(d, frame.top_k), Best(d, NEAR, floor=-2.0)
        self.tables = {
            "peak": torch.zeros(d),
            "square": torch.zeros(d, dtype=torch.float64),
            "histogram": torch.zeros(d * BINS, dtype=torch.int64),
            "document_tokens": torch.zeros(n, dtype=torch.int64),
            "document_total": torch.zeros(n * d, dtype=torch.float64),
            "document_fired": torch.zeros(n * d, dtype=torch.int64),
            "document_x_sum": torch.zeros(n, d_in, dtype=torch.float64),
            "stretch_tokens": torch.zeros(n * frame.stretches, dtype=torch.int64),
            "stretch_total": torch.zeros(n * frame.stretches * d),
            "token_count": torch.zeros(buckets, dtype=torch.int64),
            "token_total": torch.zeros(buckets * d, dtype=torch.float64),
            "position_count": torch.zeros(POSITIONS, dtype=torch.int64),
            "position_total": torch.zeros(POSITIONS * d, dtype=torch.float64),
        }

    def add(self, piece: Piece) -> None:
        """Fold in some whole windows."""
        self._add_windows(piece)
        self._add_entries(piece)
        self._add_examples(piece)
        if piece.near is not None:
            self._add_near(piece, piece.near)
        where = {name: getattr(piece, name).numpy() for name in ("window", "position", "token")}
        self.sampler.add(where, piece.fired)

    def _cells(self, piece: Piece) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Document, stretch, token bucket and position bin of each row."""
        frame = self.frame
        document = frame.owner[piece.window]
        stretch = document * frame.stretches + frame.stretch[piece.window]
        bucket = frame.bucket[piece.token % len(frame.bucket)]
        octave = (2 * piece.position.clamp_min(1).double().log2()).long().clamp_max(POSITIONS - 1)
        return document, stretch, bucket, octave

    def _add_windows(self, piece: Piece) -> None:
        tables, document = self.tables, self.frame.owner[piece.windows]
        stretch = document * self.frame.stretches + self.frame.stretch[piece.windows]
        tables["document_tokens"].index_add_(0, document, piece.counts)
        tables["stretch_tokens"].index_add_(0, stretch, piece.counts)
        tables["document_x_sum"].index_add_(0, document, piece.x_sum)

    def _add_entries(self, piece: Piece) -> None:
        """The sums over entries above 0; index_add_ on one dimension adds in order."""
        tables, d = self.tables, self.frame.d_sae
        document, stretch, bucket, octave = self._cells(piece)
        one = torch.ones_like(piece.window)
        tables["token_count"].index_add_(0, bucket, one)
        tables["position_count"].index_add_(0, octave, one)
        row, latent = torch.from_numpy(piece.fired.row), torch.from_numpy(piece.fired.latent)
        value = torch.from_numpy(piece.fired.value)
        exact, once = value.double(), torch.ones_like(latent)
        cell = document[row] * d + latent
        tables["document_total"].index_add_(0, cell, exact)
        tables["document_fired"].index_add_(0, cell, once)
        tables["stretch_total"].index_add_(0, stretch[row] * d + latent, value)
        tables["token_total"].index_add_(0, bucket[row] * d + latent, exact)
        tables["position_total"].index_add_(0, octave[row] * d + latent, exact)
        tables["square"].index_add_(0, latent, exact.square())
        tables["peak"].scatter_reduce_(0, latent, value, "amax")
        bin_ = (2 * (value.log2() - LOWEST)).floor().clamp(0, BINS - 1).long()
        tables["histogram"].index_add_(0, latent * BINS + bin_, once)

    def _add_examples(self, piece: Piece) -> None:
        """Offer each window's strongest token of every latent that could enter its list."""
        fired, window = piece.fired, piece.window.numpy()
        chosen = self.top.wanted(fired.latent, fired.value)
        if not len(chosen):
            return
        row, latent, value = fired.row[chosen], fired.latent[chosen], fired.value[chosen]
        order = np.lexsort((row, -value, window[row], latent))
        row, latent, value = row[order], latent[order], value[order]
        first = np.ones(len(row), dtype=bool)
        first[1:] = (np.diff(latent) != 0) | (np.diff(window[row]) != 0)
        row, latent, value = row[first], latent[first], value[first]
        alike = signatures(piece.token.numpy(), window)
        slot, rank, offer = self.top.offer(latent, value, window[row], piece.position.numpy()[row], alike[row])
        self.top.heat[slot, rank] = heat_around(fired, window, row[offer], slot)

    def _add_near(self, piece: Piece, near: Near) -> None:
        """Offer the closest silent passages; they have no heat."""
        cosine = near.cosine.ravel()
        latent = np.tile(np.arange(self.frame.d_sae), len(near.window))
        chosen = self.near.wanted(latent, cosine)
        if len(chosen):
            row, alike = near.row.ravel()[chosen], signatures(piece.token.numpy(), piece.window.numpy())
            window, position = piece.window.numpy()[row], piece.position.numpy()[row]
            self.near.offer(latent[chosen], cosine[chosen], window, position, alike[row])

    def state(self) -> dict[str, Tensor]:
        """Everything, to go on later."""
        parts = {"top": self.top.state(), "near": self.near.state(), "sample": self.sampler.state()}
        return dict(self.tables) | {f"{p}.{name}": t for p, state in parts.items() for name, t in state.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`."""
        for name, table in self.tables.items():
            table.copy_(state[name])
        for prefix, part in (("top.", self.top), ("near.", self.near), ("sample.", self.sampler)):
            part.restore({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
