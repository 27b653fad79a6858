"""Report sections of plugins: data in, checked data out. The report alone makes HTML, escaping each word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from ..errors import PluginError
from .hookspecs import Section

__all__ = ["check_sections"]

_CELLS = (str, int, float, bool, type(None))
_SHAPES = {"prose": {"kind", "text"}, "table": {"kind", "columns", "rows"}}


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
    if block["kind"] != "table":
        return dict(block)
    rows = [[None if isinstance(c, float) and not isfinite(c) else c for c in row] for row in block["rows"]]
    return {**block, "rows": rows}


def _check_block(block: object) -> None:
    if not isinstance(block, Mapping) or _SHAPES.get(str(block.get("kind"))) != set(block):
        raise _wrong("a block is {'kind': 'prose', 'text': …} or {'kind': 'table', 'columns': […], 'rows': […]}", block)
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


def _list(value: object, rule: str) -> list[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise _wrong(rule, value)
    return list(value)


def _wrong(rule: str, value: object) -> PluginError:
    return PluginError(f"{rule}, not {repr(value)[:120]}", why="the report makes HTML of data that it knows")
