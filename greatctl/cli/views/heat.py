"""Heat in a terminal: a strip over tokens, a map over layers and positions.

Colour carries the value where there is colour; the digits carry it everywhere, so that a pipe or `NO_COLOR` loses
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderResult
from rich.style import Style
from rich.table import Table
from rich.text import Text

from ..text import visible

__all__ = ["HeatMap", "heat_strip"]

_WIDE, _LABEL = 5, 8  # characters a column and of the layer's label


def heat_strip(tokens: Sequence[str], strength: Sequence[float]) -> Text:
    """A snippet with each token's background as strong as its strongest latent."""
    top = max((s for s in strength if s == s), default=0.0) or 1.0
    text = Text()
    for token, value in zip(tokens, strength, strict=True):
        text.append(visible(token), _warm(max(value, 0.0) / top))
    return text


@dataclass(frozen=True)
class HeatMap:
    """A map of shares in per cent, one row a layer; a cell that was not measured is a dot.

    Where the terminal is too narrow the last columns are shown, since the answer is read at the end.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[float | None]]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        fit = max(1, (options.max_width - _LABEL) // _WIDE)
        first = max(0, len(self.columns) - fit)
        view = Table(
            box=box.SIMPLE_HEAD, title=visible(self.title), title_justify="left", title_style="bold", padding=(0, 0)
        )
        view.add_column("layer", justify="right", style="dim", no_wrap=True)
        for column in self.columns[first:]:
            name = "\n".join(map(visible, column.split("\n")))
            view.add_column(name, justify="right", width=_WIDE - 1, no_wrap=True)
        for label, values in self.rows:
            view.add_row(label, *(_cell(value) for value in values[first:]))
        yield view
        if first:
            yield Text(
                f"  (the first {first} of {len(self.columns)} positions do not fit; they are in cells.parquet)", "dim"
            )


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
