"""The table of `plugins`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType

from ..text import literal
from .table import table

__all__ = ["render_plugins"]


def render_plugins(rows: Sequence[Mapping]) -> RenderableType:
    """One row a plugin: what it gives, or that it failed; the causes below."""
    cells = []
    for row in rows:
        gives = ", ".join([*row["items"], *row["hooks"]]) or "–"
        cells.append((row["name"], row["version"], "failed" if row["error"] else "loaded", gives, row["origin"]))
    failures = [literal(f"{row['name']}: {row['error']}", "red") for row in rows if row["error"]]
    return Group(table(["plugin", "version", "state", "gives", "from"], cells), *failures)
