"""What a run says while it runs.

A stage never prints. It emits events; the command line, a plugin or a test listens. `Run` is the small object that a
stage is handed: it speaks through it, and learns from it that a person asked it to stop.
Standard library only: this file is the ground floor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .errors import InterruptedRun

__all__ = ["Emit", "Event", "Run", "StopRequest", "silent"]


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened.

    Attributes:
        kind: `started`, `progress`, `metric`, `notice`, `skipped` or `finished`.
        stage: the stage that speaks.
        message: words for people; for `progress` the name of the task.
        data: `progress`: done, total (0 = unknown), unit, already (units done by an earlier run, not to be counted in the
            rate); `metric`: step and named values; `finished`: the summary.
    """

    kind: str
    stage: str
    message: str = ""
    data: Mapping[str, object] = field(default_factory=dict)


Emit = Callable[[Event], None]


class StopRequest:
    """Set by a signal handler, read by stages at their safe points."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def request(self, signal_number: int) -> None:
        """Ask the running stage to stop at its next safe point."""
        self.signal_number = signal_number


def silent(event: Event) -> None:
    """An `Emit` that says nothing."""


@dataclass(slots=True)
class Run:
    """A stage's voice and ear. `Run("train")` alone is a silent run that nobody stops."""

    stage: str
    emit: Emit = silent
    stop: StopRequest = field(default_factory=StopRequest)

    def notice(self, message: str) -> None:
        """Say one sentence that a person should read (stderr at the command line)."""
        self.emit(Event("notice", self.stage, message))

    def progress(self, task: str, done: int, total: int, unit: str = "", *, already: int = 0) -> None:
        """Report `done` of `total` units of `task`; `already` of them were done by an earlier, interrupted run."""
        data = {"done": done, "total": total, "unit": unit, "already": already}
        self.emit(Event("progress", self.stage, task, data))

    def metric(self, step: int, **values: float) -> None:
        """Report named numbers at a step (a training curve's point)."""
        self.emit(Event("metric", self.stage, "", {"step": step, **values}))

    @property
    def stopping(self) -> bool:
        """True once a person asked the run to stop."""
        return self.stop.signal_number is not None

    def stop_here(self) -> None:
        """Call at a safe point, after state is on disk: raises `InterruptedRun` when a stop was requested."""
        if self.stop.signal_number is not None:
            raise InterruptedRun(self.stop.signal_number)
