"""A running stage as seen on stderr: a bar that knows the time left on a terminal, a line every quarter minute in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ..events import Event
from .output import stderr
from .text import literal, visible

__all__ = ["Display"]

_EVERY_SECONDS = 15.0


class Display:
    """Listens to a run's events and shows them on stderr. Use as a context manager; `display(event)` is an `Emit`."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._console = stderr()
        self._bars = not quiet and self._console.is_terminal and not self._console.is_dumb_terminal
        self._progress: Progress | None = None
        self._tasks: dict[tuple[str, str], TaskID] = {}
        self._last_line = time.monotonic()
        self._began: dict[tuple[str, str], tuple[float, int]] = {}

    def __enter__(self) -> Display:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._clear()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if self._quiet or sys.stderr is None:
            return
        if event.kind == "progress":
            self._advance(event)
        elif event.kind in ("notice", "skipped"):
            self._console.print(literal(f"{event.message}", "dim"))
        elif event.kind == "finished":
            self._clear()

    def _advance(self, event: Event) -> None:
        data = event.data
        done, total, already = (int(data[k]) for k in ("done", "total", "already"))  # type: ignore[call-overload]
        key = (event.stage, event.message)
        if self._bars:
            self._bar(key, done, total, already, str(data["unit"]))
        else:
            self._line(key, done, total, already, str(data["unit"]))

    def _bar(self, key: tuple[str, str], done: int, total: int, already: int, unit: str) -> None:
        if self._progress is None:
            columns = (
                TextColumn("{task.description:<26.26}"),
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[rate]:>16}"),
                TimeRemainingColumn(compact=True),
            )
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._progress.start()
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(visible(key[1]), total=total or None, completed=already, rate="")
        self._progress.update(
            self._tasks[key], completed=done, total=total or None, rate=self._rate(key, done, already, unit)
        )
        if total and done >= total:
            self._progress.remove_task(self._tasks.pop(key))
            self._began.pop(key, None)

    def _line(self, key: tuple[str, str], done: int, total: int, already: int, unit: str) -> None:
        rate = self._rate(key, done, already, unit)
        now = time.monotonic()
        if now - self._last_line < _EVERY_SECONDS:
            return
        self._last_line = now
        began, first = self._began[key]
        speed = (done - first) / max(now - began, 1e-9)
        eta = f", {(total - done) / speed:.0f} s left" if total and speed > 0 else ""
        of = f" of {total:,}" if total else ""
        self._console.print(literal(f"{key[0]}: {key[1]}: {done:,}{of} {unit} {rate}{eta}"))

    def _rate(self, key: tuple[str, str], done: int, already: int, unit: str) -> str:
        began, first = self._began.setdefault(key, (time.monotonic(), max(already, 0)))
        seconds = time.monotonic() - began
        if seconds < 0.5 or done <= first:
            return ""
        return f"{(done - first) / seconds:,.0f} {unit}/s" if unit else ""

    def _clear(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            self._tasks.clear()
        self._began.clear()
