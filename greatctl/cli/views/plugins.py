"""The table of `plugins`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType

from ..text import literal, paragraphs
from .table import near, table

__all__ = ["render_plugins"]


def render_plugins(rows: Sequence[Mapping]) -> RenderableType:
    """One row a plugin: what it gives, or that it failed; the causes below."""
    cells = []
    for row in rows:
        gives = paragraphs("\n".join([*row["items"], *row["hooks"]]) or "–")
        state = "failed" if row["error"] else "loaded"
        cells.append((row["name"], row["version"], state, gives, near(row["origin"])))
    failures = [literal(f"{row['name']}: {row['error']}", "red") for row in rows if row["error"]]
    return Group(table(["plugin", "version", "state", "gives", "from"], cells), *failures)
