"""Labels in the terminal: what a labeler called a latent, and how far that may be believed.

A label is a stranger's words, so that it never stands without its scores and what another latent's label scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import RenderableType
from rich.text import Text

from ..text import literal
from .table import table

__all__ = ["label_lines", "label_table"]

_ROWS, _NAME = 12, 40


def label_lines(label: Mapping | None) -> list[RenderableType]:
    """A latent's label and its scores, for its page; nothing where no labeler named it."""
    if not label or label["source"] != "labeler":
        return []
    words = f"{label['name']}: {label['description']}" if label["description"] else label["name"]
    by = f"named by {label['labeler']}, no part of any verdict (in brackets another latent's label): "
    scores = (f"{task} {_beside(label, task)}" for task in ("detection", "fuzzing"))
    return [literal(words), literal(by + ", ".join(scores), "dim")]


def label_table(rows: Sequence[Mapping]) -> list[RenderableType]:
    """The names with their scores and, in brackets, those of shuffled labels; nothing without rows."""
    if not rows:
        return []
    cells = [(str(r["latent"]), _name(r), _beside(r, "detection"), _beside(r, "fuzzing")) for r in rows[:_ROWS]]
    title = "Labels, no part of any verdict; in brackets another latent's label (chance 0.5)"
    return ["", literal(title), table(["latent", "name", "detection", "fuzzing"], cells, right=(0, 2, 3))]


def _name(row: Mapping) -> Text:
    name = literal(row["name"], "" if row["source"] == "labeler" else "dim")
    name.truncate(_NAME, overflow="ellipsis")
    return name


def _beside(row: Mapping, task: str) -> str:
    if row[task] is None:
        return "–"
    shuffled = row[f"{task}_shuffled"]
    return f"{row[task]:.2f}" + (f" ({shuffled:.2f})" if shuffled is not None else "")
