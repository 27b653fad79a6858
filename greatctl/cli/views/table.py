"""Tables that hold foreign text safely and look the same everywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from ..text import literal

__all__ = ["STATE_STYLE", "facts", "number", "size", "table"]

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
    """Two columns without lines: a name and a value."""
    view = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    view.add_column(style="dim", no_wrap=True)
    view.add_column(overflow="fold")
    for name, value in rows:
        view.add_row(literal(name), _cell(number(value)))
    return view


def _cell(value: object) -> Text:
    if isinstance(value, Text):
        return value
    text = number(value)
    return literal(text, STATE_STYLE.get(text, ""))
