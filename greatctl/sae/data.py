"""Activation shards as a shuffled, resumable stream of training batches.

Left out of training and of every metric: special tokens (BOS above all) and rows whose norm is above ten
times the median (attention sinks). Both are counted. What is held out is decided by window, so that no
document leaks across.

The order is a function of (seed, epoch, block) alone: a cursor of three numbers is all that a resume needs.
Where the rows fit the memory budget there is one block and the shuffle is an exact global permutation;
otherwise the shards are permuted and cut into blocks that fit, and each block is permuted. Each row comes
exactly once an epoch.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import StageError
from ..store.shards import ShardReader

__all__ = ["ActivationRows", "Counts", "Cursor", "derive", "generator"]

MEMORY_BUDGET = 2 * 2**30
HELD_OUT_ROWS = 1 << 15
OUTLIER = 10.0


def derive(seed: int, *purpose: object) -> int:
    """A seed of its own for each named purpose (63 bits)."""
    text = "/".join(str(p) for p in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator for a named purpose."""
    return torch.Generator().manual_seed(derive(seed, *purpose))


@dataclass(frozen=True)
class Counts:
    """Where the rows went. `rows` = `special` + `outliers` + `held_out` + `train`."""

    rows: int
    special: int
    outliers: int
    held_out: int
    train: int


@dataclass(frozen=True)
class Cursor:
    """The next batch: epoch, block within the epoch, batch within the block."""

    epoch: int = 0
    block: int = 0
    batch: int = 0


