"""The table of `plugins`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Group, RenderableType

from ..text import literal, paragraphs
from .table import table

__all__ = ["render_plugins"]


def render_plugins(rows: Sequence[Mapping]) -> RenderableType:
    """One row a plugin: what it gives, or that it failed; the causes below."""
    cells = []
    for row in rows:
        gives = paragraphs("\n".join([*row["items"], *row["hooks"]]) or "–")
        state = "failed" if row["error"] else "loaded"
        cells.append((row["name"], row["version"], state, gives, _near(row["origin"])))
    failures = [literal(f"{row['name']}: {row['error']}", "red") for row in rows if row["error"]]
    return Group(table(["plugin", "version", "state", "gives", "from"], cells), *failures)


def _near(origin: str) -> str:
    """A path as seen from here, where it lies below."""
    path = Path(origin)
    return str(path.relative_to(Path.cwd())) if path.is_absolute() and path.is_relative_to(Path.cwd()) else origin
