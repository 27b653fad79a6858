"""Sections of plugins: what was checked as data becomes blocks of the page, drawn and escaped like its own.

A chart comes as numbers with names and units and nothing about how it looks. The same numbers stand beneath it as a
table, which is what the text and the data formats print.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .charts import drawn, heat_map
from .view import Block, Cell, Chart, Prose, Section, Table

__all__ = ["of_plugins"]


def of_plugins(given: Sequence[Mapping[str, Any]]) -> list[Section]:
    """A section for each that `greatctl.extend.sections.check_sections` let through, with the plugin's name at its end."""
    made = []
    for number, section in enumerate(given):
        blocks: list[Block] = [_block(block) for block in section["blocks"]]
        blocks.append(Prose(f"From the plugin {section.get('plugin', 'unknown')}.", quiet=True))
        made.append(Section(f"plugin-{number}", str(section["title"]), blocks))
    return made


def _block(block: Mapping[str, Any]) -> Block:
    if block["kind"] == "prose":
        return Prose(str(block["text"]))
    if block["kind"] == "table":
        return _table(block["columns"], block["rows"])
    return _heat(block) if block["draw"] == "heat" else _chart(block)


def _table(columns: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str = "") -> Table:
    cells = list(zip(*rows, strict=True))
    numeric = [n for n, column in enumerate(cells) if all(_number(cell) for cell in column)]
    return Table(list(columns), [list(row) for row in rows], numeric=numeric, caption=caption, folded=bool(caption))


def _chart(block: Mapping[str, Any]) -> Chart:
    x, y = _axis(block["x"]), _axis(block["y"])
    chart = drawn(block["draw"], block["title"], block["series"], x_title=x, y_title=y, words=block["words"])
    rows = [[name, *point] for name, points in block["series"].items() for point in points]
    return replace(chart, numbers=_table(["series", x, y], rows, f"The numbers of {block['title']}"))


def _heat(block: Mapping[str, Any]) -> Chart:
    """A map with a row for each y and a column for each x, in the order of their coming; colours are even around zero."""
    x, y, value = (_axis(block[name]) for name in ("x", "y", "value"))
    columns = list(dict.fromkeys(cell[0] for cell in block["cells"]))
    rows = list(dict.fromkeys(cell[1] for cell in block["cells"]))
    known = {(at, row): number for at, row, number in block["cells"]}
    values = [[known.get((at, row)) for at in columns] for row in rows]
    hover = [[_said(at, row, known.get((at, row))) for at in columns] for row in rows]
    names = ([str(name) for name in columns], [str(name) for name in rows])
    chart = heat_map(block["title"], *names, values, hover, words=block["words"], titles=(x, y, value),
                     reach=max((abs(v) for v in known.values() if v is not None), default=0.0) or 1.0)  # fmt: skip
    return replace(chart, numbers=_table([x, y, value], block["cells"], f"The numbers of {block['title']}"))


def _said(x: object, y: object, value: float | None) -> str:
    return f"{x}, {y}: " + ("not available" if value is None else f"{value:.4g}")


def _axis(axis: Mapping[str, str]) -> str:
    """What is on an axis, with its unit."""
    return f"{axis['name']}, {axis['unit']}" if axis["unit"] else axis["name"]


def _number(cell: object) -> bool:
    return cell is None or (isinstance(cell, int | float) and not isinstance(cell, bool))