class ActivationRows:
    """The usable rows of an activations folder.

    Args:
        reader: the shards (`acts` [rows, d_in], `window`, `position`, `token`).
        special_ids: token ids to leave out.
        held_out: [n_windows] bool, True for windows that training must not see.
        budget: bytes of activations held in memory at once.

    Attributes:
        counts: see `Counts`.
        median_norm: over all rows of ordinary tokens.
        mean: [d_in] float64, over the training rows.
        mean_norm: over the training rows.
        gamma: |mean| / standard deviation, which predicts dead latents when large.

    Raises:
        StageError: a row is not finite, or no training row is left.
    """

    def __init__(
        self,
        reader: ShardReader,
        special_ids: Sequence[int],
        held_out: Tensor,
        *,
        budget: int = MEMORY_BUDGET,
    ) -> None:
        self.reader = reader
        self.budget = budget
        self._cached: tuple[tuple[int, ...], Tensor] | None = None
        self._divide(torch.tensor(sorted(special_ids), dtype=torch.int64), held_out)
        self._measure()

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self.mean.shape[0]

    def blocks(self, seed: int, epoch: int) -> list[tuple[int, ...]]:
        """The shard numbers of each block of an epoch, in order."""
        sizes = [self._train[n].numel() * self._row_bytes for n in range(len(self._train))]
        if sum(sizes) <= self.budget:
            return [tuple(n for n, size in enumerate(sizes) if size)]
        order = torch.randperm(len(sizes), generator=generator(seed, "shards", epoch)).tolist()
        found: list[list[int]] = [[]]
        room = self.budget
        for shard in order:
            if found[-1] and sizes[shard] > room:
                found.append([])
                room = self.budget
            if sizes[shard]:
                found[-1].append(shard)
                room -= sizes[shard]
        return [tuple(block) for block in found if block]

    def steps(self, seed: int, batch_size: int, epochs: int) -> int:
        """Batches in so many epochs."""
        return sum(self._batches(block, batch_size) for epoch in range(epochs) for block in self.blocks(seed, epoch))

    def stream(self, seed: int, batch_size: int, start: Cursor) -> Iterator[tuple[Cursor, Tensor]]:
        """Endless batches from `start` on: (cursor of the next batch, rows [about batch_size, d_in] as
        stored).

        A block is cut into batches of equal size (to one row), the number nearest to what `batch_size` asks
        for.
        """
        for epoch in itertools.count(start.epoch):
            for number, block in enumerate(self.blocks(seed, epoch)):
                here = (epoch, number)
                if here < (start.epoch, start.block):
                    continue
                first = start.batch if here == (start.epoch, start.block) else 0
                total = self._batches(block, batch_size)
                if first >= total:
                    continue
                rows = self._load(block)
                n = rows.shape[0]
                order = torch.randperm(n, generator=generator(seed, "rows", epoch, number))
                for batch in range(first, total):
                    chosen = order[batch * n // total : (batch + 1) * n // total]
                    yield Cursor(epoch, number, batch + 1), rows[chosen]

    def held_out(self, limit: int = HELD_OUT_ROWS) -> Tensor:
        """The held-out rows as float32 [n, d_in], evenly thinned to `limit` rows at most."""
        step = max(1, -(-self.counts.held_out // limit))
        parts, offset = [], 0
        for number, index in enumerate(self._held):
            chosen = index[(-offset) % step :: step]
            offset += index.numel()
            if chosen.numel():
                parts.append(self.reader.read(number)["acts"][chosen].float())
        return torch.cat(parts) if parts else torch.zeros(0, self.d_in)

    def _batches(self, block: tuple[int, ...], batch_size: int) -> int:
        rows = sum(self._train[n].numel() for n in block)
        return max(1, round(rows / batch_size))

    def _load(self, block: tuple[int, ...]) -> Tensor:
        if self._cached is not None and self._cached[0] == block:
            return self._cached[1]
        self._cached = None  # first, so that two blocks are never held at once
        rows, at = torch.empty(0), 0
        for number in block:
            index = self._train[number]
            part = self.reader.read(number)["acts"][index]
            if not at:
                total = sum(self._train[n].numel() for n in block)
                rows = torch.empty(total, part.shape[1], dtype=part.dtype)
            rows[at : at + index.numel()] = part
            at += index.numel()
        self._cached = (block, rows)
        return rows

    def _divide(self, special: Tensor, held_out: Tensor) -> None:
        """First pass: norms, then the row numbers of each shard that are trained on or held out."""
        norms, ordinary, held = [], [], []
        for number, shard in enumerate(self.reader):
            norm = torch.cat([part.float().norm(dim=1) for part in shard["acts"].split(1 << 16)])
            if not bool(torch.isfinite(norm).all()):
                raise _not_finite(self.reader, number, int((~torch.isfinite(norm)).nonzero()[0]), shard)
            norms.append(norm)
            ordinary.append(~torch.isin(shard["token"].long(), special))
            held.append(held_out[shard["window"].long()])
            self._row_bytes = shard["acts"].shape[1] * shard["acts"].element_size()
        if not norms or not bool(torch.cat(ordinary).any()):
            raise StageError(
                "there are no activations to train on",
                why=f"{self.reader.rows:,} rows, none of them an ordinary token",
                fix="harvest more text: `greatctl fetch`, `greatctl tokenize`, `greatctl harvest`",
            )
        self.median_norm = float(torch.cat(norms)[torch.cat(ordinary)].median())
        inside = [n <= OUTLIER * self.median_norm for n in norms]
        self._train = [(o & i & ~h).nonzero().squeeze(1) for o, i, h in zip(ordinary, inside, held, strict=True)]
        self._held = [(o & i & h).nonzero().squeeze(1) for o, i, h in zip(ordinary, inside, held, strict=True)]
        self.counts = Counts(
            rows=sum(n.numel() for n in norms),
            special=sum(int((~o).sum()) for o in ordinary),
            outliers=sum(int((o & ~i).sum()) for o, i in zip(ordinary, inside, strict=True)),
            held_out=sum(h.numel() for h in self._held),
            train=sum(t.numel() for t in self._train),
        )
        if not self.counts.train:
            raise StageError(
                "every row is held out: there is nothing to train on",
                why=f"{self.counts.held_out:,} rows are held out, {self.counts.special:,} are special tokens",
                fix='tokenize at least one work with split = "train"',
            )

    def _measure(self) -> None:
        """Second pass: mean and mean norm of the training rows, in float64."""
        total, norm, square, n = None, 0.0, 0.0, self.counts.train
        for number, index in enumerate(self._train):
            for part in index.split(1 << 16):
                rows = self.reader.read(number)["acts"][part].double()
                total = rows.sum(dim=0) if total is None else total + rows.sum(dim=0)
                norm += float(rows.norm(dim=1).sum())
                square += float(rows.square().sum())
        assert total is not None
        self.mean = total / n
        self.mean_norm = norm / n
        around = max(0.0, square / n - float(self.mean.square().sum()))
        self.gamma = float(self.mean.norm()) / max(around**0.5, 1e-12)


def _not_finite(reader: ShardReader, number: int, row: int, shard: dict[str, Tensor]) -> StageError:
    where = f"{reader.folder / reader.entries[number].name}, row {row}"
    return StageError(
        f"activations are not finite: {where}",
        why=f"NaN or infinity at window {int(shard['window'][row])}, position {int(shard['position'][row])}",
        fix="harvest again with --dtype float32 and --force",
        where=where,
        code="not-finite",
    )
