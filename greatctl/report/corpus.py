"""The report's section on the texts: who wrote them, what each control holds constant, and what was cleaned away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..store.artifact import Artifact
from .charts import bars
from .tables import metadata, rows
from .view import Block, Prose, Table, read_from

__all__ = ["section"]

_COLUMNS = ("work", "author", "unit", "role", "era", "genre", "topic", "split", "n_tokens")
_MOST = 300  # rows; a folder of foreign text may hold a million documents


def section(tokens: Artifact, sources: Mapping[str, Artifact]) -> list[Block]:
    """A sentence on the units, the table of works, and what was cut before any window was made.

    Args:
        sources: source id -> what `fetch` kept of it.
    """
    found = rows(tokens.path / "documents.parquet")
    works = [[row[name] for name in _COLUMNS] for row in found[:_MOST]]
    blocks: list[Block] = [Prose(_units(found)), _tokens(found)]
    blocks.append(Table([*_COLUMNS[:-1], "tokens"], works, numeric=[8], caption=f"All {len(found):,} texts"))
    if len(found) > _MOST:
        blocks.append(Prose(f"{len(found) - _MOST:,} more documents are not listed.", quiet=True))
    controls = [[row["work"], row["matches"], row["confound"]] for row in found if row["confound"]]
    if controls:
        blocks += [
            Prose("What each control holds constant, so that it cannot pass for greatness:"),
            Table(["control", "stands against", "holds constant"], controls[:_MOST]),
        ]
    blocks += _cleaned(found, sources)
    blocks += [Prose(words) for words in (_left_out(tokens.summary), _translated(found)) if words]
    return read_from(tokens, "documents.parquet", blocks)


def _units(found: Sequence[Mapping[str, Any]]) -> str:
    authors = {row["author"] for row in found}
    by_role = {role: len({r["unit"] for r in found if r["role"] == role}) for role in ("character", "seed", "control")}
    return (
        f"{by_role['character'] + by_role['seed']} characters and {by_role['control']} controls, "
        f"{len(authors)} {'authors' if len(authors) > 1 else 'author'}. A claim about characters is a claim about how "
        "few units there are, not how many tokens."
    )


def _tokens(found: Sequence[Mapping[str, Any]]) -> Block:
    """How much of each unit is read."""
    totals: dict[str, int] = {}
    for row in found:
        totals[str(row["unit"])] = totals.get(str(row["unit"]), 0) + int(row["n_tokens"] or 0)
    largest = sorted(totals.items(), key=lambda unit: (-unit[1], unit[0]))[:60]
    words = (
        f"{sum(totals.values()):,} tokens of {len(totals):,} units; the largest is {largest[0][0] if largest else '-'}."
    )
    names, counts = [name for name, _ in largest], [count for _, count in largest]
    return bars("Tokens read of each unit", names, counts, x_title="", y_title="tokens", words=words)


def _cleaned(found: Sequence[Mapping[str, Any]], sources: Mapping[str, Artifact]) -> list[Block]:
    """What cleaning took from each text and why, in bytes, and what tokenizing took after it."""
    by_reason: dict[str, int] = {}
    cells = []
    for row in found:
        artifact = sources.get(str(row["source_id"]))
        facts = metadata(artifact.path) if artifact else {}
        removed = {str(k): int(v) for k, v in (facts.get("removed_bytes") or {}).items()}
        for reason, n in removed.items():
            by_reason[reason] = by_reason.get(reason, 0) + n
        reasons = ", ".join(f"{k} {v:,}" for k, v in sorted(removed.items(), key=lambda kv: -kv[1]))
        before = sum(int(file["bytes"]) for file in facts.get("files") or []) or None
        kept = (facts.get("text") or {}).get("bytes")
        cells.append([row["work"], before, kept, reasons, row["overlap_chars"], row["tokens_capped"]])
    if not any(cell[1] or cell[4] or cell[5] for cell in cells):
        return []
    most = sorted(by_reason.items(), key=lambda reason: -reason[1])
    words = "Cleaned away before anything was read: " + ", ".join(f"{k} {v:,} bytes" for k, v in most) + "."
    headers = [
        "work",
        "bytes fetched",
        "bytes kept",
        "removed, in bytes",
        "repeated elsewhere, characters",
        "capped, tokens",
    ]
    after: list[Block] = (
        [Prose(words + " Every cut stands in removed.txt beside the text, with its reason.")] if most else []
    )
    table = Table(
        headers, cells[:_MOST], numeric=[1, 2, 4, 5], caption="What was cleaned away, text by text", folded=True
    )
    return [*after, table]


def _translated(found: Sequence[Mapping[str, Any]]) -> str:
    works = [str(row["work"]) for row in found if row["translated"]]
    return f"In translation, and so in another's words: {'; '.join(works[:20])}." if works else ""


def _left_out(summary: Mapping[str, Any]) -> str:
    """What `tokenize` took away so that no passage counts twice and no voice outvotes the others."""
    parts = []
    if removed := summary.get("overlap_chars_removed"):
        parts.append(f"{removed:,} characters that a later work repeats word for word")
    if capped := summary.get("tokens_capped"):
        parts.append(
            f"{capped:,} tokens of {', '.join(summary['capped'])}, spread evenly, so that no voice outvotes the rest"
        )
    return f"Left out: {', and '.join(parts)}." if parts else ""
