"""Activation shards as a shuffled, resumable stream of training batches.

Left out of training and of every metric: special tokens (BOS above all) and rows whose norm is above ten
times the median (attention sinks). Both are counted. What is held out is decided by window, so that no
document leaks across.

The order is a function of (seed, epoch, block) alone: a cursor of three numbers is all that a resume needs.
Where the rows fit the memory budget there is one block and the shuffle is an exact global permutation;
otherwise the shards are permuted and cut into blocks that fit, and each block is permuted. Each row comes
exactly once an epoch.

A transcoder reads one site and writes another: its rows come in pairs, from two folders of the same tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from ..errors import InputError, StageError
from ..store.shards import ShardReader
from .rows import Batch, Counts, Cursor, Moments, derive, generator, nothing_left, outlying

__all__ = ["ActivationRows", "Batch", "Counts", "Cursor", "derive", "generator"]

MEMORY_BUDGET = 2 * 2**30
HELD_OUT_ROWS = 1 << 15
_PART = 1 << 16  # rows turned into float32 or float64 at once

Pair = tuple[Tensor, Tensor | None]


class ActivationRows:
    """The usable rows of an activations folder.

    Args:
        reader: the shards (`acts` [rows, d_in], `window`, `position`, `token`).
        special_ids: token ids to leave out.
        held_out: [n_windows] bool, True for windows that training must not see.
        target: the shards of the site that a transcoder writes, of the same tokens in the same shards.
        budget: bytes of activations held in memory at once.
        ahead: read the next block in a thread while one is trained on; up to twice the budget is then held. The rows
            are the same.

    Attributes:
        counts: see `Counts`.
        median_norm: over all rows of ordinary tokens.
        mean: [d_in] float64, over the training rows; mean_norm likewise. `target_mean` [d_out] and
            `target_mean_norm` are None without a target.
        gamma: |mean| / standard deviation, which predicts dead latents when large.

    Raises:
        StageError: a row is not finite, or no training row is left.
        InputError: the target's rows are not those of the same tokens.
    """

    def __init__(
        self,
        reader: ShardReader,
        special_ids: Sequence[int],
        held_out: Tensor,
        *,
        target: ShardReader | None = None,
        budget: int = MEMORY_BUDGET,
        ahead: bool = False,
    ) -> None:
        self.reader, self.target, self.budget = reader, target, budget
        self._cached: tuple[tuple[int, ...], Pair] | None = None
        self._pool = ThreadPoolExecutor(1, "greatctl-block") if ahead else None
        self._coming: tuple[tuple[int, ...], Future[Pair]] | None = None
        self._row_bytes = 0
        self._divide(torch.tensor(sorted(special_ids), dtype=torch.int64), held_out)
        self._measure()

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self.mean.shape[0]

    @property
    def d_out(self) -> int:
        """Width of what is to be reconstructed."""
        return self.d_in if self.target_mean is None else self.target_mean.shape[0]

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

    def stream(self, seed: int, batch_size: int, start: Cursor) -> Iterator[Batch]:
        """Endless batches from `start` on: (cursor of the next batch, rows [about batch_size, d_in] as
        stored, their targets [about batch_size, d_out] or None).

        A block is cut into batches of equal size (to one row), the number nearest to what `batch_size` asks
        for.
        """
        for epoch in itertools.count(start.epoch):
            blocks = self.blocks(seed, epoch)
            for number, block in enumerate(blocks):
                here = (epoch, number)
                if here < (start.epoch, start.block):
                    continue
                first = start.batch if here == (start.epoch, start.block) else 0
                total = self._batches(block, batch_size)
                if first >= total:
                    continue
                rows, target = self._load(block)
                self._begin(blocks[number + 1] if number + 1 < len(blocks) else self.blocks(seed, epoch + 1)[0])
                n = rows.shape[0]
                order = torch.randperm(n, generator=generator(seed, "rows", epoch, number))
                for batch in range(first, total):
                    chosen = order[batch * n // total : (batch + 1) * n // total]
                    yield Cursor(epoch, number, batch + 1), rows[chosen], None if target is None else target[chosen]
                del rows, target

    def held_out(self, limit: int = HELD_OUT_ROWS) -> Tensor:
        """The held-out rows as float32 [n, d_in], evenly thinned to `limit` rows at most."""
        return self._held_from(self.reader, "acts", limit, self.d_in).float()

    def held_out_target(self, limit: int = HELD_OUT_ROWS) -> Tensor | None:
        """The targets [n, d_out] float32 of the rows of `held_out`; None without a target."""
        return None if self.target is None else self._held_from(self.target, "acts", limit, self.d_out).float()

    def held_out_windows(self, limit: int = HELD_OUT_ROWS) -> Tensor:
        """The window number [n] int64 of each row of `held_out`."""
        return self._held_from(self.reader, "window", limit, 0).long()

    def state(self) -> dict[str, object]:
        """What a checkpoint must hold of this besides the cursor: nothing."""
        return {}

    def restore(self, state: dict) -> None:
        """Go on from `state`."""

    def release(self) -> None:
        """Give the memory of the current block back."""
        self._cached = self._coming = None

    def _held_from(self, reader: ShardReader, name: str, limit: int, width: int) -> Tensor:
        step = max(1, -(-self.counts.held_out // limit))
        parts, offset = [], 0
        for number, index in enumerate(self._held):
            chosen = index[(-offset) % step :: step]
            offset += index.numel()
            if chosen.numel():
                parts.append(reader.read(number)[name][chosen])
        return torch.cat(parts) if parts else torch.zeros((0, width) if width else 0)

    def _batches(self, block: tuple[int, ...], batch_size: int) -> int:
        rows = sum(self._train[n].numel() for n in block)
        return max(1, round(rows / batch_size))

    def _load(self, block: tuple[int, ...]) -> Pair:
        if self._cached is not None and self._cached[0] == block:
            return self._cached[1]
        self._cached = None  # first, so that no block is held for nothing
        coming, self._coming = self._coming, None
        pair = coming[1].result() if coming is not None and coming[0] == block else self._read(block)
        self._cached = (block, pair)
        return pair

    def _begin(self, block: tuple[int, ...]) -> None:
        """Read this block behind the training, unless it is the one in memory."""
        if self._pool is not None and self._cached is not None and self._cached[0] != block:
            self._coming = (block, self._pool.submit(self._read, block))

    def _read(self, block: tuple[int, ...]) -> Pair:
        rows = self._gathered(self.reader, block)
        return rows, None if self.target is None else self._gathered(self.target, block)

    def _gathered(self, reader: ShardReader, block: tuple[int, ...]) -> Tensor:
        total = sum(self._train[n].numel() for n in block)
        rows, at = torch.empty(0), 0
        for number in block:
            part = reader.read(number)["acts"][self._train[number]]
            if not at:
                rows = torch.empty(total, part.shape[1], dtype=part.dtype)
            rows[at : at + part.shape[0]] = part
            at += part.shape[0]
        return rows

    def _divide(self, special: Tensor, held_out: Tensor) -> None:
        """First pass: norms, then the row numbers of each shard that are trained on or held out."""
        norms, target_norms, ordinary, held = [], [], [], []
        for number, shard in enumerate(self.reader):
            norms.append(_norms(self.reader, number, shard))
            ordinary.append(~torch.isin(shard["token"].long(), special))
            held.append(held_out[shard["window"].long()])
            self._row_bytes = shard["acts"].shape[1] * shard["acts"].element_size()
            if self.target is not None:
                target_norms.append(self._target_norms(number, shard))
        if not norms or not bool(torch.cat(ordinary).any()):
            raise nothing_left(self.reader.rows)
        usual = torch.cat(ordinary)
        inside, self.median_norm = outlying(torch.cat(norms), usual)
        if target_norms:
            inside &= outlying(torch.cat(target_norms), usual)[0]
        parts = inside.split([n.numel() for n in norms])
        self._train = [(o & i & ~h).nonzero().squeeze(1) for o, i, h in zip(ordinary, parts, held, strict=True)]
        self._held = [(o & i & h).nonzero().squeeze(1) for o, i, h in zip(ordinary, parts, held, strict=True)]
        self.counts = Counts(
            rows=usual.numel(),
            special=int((~usual).sum()),
            outliers=int((usual & ~inside).sum()),
            held_out=sum(h.numel() for h in self._held),
            train=sum(t.numel() for t in self._train),
        ).checked()

    def _target_norms(self, number: int, shard: dict[str, Tensor]) -> Tensor:
        """The norms of a target shard, which must hold the rows of `shard`."""
        assert self.target is not None
        other = self.target.read(number) if number < len(self.target.entries) else {}
        if any(name not in other or not torch.equal(other[name], shard[name]) for name in ("window", "position")):
            raise InputError(
                f"the activations of {self.reader.folder.name} and {self.target.folder.name} are no pair",
                why=f"shard {number} holds other rows in one than in the other",
                fix=f"run `greatctl harvest --hook-point {self.reader.folder.name} "
                f"--hook-point {self.target.folder.name} --force`",
                code="no-pair",
            )
        self._row_bytes += other["acts"].shape[1] * other["acts"].element_size()
        return _norms(self.target, number, other)

    def _measure(self) -> None:
        """Second pass: mean and mean norm of the training rows, in float64. Where they fit the memory they stay
        there, and no shard is read a third time.
        """
        blocks = self.blocks(0, 0)
        whole = len(blocks) == 1
        sums, target_sums = Moments(), Moments()
        for block in blocks if whole else ((n,) for n, index in enumerate(self._train) if index.numel()):
            rows, target = self._load(block)
            for part in rows.split(_PART):
                sums.add(part)
            for part in () if target is None else target.split(_PART):
                target_sums.add(part)
        if not whole:
            self.release()
        self.mean, self.mean_norm, self.gamma = sums.mean, sums.mean_norm, sums.gamma
        self.target_mean = None if self.target is None else target_sums.mean
        self.target_mean_norm = None if self.target is None else target_sums.mean_norm


def _norms(reader: ShardReader, number: int, shard: dict[str, Tensor]) -> Tensor:
    """The norm of each row [rows], float32.

    Raises:
        StageError: one is not finite.
    """
    norm = torch.cat([part.float().norm(dim=1) for part in shard["acts"].split(_PART)])
    if not bool(torch.isfinite(norm).all()):
        raise _not_finite(reader, number, int((~torch.isfinite(norm)).nonzero()[0]), shard)
    return norm


def _not_finite(reader: ShardReader, number: int, row: int, shard: dict[str, Tensor]) -> StageError:
    where = f"{reader.folder / reader.entries[number].name}, row {row}"
    return StageError(
        f"activations are not finite: {where}",
        why=f"NaN or infinity at window {int(shard['window'][row])}, position {int(shard['position'][row])}",
        fix="harvest again with --dtype float32 and --force",
        where=where,
        code="not-finite",
    )
