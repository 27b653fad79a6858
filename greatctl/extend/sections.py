"""Report sections of plugins: data in, checked data out. The report alone makes HTML, escaping each word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from ..errors import PluginError
from .hookspecs import Section

__all__ = ["MOST", "check_sections"]

MOST = 10_000
"""Points or cells of a chart: a page has a size."""

_CELLS = (str, int, float, bool, type(None))
_CHART = {"kind", "draw", "title", "words", "x", "y"}
_SHAPES = {"prose": {"kind", "text"}, "table": {"kind", "columns", "rows"}, "chart heat": _CHART | {"value", "cells"}}
_SHAPES |= dict.fromkeys(("chart bars", "chart lines", "chart points"), _CHART | {"series"})
_FORM = (
    "a block is {'kind': 'prose', 'text': …}, {'kind': 'table', 'columns': […], 'rows': […]} or {'kind': 'chart', "
    "'draw': 'bars', 'lines' or 'points', 'title', 'words', 'x', 'y', 'series'} ('heat' with 'value' and 'cells')"
)


def check_sections(given: object) -> list[Section]:
    """The sections of one plugin, held against the form that `hookspecs.report_sections` states.

    A number that is not finite becomes None, which the page shows as "not available".

    Raises:
        PluginError: naming the first thing that is off.
    """
    sections = _list(given, "report_sections gives a list of sections")
    for section in sections:
        if not isinstance(section, Mapping) or set(section) != {"title", "blocks"}:
            raise _wrong("a section is {'title': …, 'blocks': […]}", section)
        if not isinstance(section["title"], str):
            raise _wrong("a section's title is a string", section["title"])
        for block in _list(section["blocks"], "a section's blocks are a list"):
            _check_block(block)
    return [{**section, "blocks": [_finite(block) for block in section["blocks"]]} for section in sections]


def _finite(block: Mapping[str, Any]) -> dict[str, Any]:
    """The block without NaN or infinities, which JSON does not have."""
    name = next((name for name in ("rows", "cells") if name in block), "")
    if name:
        return {**block, name: _known(block[name])}
    if "series" in block:
        return {**block, "series": {label: _known(rows) for label, rows in block["series"].items()}}
    return dict(block)


def _known(rows: Sequence[Sequence[object]]) -> list[list[object]]:
    return [[None if isinstance(c, float) and not isfinite(c) else c for c in row] for row in rows]


def _check_block(block: object) -> None:
    if not isinstance(block, Mapping) or _SHAPES.get(_shape(block)) != set(block):
        raise _wrong(_FORM, block)
    if block["kind"] == "chart":
        _check_chart(block)
        return
    if block["kind"] == "prose":
        if not isinstance(block["text"], str):
            raise _wrong("a prose block's text is a string", block)
        return
    columns = _list(block["columns"], "a table's columns are a list of names")
    if not all(isinstance(name, str) for name in columns):
        raise _wrong("a table's columns are a list of names", columns)
    for row in _list(block["rows"], "a table's rows are a list"):
        cells = _list(row, "a table's row is a list")
        if len(cells) != len(columns) or not all(isinstance(cell, _CELLS) for cell in cells):
            raise _wrong("a table's row has one string, number, true, false or None a column", cells)


def _shape(block: Mapping[str, Any]) -> str:
    return f"{block.get('kind')} {block.get('draw')}" if block.get("kind") == "chart" else str(block.get("kind"))


def _check_chart(block: Mapping[str, Any]) -> None:
    if not isinstance(block["title"], str) or not isinstance(block["words"], str):
        raise _wrong("a chart's title and words are strings", block)
    for name in ("x", "y", "value"):
        axis = block.get(name, {"name": "", "unit": ""})
        if not isinstance(axis, Mapping) or set(axis) != {"name", "unit"} or not all(map(_text, axis.values())):
            raise _wrong(f"a chart's {name} is {{'name': …, 'unit': …}}, both strings", axis)
    if block["draw"] == "heat":
        cells = _rows(block["cells"], 3, "a map's cell is [x, y, number or None]")
        _one_kind([cell[0] for cell in cells])
        _one_kind([cell[1] for cell in cells])
        if len({(x, y) for x, y, _ in cells}) < len(cells):
            raise _wrong("a map has one cell for an x and a y", block["title"])
        return
    if not isinstance(block["series"], Mapping) or not all(map(_text, block["series"])):
        raise _wrong("a chart's series are {name: [[x, y], …]}", block["series"])
    points = [_rows(rows, 2, "a chart's point is [x, number or None]") for rows in block["series"].values()]
    _one_kind([point[0] for rows in points for point in rows])


def _rows(value: object, width: int, rule: str) -> list[list[Any]]:
    """Rows of places and, at their end, a number or None."""
    rows = [_list(row, rule) for row in _list(value, rule)]
    for row in rows:
        if len(row) != width or not (row[-1] is None or _number(row[-1])):
            raise _wrong(rule, row)
    return rows


def _one_kind(places: Sequence[object]) -> None:
    if len(places) > MOST:
        raise _wrong(f"a chart has at most {MOST:,} points", len(places))
    if not (all(map(_text, places)) or all(_number(place) and isfinite(place) for place in places)):  # type: ignore[arg-type]
        raise _wrong("on an axis stand names or finite numbers, not both", places[:5])


def _text(value: object) -> bool:
    return isinstance(value, str)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _list(value: object, rule: str) -> list[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise _wrong(rule, value)
    return list(value)


def _wrong(rule: str, value: object) -> PluginError:
    return PluginError(f"{rule}, not {repr(value)[:120]}", why="the report makes HTML of data that it knows")
