"""One walk over the rows, for one trainer or for many.

Reading, shuffling and copying a batch cost the same for one SAE as for eight. So trainers on the same rows (the very
same object) are given each batch in turn, and know nothing of each other: each ends with the bits that it would have
alone. Trainers on several rows (other hook points) go in step, a batch of each at a time. Checkpoints are written for
all at common steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InterruptedRun, StageError
from .feed import feed
from .micro import memory_errors
from .rows import Batch, Cursor, Rows
from .step import quick_products
from .stopwatch import Stopwatch
from .stream import StreamRows

if TYPE_CHECKING:
    from .trainer import Trainer

__all__ = ["Walked", "walk"]


@dataclass
class Walked:
    """How a walk went.

    Attributes:
        seconds: of the whole walk, above 0.
        waited: seconds in which the device (or, on a CPU, the loop) waited for rows.
        steps: seconds of each trainer's own steps, in the order given.
        failures: number of a trainer -> how it diverged; the others went on.
    """

    seconds: float = 0.0
    waited: float = 0.0
    steps: list[float] = field(default_factory=list)
    failures: dict[int, StageError] = field(default_factory=dict)


def walk(trainers: Sequence[Trainer], failed: Callable[[int, StageError], None] | None = None) -> Walked:
    """Train all to their last steps.

    Args:
        trainers: on one device, at one step (or finished), with one batch size, shuffle and checkpoint interval.
        failed: told at once when one of several diverges: its number, and how.

    Raises:
        StageError: a single trainer diverged; the last good checkpoint stays. Of several, all diverged: the first's.
        ResourceError: memory ran out, and smaller parts of a batch did not help.
        InterruptedRun: a stop was requested; a checkpoint is written first.
    """
    return _Walk(trainers, failed or (lambda number, error: None)).go()


class _Lane:
    """Trainers on the same rows, and their batches on the device."""

    def __init__(self, trainers: Sequence[Trainer]) -> None:
        self.trainers, self.first = list(trainers), trainers[0]
        self._batches: Iterator[Batch] = iter(())

    def open(self, stack: ExitStack) -> None:
        """Begin at the trainers' next batch; `stack` ends it."""
        settings, rows = self.first.settings, self.first.rows
        stream = rows.stream(settings.order, settings.batch_size, self.first.cursor)
        self._batches = stack.enter_context(feed(stream, self.first.device))

    def next(self) -> Batch:
        """The next batch, as stored."""
        return next(self._batches)

    def scaled(self, batch: Batch) -> Batch:
        """A batch in float32, scaled."""
        cursor, rows, target = batch
        x = rows.float() * self.first.scale
        return cursor, x, None if target is None else target.float() * self.first.target_scale


class _Walk:
    def __init__(self, trainers: Sequence[Trainer], failed: Callable[[int, StageError], None]) -> None:
        self.failed = failed
        self.trainers, self.run, self.device = trainers, trainers[0].run, trainers[0].device
        self.active = [t for t in trainers if not t.finished]
        self.walked = Walked()
        self.waiting = Stopwatch(self.device)
        self.working = {id(t): Stopwatch(self.device) for t in trainers}
        self.step = self.saved = self.already = min((t.step for t in self.active), default=0)
        self.last = max(t.settings.steps for t in trainers)

    def go(self) -> Walked:
        began = time.monotonic()
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), memory_errors(), ExitStack() as stack:
            if not any(isinstance(t.rows, StreamRows) for t in self.trainers):  # a model that is being read beside us
                stack.enter_context(quick_products(self.device))  # must give the activations that it gives alone
            lanes = self._lanes()
            for lane in lanes:
                lane.open(stack)
            while self.active:
                lanes = [lane for lane in lanes if any(t in self.active for t in lane.trainers)]
                self._step(lanes)
        self.walked.waited = self.waiting.seconds()
        self.walked.steps = [self.working[id(t)].seconds() for t in self.trainers]
        self.walked.seconds = max(time.monotonic() - began, 1e-9)
        return self.walked

    def _lanes(self) -> list[_Lane]:
        by_rows: dict[int, tuple[Rows, list[Trainer]]] = {}
        for trainer in self.active:
            by_rows.setdefault(id(trainer.rows), (trainer.rows, []))[1].append(trainer)
        return [_Lane(trainers) for _, trainers in by_rows.values()]

    def _step(self, lanes: Sequence[_Lane]) -> None:
        try:
            with self.waiting:
                batches = [lane.next() for lane in lanes]
        except InterruptedRun:  # while rows were being harvested: this step has not begun
            self._save(self.active)
            raise
        for lane, batch in zip(lanes, batches, strict=True):
            cursor, x, target = lane.scaled(batch)
            for trainer in [t for t in lane.trainers if t in self.active]:
                self._guarded(trainer, lambda t, x=x, y=target, c=cursor: self._take(t, x, y, c))
        self.step += 1
        self.run.progress("train", self.step, self.last, "steps", already=self.already)
        ended = [t for t in self.active if t.finished]
        every = self.trainers[0].settings.checkpoint_every
        due = self.step - self.saved >= every and all(t.checkpoints.affordable for t in self.active)
        if due or self.run.stopping:
            self._save(self.active)
            self.saved = self.step
        elif ended:
            self._save(ended)
        self.active = [t for t in self.active if not t.finished]
        if due or ended or self.run.stopping:
            self.run.stop_here()

    def _take(self, trainer: Trainer, x: Tensor, target: Tensor | None, cursor: Cursor) -> None:
        with self.working[id(trainer)]:
            trainer.take(x, target, cursor)

    def _save(self, trainers: Sequence[Trainer]) -> None:
        for trainer in list(trainers):
            self._guarded(trainer, lambda t: t.save())

    def _guarded(self, trainer: Trainer, act: Callable[[Trainer], None]) -> None:
        """`act(trainer)`; one of several that diverges is left behind, and the others go on."""
        try:
            act(trainer)
        except StageError as error:
            if error.name != "diverged" or len(self.trainers) == 1:
                raise
            number = next(n for n, t in enumerate(self.trainers) if t is trainer)
            self.walked.failures[number] = error
            self.failed(number, error)
            self.active = [t for t in self.active if t is not trainer]
            if len(self.walked.failures) == len(self.trainers):
                raise next(iter(self.walked.failures.values())) from None
