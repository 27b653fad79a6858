"""Tables that hold foreign text safely and look the same everywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ..text import literal

__all__ = ["STATE_STYLE", "Flow", "facts", "near", "number", "size", "table"]

STATE_STYLE = {
    "fetched": "green",
    "up-to-date": "green",
    "ok": "green",
    "loaded": "green",
    "supported": "bold green",
    "manual": "yellow",
    "changed": "yellow",
    "stale": "yellow",
    "warning": "yellow",
    "failed": "red",
    "damaged": "bold red",
}


def number(value: object) -> str:
    """A number as people write it; None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def size(count: int | None) -> str:
    """Bytes in the unit that fits."""
    if not count:
        return "–"
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{value:.0f} {unit}" if unit in ("B", "kB") else f"{value:.1f} {unit}"
        value /= 1000
    return ""


def near(path: object) -> str:
    """A path as seen from the current folder, where it lies below: shorter, and it can be copied all the same."""
    found, here = Path(str(path)), Path.cwd()
    return str(found.relative_to(here)) if found.is_absolute() and found.is_relative_to(here) else str(path)


@dataclass(frozen=True)
class Flow:
    """Items in lines as long as the room allows; no item is broken, whatever spaces it holds."""

    items: Sequence[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines, width = [""], options.max_width
        for index, item in enumerate(self.items):
            words = item + ("," if index + 1 < len(self.items) else "")
            if lines[-1] and cell_len(lines[-1]) + 1 + cell_len(words) > width:
                lines.append(words)
            else:
                lines[-1] += f" {words}" if lines[-1] else words
        yield literal_lines(lines)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        each = [cell_len(item) + 1 for item in self.items] or [0]
        return Measurement(max(each), sum(each) + len(each)).with_maximum(options.max_width)


def literal_lines(lines: Iterable[str]) -> Text:
    """Lines that stay lines."""
    return Text("\n").join(literal(line) for line in lines)


def table(
    headers: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[int] = (), title: str = ""
) -> Table:
    """A plain table; cells are shown literally, and a cell that is a known state gets its colour."""
    view = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title or None, title_justify="left", title_style="bold")
    for index, header in enumerate(headers):
        view.add_column(header, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        view.add_row(*(_cell(value) for value in row))
    return view


def facts(rows: Iterable[tuple[str, object]]) -> Table:
    """Two columns without lines: a name and a value (anything that `number` knows, a `Flow`, or a `Text`)."""
    view = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    view.add_column(style="dim", no_wrap=True)
    view.add_column(overflow="fold")
    for name, value in rows:
        view.add_row(literal(name), value if isinstance(value, Flow) else _cell(value))
    return view


def _cell(value: object) -> Text:
    if isinstance(value, Text):
        return value
    text = number(value)
    return literal(text, STATE_STYLE.get(text, ""))
