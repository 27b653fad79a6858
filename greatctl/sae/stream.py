"""Training rows straight from the model: nothing is stored, each row is made when it is needed.

Windows come in a new order each epoch and are harvested in chunks of half a buffer. A chunk does not leave at once:
its rows are dealt at random into three shares, of which one is served with this chunk, one with the next, one with
the one after. So the buffer is refilled at half, each row comes exactly once an epoch, and a batch mixes the windows
of three chunks. How well is measured and printed. Where everything fits the buffer there is one chunk, and the
shuffle is perfect.

What the buffer holds follows from (seed, epoch, number of the chunk) alone. A run that was stopped harvests at most
three chunks again and goes on with the same batches.

The input's statistics come from a sample of windows spread over the corpus, at least 100,000 rows or all there are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..events import Run
from .mixing import measured, perfect
from .rows import Batch, Counts, Cursor, Moments, generator, nothing_left, outlying

__all__ = ["BUFFER_BYTES", "BUFFER_ROWS", "Harvested", "StreamRows", "Windows"]

BUFFER_ROWS, BUFFER_BYTES = 1 << 19, 4 << 30
SAMPLE_ROWS = 100_000
HELD_OUT_ROWS = 1 << 15
_HELD_OUT_SPREAD = 8  # times the held-out rows are harvested and thinned, so that more documents are among them
_SHARES = 3
_PART = 1 << 16


@dataclass(frozen=True)
class Harvested:
    """Rows of some windows: acts [n, d_in] and target [n, d_out] (or None) as a harvest would store them, window [n]
    int64, ordinary [n] bool (False for special tokens)."""

    acts: Tensor
    target: Tensor | None
    window: Tensor
    ordinary: Tensor

    def chosen(self, index: Tensor) -> Harvested:
        """Some of the rows."""
        target = None if self.target is None else self.target[index]
        return Harvested(self.acts[index], target, self.window[index], self.ordinary[index])


@dataclass(frozen=True)
class Windows:
    """The windows of a tokens artifact. All [n_windows]: usable int64, its ordinary tokens; held_out bool; work
    int64, the number of its document. `rows`: tokens in all, BOS included."""

    usable: Tensor
    held_out: Tensor
    work: Tensor
    rows: int


class StreamRows:
    """The usable rows of windows that are harvested on the way.

    Args:
        harvest: window numbers [m] (ascending) -> their rows; the same windows give the same bits.
        windows: what is known about them before.
        buffer_rows: rows held at once.
        run: hears how well the rows are mixed.

    Attributes: as `ActivationRows`; `counts` extrapolates the outliers of the sample.

    Raises:
        StageError: no training row is left.
    """

    def __init__(self, harvest: Callable[[Tensor], Harvested], windows: Windows, *, buffer_rows: int, run: Run) -> None:
        self._harvest, self._windows, self._run = harvest, windows, run
        self._train = (~windows.held_out & (windows.usable > 0)).nonzero().squeeze(1)
        ordinary, total = int(windows.usable.sum()), int(windows.usable[self._train].sum())
        if not ordinary:
            raise nothing_left(windows.rows)
        Counts(windows.rows, windows.rows - ordinary, 0, ordinary - total, total).checked()
        chunk = max(buffer_rows // 2, int(windows.usable.max()))
        self.chunks = 1 if total <= buffer_rows else max(2, total // chunk)
        self._shares: dict[tuple[int, int, int], dict[int, Harvested]] = {}  # (seed, epoch, chunk) -> refill -> rows
        self._whole: Harvested | None = None
        self._held: Harvested | None = None
        self._mixing: dict[str, object] = {}
        self._limit, self._target_limit = float("inf"), float("inf")
        self._measure(total)

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self.mean.shape[0]

    @property
    def d_out(self) -> int:
        """Width of what is to be reconstructed."""
        return self.d_in if self.target_mean is None else self.target_mean.shape[0]

    def steps(self, seed: int, batch_size: int, epochs: int) -> int:
        """Batches in so many epochs, as far as outliers let it be known."""
        return sum(_batches(n, batch_size) for epoch in range(epochs) for n in self._expected(self._order(seed, epoch)))

    def stream(self, seed: int, batch_size: int, start: Cursor) -> Iterator[Batch]:
        """Endless batches from `start` on; see `ActivationRows.stream`. A cursor's block is a refill of the buffer."""
        for epoch in itertools.count(start.epoch):
            order = self._order(seed, epoch)
            for refill in range(start.block if epoch == start.epoch else 0, self._refills):
                first = start.batch if (epoch, refill) == (start.epoch, start.block) else 0
                rows = self._refilled(seed, epoch, refill, order)
                n = rows.window.numel()
                places = torch.randperm(n, generator=generator(seed, "rows", epoch, refill))
                total = _batches(n, batch_size)
                batches = [places[b * n // total : (b + 1) * n // total] for b in range(total)]
                if not self._mixing and refill == self._refills // 2:  # where the buffer is full, if it ever is
                    self._tell(rows.window, batches)
                for batch in range(first, total):
                    chosen = batches[batch]
                    target = None if rows.target is None else rows.target[chosen]
                    yield Cursor(epoch, refill, batch + 1), rows.acts[chosen], target
                del rows  # before the next refill is made

    def held_out(self) -> Tensor:
        """Held-out rows float32 [n, d_in], harvested at the first call."""
        return self._held_rows().acts.float()

    def held_out_target(self) -> Tensor | None:
        """Their targets float32 [n, d_out]; None without a target."""
        target = self._held_rows().target
        return None if target is None else target.float()

    def held_out_windows(self) -> Tensor:
        """Their window numbers [n] int64."""
        return self._held_rows().window

    def state(self) -> dict[str, object]:
        """How well the rows were mixed, once it has been measured."""
        return {"mixing": self._mixing} if self._mixing else {}

    def restore(self, state: dict) -> None:
        """Go on from `state`."""
        self._mixing = state.get("mixing", {})

    def release(self) -> None:
        """Give the buffer and the model back (the held-out rows stay)."""
        self._held_rows()
        self._shares, self._whole = {}, None
        self._harvest = _released

    @property
    def _refills(self) -> int:
        return 1 if self.chunks == 1 else self.chunks + _SHARES - 1

    def _measure(self, total: int) -> None:
        """Norms and means of a sample; all rows where there is one chunk, which is then kept."""
        every = 1 if self.chunks == 1 else max(1, total // SAMPLE_ROWS)
        sample = self._harvest(self._train[::every])
        inside, self.median_norm = outlying(_norms(sample.acts), sample.ordinary)
        self._limit = 10.0 * self.median_norm
        if sample.target is not None:
            near, median = outlying(_norms(sample.target), sample.ordinary)
            self._target_limit, inside = 10.0 * median, inside & near
        kept = sample.chosen((inside & sample.ordinary).nonzero().squeeze(1))
        self._whole = kept if self.chunks == 1 else None
        sums, target_sums = Moments(), Moments()
        for part in kept.acts.split(_PART):
            sums.add(part)
        for part in () if kept.target is None else kept.target.split(_PART):
            target_sums.add(part)
        self.mean, self.mean_norm, self.gamma = sums.mean, sums.mean_norm, sums.gamma
        self.target_mean: Tensor | None = None if kept.target is None else target_sums.mean
        self.target_mean_norm: float | None = None if kept.target is None else target_sums.mean_norm
        self._share_inside = kept.window.numel() / int(sample.ordinary.sum())
        self.counts = self._counted(total)

    def _counted(self, total: int) -> Counts:
        ordinary = int(self._windows.usable.sum())
        held = round((ordinary - total) * self._share_inside)
        train = round(total * self._share_inside)
        return Counts(self._windows.rows, self._windows.rows - ordinary, ordinary - held - train, held, train).checked()

    def _order(self, seed: int, epoch: int) -> list[Tensor]:
        """The windows of each chunk of an epoch, ascending within a chunk."""
        if self.chunks == 1:
            return [self._train]
        order = self._train[torch.randperm(self._train.numel(), generator=generator(seed, "windows", epoch))]
        ends = self._windows.usable[order].cumsum(dim=0)
        number = ((ends - 1) * self.chunks // ends[-1]).clamp_max(self.chunks - 1)
        return [order[number == chunk].sort().values for chunk in range(self.chunks)]

    def _expected(self, order: list[Tensor]) -> list[int]:
        """Rows of each refill of an epoch."""
        sizes = [round(int(self._windows.usable[chunk].sum()) * self._share_inside) for chunk in order]
        if self.chunks == 1:
            return sizes
        return [sum(sizes[c] for c in self._sources(refill)) // _SHARES for refill in range(self._refills)]

    def _sources(self, refill: int) -> range:
        """The chunks that a refill serves from."""
        return range(max(0, refill - _SHARES + 1), min(refill, self.chunks - 1) + 1)

    def _refilled(self, seed: int, epoch: int, refill: int, order: list[Tensor]) -> Harvested:
        """The rows that are served before the next refill."""
        if self.chunks == 1:
            self._whole = self._whole if self._whole is not None else self._usable(self._harvest(order[0]))
            return self._whole
        wanted = {(seed, epoch, chunk): order[chunk] for chunk in self._sources(refill)}
        self._shares = {key: shares for key, shares in self._shares.items() if key in wanted and refill in shares}
        for key, windows in wanted.items():
            if key not in self._shares:
                self._shares[key] = self._dealt(key, refill, windows)
        return _joined([self._shares[key].pop(refill) for key in wanted])  # what is served is not held

    def _dealt(self, key: tuple[int, int, int], refill: int, windows: Tensor) -> dict[int, Harvested]:
        """A chunk's rows in three random shares, by the refills that serve them, from `refill` on."""
        seed, epoch, chunk = key
        rows = self._usable(self._harvest(windows))
        places = torch.randperm(rows.window.numel(), generator=generator(seed, "shares", epoch, chunk))
        shares = enumerate(places.tensor_split(_SHARES), start=chunk)
        return {serves: rows.chosen(share) for serves, share in shares if serves >= refill}

    def _usable(self, rows: Harvested) -> Harvested:
        inside = rows.ordinary & (_norms(rows.acts) <= self._limit)
        if rows.target is not None:
            inside &= _norms(rows.target) <= self._target_limit
        return rows.chosen(inside.nonzero().squeeze(1))

    def _held_rows(self) -> Harvested:
        if self._held is None:
            windows = (self._windows.held_out & (self._windows.usable > 0)).nonzero().squeeze(1)
            total = int(self._windows.usable[windows].sum())
            windows = windows[:: max(1, total // (_HELD_OUT_SPREAD * HELD_OUT_ROWS))]
            if not windows.numel():
                none = torch.zeros(0, dtype=torch.int64)
                wide = None if self.target_mean is None else torch.zeros(0, self.d_out)
                return Harvested(torch.zeros(0, self.d_in), wide, none, none.bool())
            rows = self._usable(self._harvest(windows))
            step = max(1, -(-rows.window.numel() // HELD_OUT_ROWS))
            self._held = rows.chosen(torch.arange(0, rows.window.numel(), step))
        return self._held

    def _tell(self, window: Tensor, batches: list[Tensor]) -> None:
        found = measured((window[batch] for batch in batches), self._windows.work)
        rows_of = torch.where(self._windows.held_out, 0, self._windows.usable)
        best = perfect(rows_of, self._windows.work, batches[0].numel())
        self._mixing = {"batch": batches[0].numel(), "measured": asdict(found), "perfect": asdict(best)}
        self._run.notice(
            f"train: a batch of {batches[0].numel():,} rows mixes {found.windows:,.0f} windows of {found.works:,.0f} "
            f"works, entropy {found.entropy:.2f} nats; a perfect shuffle would give {best.windows:,.0f} of "
            f"{best.works:,.0f}, {best.entropy:.2f}"
        )


def _norms(rows: Tensor) -> Tensor:
    return torch.cat([part.float().norm(dim=1) for part in rows.split(_PART)])


def _joined(parts: list[Harvested]) -> Harvested:
    targets = [part.target for part in parts if part.target is not None]
    return Harvested(
        torch.cat([part.acts for part in parts]),
        torch.cat(targets) if targets else None,
        torch.cat([part.window for part in parts]),
        torch.cat([part.ordinary for part in parts]),
    )


def _batches(rows: int, batch_size: int) -> int:
    return max(1, round(rows / batch_size))


def _released(windows: Tensor) -> Harvested:
    raise RuntimeError("the rows were released; nothing is harvested any more")
