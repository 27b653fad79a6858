"""A running stage as seen on stderr: a bar that knows the time left on a terminal, a line every half minute in a log.

While something is trained the last few points of its curve stand above the bar; in a log they are part of the line.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..events import Event
from ..stages.context import STAGES
from .output import hanging, stderr
from .text import literal, visible

__all__ = ["Display"]

_EVERY_SECONDS = 30.0
_KNOWN_AFTER = 0.5  # seconds
_POINTS = 5
_SPEAKERS = (*STAGES, "controls", "steer")
_COLUMN = 11
_TRAINING = "train"  # the task that a curve belongs to
_FIGURES = {
    "loss": ("loss", "{:.4g}"),
    "explained_variance": ("explained variance", "{:.3f}"),
    "l0": ("L0", "{:.1f}"),
    "dead_fraction": ("dead", "{:.1%}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
}


class _Curve:
    """The last points of a training curve, with the speed between them."""

    def __init__(self) -> None:
        self.points: deque[dict[str, float]] = deque(maxlen=_POINTS)
        self._name, self._several = "", False
        self._first: tuple[float, float] | None = None

    def add(self, name: str, data: dict[str, float]) -> None:
        """One more point of what is called `name`; the speed counts from the first that was seen, so that a resumed run
        does not fly.
        """
        self._several |= bool(self._name) and name != self._name
        self._name = name
        now, tokens = time.monotonic(), data.get("tokens")
        if tokens is not None:
            self._first = self._first or (now, tokens)
            seconds = now - self._first[0]
            data["tokens_per_second"] = (tokens - self._first[1]) / seconds if seconds > 0.2 else 0.0
        self.points.append(data)

    def reset(self) -> None:
        """Forget a curve that is complete."""
        self.points.clear()
        self._name, self._several = "", False
        self._first = None

    def words(self) -> str:
        """The newest point as words for a log."""
        if not self.points:
            return ""
        newest, of = self.points[-1], f" of {self._name}" if self._several else ""
        return "".join(
            f", {name}{of if key == 'loss' else ''} {form.format(newest[key])}"
            for key, (name, form) in _FIGURES.items()
            if newest.get(key)
        )

    def table(self) -> Table:
        """The points as a table of at most 80 columns."""
        table = Table(box=None, padding=(0, 2, 0, 0))
        for name in ("step", *(name for name, _ in _FIGURES.values())):
            table.add_column(name, justify="right", style="dim", header_style="dim")
        for point in self.points:
            cells = (form.format(point[key]) if key in point else "" for key, (_, form) in _FIGURES.items())
            table.add_row(f"{point['step']:,.0f}", *cells, style="none" if point is self.points[-1] else "dim")
        return table


class _Board(Progress):
    """Bars, and above them the training curve's last points."""

    def __init__(self, curve: _Curve, *columns: ProgressColumn, console: Console) -> None:
        self.curve = curve  # first: the base class draws itself while it is made
        super().__init__(*columns, console=console, transient=True)

    def get_renderables(self) -> Iterable[RenderableType]:
        """The table where there is one, then the bars."""
        if self.curve.points:
            yield self.curve.table()
        yield self.make_tasks_table(self.tasks)


class Display:
    """Listens to a run's events and shows them on stderr. Use as a context manager; `display(event)` is an `Emit`."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._console = stderr()
        self._bars = not quiet and self._console.is_terminal and not self._console.is_dumb_terminal
        self._progress: Progress | None = None
        self._curve = _Curve()
        self._tasks: dict[tuple[str, str], TaskID] = {}
        self._last_line = time.monotonic()
        self._speaker = ""
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
        elif event.kind == "metric":
            self._curve.add(event.message, {k: float(v) for k, v in event.data.items() if isinstance(v, int | float)})
        elif event.kind in ("notice", "skipped"):
            self._say(event.message)
        elif event.kind == "finished":
            self._clear()

    def _say(self, message: str) -> None:
        """A notice. On a terminal who speaks stands in a column of its own, and only when that changes."""
        who, colon, words = message.partition(": ")
        if not self._console.is_terminal or not colon or who not in _SPEAKERS:
            self._speaker = ""
            self._console.print(literal(message, "dim"))
            return
        name = "" if who == self._speaker else who
        self._speaker = who
        self._console.print(hanging(literal(f"{name:<{_COLUMN}}", "bold"), literal(words, "dim"), self._console))

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
            self._progress = _Board(self._curve, *columns, console=self._console)
            self._progress.start()
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(visible(key[1]), total=total or None, completed=already, rate="")
        speed = self._speed(key, done, already)
        rate = _rate(speed, unit)
        self._progress.update(self._tasks[key], completed=done, total=total or None, rate=rate)
        if total and done >= total:
            self._progress.remove_task(self._tasks.pop(key))
            self._began.pop(key, None)
            if key[1] == _TRAINING:
                self._curve.reset()

    def _line(self, key: tuple[str, str], done: int, total: int, already: int, unit: str) -> None:
        speed = self._speed(key, done, already)
        words = self._curve.words() if key[1] == _TRAINING else ""
        if total and done >= total:
            self._began.pop(key, None)  # what comes under the same name is another task
            if key[1] == _TRAINING:
                self._curve.reset()
        now = time.monotonic()
        if now - self._last_line < _EVERY_SECONDS:
            return
        self._last_line = now
        amount = f"{done:,}" + (f" of {total:,}" if total else "") + (f" {unit}" if unit else "")
        rate = f", {_rate(speed, unit)}" if speed and unit else ""
        eta = f", {_left((total - done) / speed)} left" if speed and total else ""
        what = ": ".join(dict.fromkeys(key))  # a stage whose one task is called as it is is not named twice
        self._console.print(literal(f"{what}: {amount}{rate}{words}{eta}"))

    def _speed(self, key: tuple[str, str], done: int, already: int) -> float:
        """Units a second since the first event; 0 in the first half second, in which it would be a guess."""
        began, first = self._began.setdefault(key, (time.monotonic(), max(already, 0)))
        seconds = time.monotonic() - began
        return 0.0 if seconds < _KNOWN_AFTER else max(done - first, 0) / seconds

    def _clear(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            self._tasks.clear()
        self._curve.reset()
        self._began.clear()


def _rate(speed: float, unit: str) -> str:
    """`1,234 tokens/s`, `0.21 shards/s`; nothing where it is unknown."""
    if not speed or not unit:
        return ""
    return f"{speed:,.0f} {unit}/s" if speed >= 10 else f"{speed:.2g} {unit}/s"


def _left(seconds: float) -> str:
    """A time that is still to come: `45 s`, `12 min`, `3 h 05 min`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"
