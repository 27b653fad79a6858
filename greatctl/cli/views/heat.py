"""Heat in a terminal: a strip over tokens, a map over layers and positions.

Colour carries the value where there is colour; the digits carry it everywhere, so that a pipe or `NO_COLOR` loses
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.color import Color
from rich.style import Style
from rich.table import Table
from rich.text import Text

from ..text import visible

__all__ = ["heat_map", "heat_strip"]


def heat_strip(tokens: Sequence[str], strength: Sequence[float]) -> Text:
    """A snippet with each token's background as strong as its strongest latent."""
    top = max((s for s in strength if s == s), default=0.0) or 1.0
    text = Text()
    for token, value in zip(tokens, strength, strict=True):
        text.append(visible(token), _warm(max(value, 0.0) / top))
    return text


def heat_map(title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[float | None]]]) -> Table:
    """A map of normalised effects in per cent, one row a layer; a cell that was not measured is a dot."""
    view = Table(box=box.SIMPLE_HEAD, title=visible(title), title_justify="left", title_style="bold", padding=(0, 0))
    view.add_column("layer", justify="right", style="dim")
    for column in columns:
        view.add_column("\n".join(map(visible, column.split("\n"))), justify="right", min_width=4, no_wrap=True)
    for label, values in rows:
        view.add_row(label, *(_cell(value) for value in values))
    return view


def _cell(value: float | None) -> Text:
    if value is None or value != value:
        return Text("·", "dim")
    return Text(f"{100 * value:4.0f}", _warm(value) if value >= 0 else _cold(-value))


def _warm(share: float) -> Style:
    return _blend(share, (214, 96, 28))


def _cold(share: float) -> Style:
    return _blend(share, (56, 110, 196))


def _blend(share: float, full: tuple[int, int, int]) -> Style:
    share = min(max(share, 0.0), 1.0)
    if share < 0.05:
        return Style()
    red, green, blue = (int(255 + (c - 255) * share) for c in full)
    return Style(bgcolor=Color.from_rgb(red, green, blue), color=Color.from_rgb(0, 0, 0))
