"""The report's section on the texts: who wrote them, what each control holds constant, and what was left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..store.artifact import Artifact
from ..store.tables import read_rows
from .view import Block, Prose, Table

__all__ = ["section"]

_COLUMNS = ("work", "author", "unit", "role", "era", "genre", "topic", "split", "n_tokens")
_MOST = 300  # rows; a folder of foreign text may hold a million documents


def section(tokens: Artifact) -> list[Block]:
    """A sentence on the units, the table of works, and what was cut down before any window was made."""
    rows = read_rows(tokens.path / "documents.parquet")
    blocks: list[Block] = [Prose(_units(rows)), Table([*_COLUMNS[:-1], "tokens"], _works(rows), numeric=[8])]
    if len(rows) > _MOST:
        blocks.append(Prose(f"{len(rows) - _MOST:,} more documents are not listed.", quiet=True))
    controls = [[row["work"], row["matches"], row["confound"]] for row in rows if row.get("confound")]
    if controls:
        blocks += [
            Prose("What each control holds constant, so that it cannot pass for greatness:"),
            Table(["control", "stands against", "holds constant"], controls[:_MOST]),
        ]
    blocks += [Prose(words) for words in (_left_out(tokens.summary), _translated(rows)) if words]
    return blocks


def _units(rows: Sequence[Mapping]) -> str:
    authors = {row["author"] for row in rows}
    by_role = {role: len({r["unit"] for r in rows if r["role"] == role}) for role in ("character", "seed", "control")}
    return (
        f"{by_role['character'] + by_role['seed']} characters and {by_role['control']} controls, "
        f"{len(authors)} {'authors' if len(authors) > 1 else 'author'}. A claim about characters is a claim about how "
        "few units there are, not how many tokens."
    )


def _works(rows: Sequence[Mapping]) -> list[list]:
    return [[row[name] for name in _COLUMNS] for row in rows[:_MOST]]


def _translated(rows: Sequence[Mapping]) -> str:
    works = [str(row["work"]) for row in rows if row.get("translated")]
    return f"In translation, and so in another's words: {'; '.join(works[:20])}." if works else ""


def _left_out(summary: Mapping) -> str:
    """What `tokenize` took away so that no passage counts twice and no voice outvotes the others."""
    parts = []
    if removed := summary.get("overlap_chars_removed"):
        parts.append(f"{removed:,} characters that a later work repeats word for word")
    if capped := summary.get("tokens_capped"):
        parts.append(
            f"{capped:,} tokens of {', '.join(summary['capped'])}, spread evenly, so that no voice outvotes the rest"
        )
    return f"Left out: {', and '.join(parts)}." if parts else ""
