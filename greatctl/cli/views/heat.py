"""Heat in a terminal: a strip over tokens, a map over layers and positions.

Colour carries the value where there is colour; the digits carry it everywhere, so that a pipe or `NO_COLOR` loses
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderResult
from rich.style import Style
from rich.table import Table
from rich.text import Text

from ..text import visible

__all__ = ["HeatMap", "heat_strip", "passage", "passage_line", "sparkline"]

_WIDE, _LABEL = 5, 8  # characters a column and of the layer's label
_NAMES = 16  # most characters of a span's name
_STEPS = " ▁▂▃▄▅▆▇█"
_OPEN, _CLOSE = "«", "»"  # around the token that a passage is shown for


def heat_strip(tokens: Sequence[str], strength: Sequence[float]) -> Text:
    """A snippet with each token's background as strong as its strongest latent."""
    top = max((s for s in strength if s == s), default=0.0) or 1.0
    text = Text()
    for token, value in zip(tokens, strength, strict=True):
        text.append(visible(token), _warm(max(value, 0.0) / top))
    return text


def sparkline(values: Sequence[float], top: float | None = None) -> str:
    """Values >= 0 as bars of eight heights; one above 0 is never blank. `top` is full height (the largest)."""
    full = (max(values, default=0.0) if top is None else top) or 1.0
    return "".join(_STEPS[0] if value <= 0 else _STEPS[min(8, max(1, round(8 * value / full)))] for value in values)


def passage(pieces: Sequence[str], heat: Sequence[float], marked: int) -> Text:
    """Tokens with their heat; the one at `marked` in guillemets."""
    top = max(heat, default=0.0) or 1.0
    text = Text()
    for place, (piece, value) in enumerate(zip(pieces, heat, strict=True)):
        text.append_text(_piece(piece, value / top, marked=place == marked))
    return text


def passage_line(pieces: Sequence[str], heat: Sequence[float], marked: int, width: int) -> Text:
    """As `passage`, as many tokens around the marked one as fit into `width` cells, about two thirds before it."""
    top = max(heat, default=0.0) or 1.0
    shown = [_piece(p, v / top, marked=i == marked) for i, (p, v) in enumerate(zip(pieces, heat, strict=True))]
    sizes = [cell_len(text.plain) for text in shown]
    first, last = marked, marked + 1
    used = sizes[marked] if sizes else 0
    while first > 0 and used + sizes[first - 1] <= width * 2 // 3:
        first -= 1
        used += sizes[first]
    while last < len(sizes) and used + sizes[last] <= width:
        used += sizes[last]
        last += 1
    line = Text(no_wrap=True).join(shown[first:last])
    line.truncate(width, pad=True)
    return line


def _piece(piece: str, share: float, *, marked: bool) -> Text:
    """One token. A marked one keeps the spaces around it outside of its guillemets."""
    style = _warm(max(share, 0.0))
    if not marked:
        return Text(visible(piece), style)
    bare = piece.strip(" ")
    before, after = piece[: len(piece) - len(piece.lstrip(" "))], piece[len(piece.rstrip(" ")) :] if bare else ""
    return Text.assemble(visible(before), (f"{_OPEN}{visible(bare)}{_CLOSE}", style), visible(after))


@dataclass(frozen=True)
class HeatMap:
    """A map of shares in per cent, one row a layer; a cell that was not measured is a dot.

    Where the terminal is too narrow the last columns are shown, since the answer is read at the end; with `wrap`
    the map is broken into several, since one head is as good as another. `of` says what the columns are.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[float | None]]]

    wrap: bool = False
    of: str = "position"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        corner = 5 if self.of == "position" else 8 + len(self.of)
        label = max(_LABEL, 3 + corner, 3 + max((len(name) for name, _ in self.rows), default=0))
        if self.title:
            yield Text(visible(self.title), "bold")
        fit = max(1, (options.max_width - label) // self._wide)
        first = 0 if self.wrap else max(0, len(self.columns) - fit)
        for start in range(first, len(self.columns), fit):
            yield self._part(start, start + fit)
        if first:
            yield Text(
                f"  (the first {first} of {len(self.columns)} {self.of}s do not fit; they are in cells.parquet)", "dim"
            )

    @property
    def _wide(self) -> int:
        """Characters a column: names of spans need more than numbers."""
        longest = max(map(len, self.columns), default=0) if self.of == "span" else 0
        return min(max(_WIDE, 1 + longest), _NAMES)

    def _part(self, start: int, end: int) -> Table:
        """Some of the columns."""
        view = Table(
            box=box.SIMPLE_HEAD,
            padding=(0, 0),
        )
        corner = "layer" if self.of == "position" else f"layer / {self.of}"
        view.add_column(corner, justify="right", style="dim", no_wrap=True)
        for column in self.columns[start:end]:
            name = "\n".join(map(visible, column.split("\n")))
            view.add_column(name, justify="right", width=self._wide - 1, no_wrap=True)
        for label, values in self.rows:
            view.add_row(label, *(_cell(value) for value in values[start:end]))
        return view


def _cell(value: float | None) -> Text:
    if value is None or value != value:
        return Text("·", "dim")
    return Text(f"{round(100 * value) + 0:4d}", _warm(value) if value >= 0 else _cold(-value))


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
