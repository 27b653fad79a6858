"""One latent as a page in the terminal, at eighty columns.

Every word that comes from books, models or labels is shown literally. Colour marks the heat; the token that a passage
is shown for stands in guillemets, so that a pipe or `NO_COLOR` loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..text import literal, paragraphs
from .heat import passage, passage_line, sparkline
from .labels import label_lines
from .table import Flow, facts, number

__all__ = ["render_latent"]

_TOP, _NEAR, _UNITS, _WORKS = 5, 3, 12, 3
_BAR, _SOURCE = 15, 20  # characters of an interval, and of a source's id
_LOWEST = -10  # the histogram's first bin begins at 2 to the power of this, and bins are half octaves
Row = Mapping


def render_latent(page: Mapping, headline: str | None) -> RenderableType:
    """The page of `greatctl.features.page.latent_page`, with what was decided about it on top."""
    title = f"latent {page['latent']}: fires on {page['density']:.2%} of the tokens, at most {number(page['max'])}"
    parts: list[RenderableType] = [literal(title, "bold"), *label_lines(page.get("label"))]
    parts.append(paragraphs(headline or ("no hypothesis" if page["fired"] else "it never fires"), "italic"))
    for row in page["contrasts"][1:]:
        parts.append(paragraphs(f"{row['concept']}: {row['verdict']}", "italic"))
    parts += ["", facts(_summary(page))]
    parts += _passages("Strongest passages", page["examples"][:_TOP])
    parts += _lines(
        "Across its range, from the top down (tenth of the range, activation)",
        [(f"{row['decile']:>2}/10 {number(row['activation']):>6}", row) for row in _one_a_decile(page["deciles"])],
    )
    parts += _lines(
        "Near misses: silent, though the model's state leans its way (cosine)",
        [(f"{number(row['cosine']):>12}", row) for row in page["near"][:_NEAR]],
    )
    parts += _profile(page["units"])
    parts += _along(page["along"])
    return Group(*parts)


def _summary(page: Mapping) -> list[tuple[str, object]]:
    """Names and values, those that are known."""
    rows: list[tuple[str, object]] = [
        ("activation", _histogram(page["histogram"])),
        ("mean", f"{number(page['mean'])} over all tokens, {number(page['mean_when_firing'])} where it fires"),
        ("fires on", Flow([repr(token) for token in page["top_tokens"]])),
        ("raises", _tokens(page["top_logits"])),
        ("lowers", _tokens(page["bottom_logits"])),
    ]
    if page["logit_kurtosis"] is not None:
        rows.append(("logits", f"excess kurtosis {page['logit_kurtosis']:.2f}, skew {page['logit_skew']:+.2f}"))
    rows.append(("writes alike", _pairs(page["neighbours"], "cosine")))
    rows.append(("fires with", _pairs(page["cofiring"], "jaccard")))
    if page["token_share"] is not None:
        at_least = "" if page["token_ids_apart"] > 0.999 else "at least "
        by_token = f"the token alone {at_least}{page['token_share']:.0%}"
        rows.append(("explained by", f"{by_token}, the position {page['position_share']:.0%} of its variance"))
    return [(name, value) for name, value in rows if (value.items if isinstance(value, Flow) else value)]


def _tokens(rows: Sequence[Row]) -> Flow:
    return Flow([repr(row["token"]) for row in rows])


def _pairs(rows: Sequence[Row], name: str) -> Flow:
    words = [f"{row['latent']} ({row[name]:.2f})" for row in rows]
    return Flow([f"by {name} {words[0]}", *words[1:]] if words else [])


def _histogram(counts: Sequence[int]) -> str:
    """A line over the bins that are used, as high as the logarithm of their tokens."""
    from math import log1p

    used = [i for i, count in enumerate(counts) if count]
    if not used:
        return ""
    first, last = used[0], used[-1]
    edges = (2 ** (_LOWEST + i / 2) for i in (first, last + 1))
    low, high = (number(float(edge)) for edge in edges)
    return f"{low} {sparkline([log1p(c) for c in counts[first : last + 1]])} {high}  (tokens, log)"


def _passages(title: str, rows: Sequence[Row]) -> list[RenderableType]:
    """Whole passages, each with where it stands."""
    parts: list[RenderableType] = ["", literal(title, "bold")] if rows else []
    for row in rows:
        year = f", {row['year']}" if row["year"] else ""
        where = f"{row['author']}, {row['work']}{year} · {row['source_id']} {row['char_start']}-{row['char_end']}"
        parts.append(_numbered(number(row["activation"]), where))
        parts.append(Padding(passage(row["pieces"], row["heat"], row["marked"]), (0, 0, 0, 2)))
    return parts


def _numbered(activation: str, where: str) -> Table:
    """A source whose lines all begin behind the activation."""
    view = Table.grid(padding=(0, 2))
    view.add_row(literal(activation, "dim"), literal(where, "dim"))
    return view


@dataclass(frozen=True)
class _Line:
    """A passage cut to the width of the terminal, with a label before and its source behind."""

    label: str
    row: Row

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        source = literal(f"  {self.row['source_id']}", "dim")
        source.truncate(_SOURCE, overflow="ellipsis")
        line = Text(f"{self.label}  ")
        room = max(20, options.max_width - line.cell_len - _SOURCE)
        line.append_text(passage_line(self.row["pieces"], self.row["heat"], self.row["marked"], room))
        line.append_text(source)
        line.truncate(options.max_width)
        yield line


def _lines(title: str, rows: Sequence[tuple[str, Row]]) -> list[RenderableType]:
    return ["", literal(title, "bold"), *(_Line(label, row) for label, row in rows)] if rows else []


def _one_a_decile(rows: Sequence[Row]) -> list[Row]:
    """The first passage of each decile."""
    first: dict[int, Row] = {}
    for row in rows:
        first.setdefault(row["decile"], row)
    return list(first.values())


def _profile(units: Sequence[Row]) -> list[RenderableType]:
    """Mean activation of the strongest units, with intervals."""
    if not units:
        return []
    shown = units[:_UNITS]
    top = max((row["high"] or row["mean"] for row in shown), default=0.0) or 1.0
    title = f"Mean activation, {len(shown)} strongest of {len(units)}, with 95 % t intervals over works"
    parts: list[RenderableType] = ["", literal(title, "bold")]
    parts.append(literal(f"{'':19} {'role':9} {'mean':>7} {'from':>8} {'to':>8}  {'':{_BAR}} density", "dim"))
    parts += [_unit(row, top) for row in shown]
    if any(row["interval"] == "stretches" and row["low"] is not None for row in shown):
        parts.append(literal("* over the stretches of the only work", "dim"))
    return parts


def _unit(row: Row, top: float) -> Text:
    """A unit as a line of 79 cells."""
    name = literal(row["unit"])
    name.truncate(19, overflow="ellipsis", pad=True)
    mean, low, high = ("–" if row[end] is None else f"{row[end]:.2g}" for end in ("mean", "low", "high"))
    star = "*" if row["interval"] == "stretches" and row["low"] is not None else " "
    rest = f" {row['role']:9} {mean:>7} {low:>8} {high:>8}{star} {_bar(row, top)} {row['density']:>7.2%}"
    return name.append_text(literal(rest))


def _bar(row: Row, top: float) -> str:
    """The interval as a line and the mean as a dot, from 0 to `top`."""

    def place(value: float) -> int:
        return min(_BAR - 1, max(0, round(value / top * (_BAR - 1))))

    cells = [" "] * _BAR
    if row["low"] is not None:
        for i in range(place(row["low"]), place(row["high"]) + 1):
            cells[i] = "─"
    cells[place(row["mean"])] = "●"
    return "".join(cells)


def _along(rows: Sequence[Row]) -> list[RenderableType]:
    """The works with the highest stretches, from beginning to end."""
    top = max((max(row["mean"], default=0.0) for row in rows[:_WORKS]), default=0.0)
    if not top:
        return []
    lines = [(row["source_id"] or "", sparkline(row["mean"], top)) for row in rows[:_WORKS]]
    return ["", literal("Along the works, from beginning to end", "bold"), facts(lines)]
