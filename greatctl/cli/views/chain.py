"""What `run` and `demo` end with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..text import literal
from .table import near, table

__all__ = ["render_chain", "render_demo"]


def render_chain(results: Sequence[Any]) -> RenderableType:
    """One row a stage: whether there was something to do, and where its artifact is."""
    rows = [(r.stage, "up-to-date" if r.up_to_date else "done", near(r.artifact or "–")) for r in results]
    return table(["stage", "state", "artifact"], rows)


def render_demo(summary: Mapping[str, Any]) -> RenderableType:
    """The findings in plain words, the report's path, and what to try next."""
    items = [Padding(_numbered(n, words), (0, 0, 1, 2)) for n, words in enumerate(summary["findings"], 1)]
    project = near(summary["project"])
    return Group(
        literal("What this small run found", "bold"),
        "",
        *items,
        Text.assemble(("report  ", "dim"), literal(near(summary["report"]), "bold cyan")),
        Text.assemble(("try     ", "dim"), literal(f'greatctl -C {project} interpret --text "He kept his head."')),
        Text.assemble(("        ", "dim"), literal(f"greatctl -C {project} status")),
        literal(f"{summary['seconds']:.0f} s", "dim"),
    )


def _numbered(number: int, words: str) -> Table:
    """A finding whose lines all begin below its first word."""
    view = Table.grid(padding=(0, 1))
    view.add_row(Text(f"{number}.", "bold"), literal(words))
    return view
