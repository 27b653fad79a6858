"""`--dry-run`: what would be made, and where each setting comes from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType

from ..text import literal
from .table import facts, near, size, table

__all__ = ["render_plan"]


def render_plan(plan: Any, origins: Mapping[str, Any]) -> RenderableType:
    """The plan's facts and one row a setting: value and origin."""
    rows = [_setting(name, row["value"], row["origin"]) for name, row in origins.items()]
    lines = [_fact(name, value) for name, value in plan.facts.items() if not isinstance(value, list | dict)]
    if plan.final is not None:
        lines.append(("would make", near(plan.final)))
    lists = [rows for rows in plan.facts.values() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
    items = [table(list(found[0]), [[str(row[k]) for k in found[0]] for row in found]) for found in lists]
    return Group(
        literal(f"{plan.stage}: a dry run; nothing was done", "bold"),
        facts(lines),
        *items,
        table(["setting", "value", "from"], rows),
    )


def _fact(name: str, value: object) -> tuple[str, object]:
    """Bytes in the unit that fits; everything else as it is."""
    words = name.replace("_", " ")
    in_bytes = isinstance(value, int) and (name == "bytes" or name.endswith("_bytes"))
    return (words.removesuffix(" bytes"), size(value)) if in_bytes else (words, value)  # type: ignore[arg-type]


def _setting(name: str, value: object, origin: str) -> tuple[object, ...]:
    """What a person chose stands out from the defaults."""
    shown = "–" if value in (None, {}, []) else str(value)
    return tuple(literal(cell, "dim" if origin == "default" else "") for cell in (name, shown, origin))
