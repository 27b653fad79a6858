"""The sections on latents: hypotheses with their verdicts, and a card for each of the strongest."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ..store.artifact import Artifact
from ..store.tables import read_rows
from .view import Block, Example, Latent, Prose, Table

__all__ = ["cards", "finding", "hypotheses"]

_UNITS = 40


def finding(interpreted: Artifact) -> str:
    """The contrast in one sentence with numbers."""
    summary = interpreted.summary
    rows = summary.get("hypotheses") or []
    if not rows:
        return "No latent could be tested: too few characters or controls were read."
    supported = [row for row in rows if row["verdict"] == "supported"]
    best = rows[0]
    q = best.get("q_value")
    weight = f"q = {q:.2g}" if q is not None else "no q-value"
    tail = f"latent {best['latent']} is the strongest (effect {best['effect']:+.2f}, {weight}; {best['verdict']})"
    if not supported:
        return f"No latent passes the written rules for '{best['concept']}'; {tail}."
    unit = "subjects of texts by one author" if summary.get("unit") == "subject" else "authors"
    return (
        f"{len(supported)} of the {len(rows)} latents shown separate characters from controls by the written rules; {tail}. "
        f"The unit is {unit}, and {_owed(interpreted)}: so far it is a difference "
        f"in writing, not a feature of {best['concept']}."
    )


def _owed(interpreted: Artifact) -> str:
    """Which baselines stand between a verdict and belief, as a clause."""
    rows = read_rows(interpreted.path / "hypotheses.parquet", ["missing"])
    missing = rows[0]["missing"] if rows else []
    if not missing:
        return "every baseline has been computed"
    return f"{len(missing)} baselines that could explain it away are not computed ({', '.join(missing[:3])}, …)"


def hypotheses(interpreted: Artifact, rules: str) -> list[Block]:
    """The candidates with what decided each, the power, the missing baselines, and the rules."""
    rows = read_rows(interpreted.path / "hypotheses.parquet")
    summary = interpreted.summary
    headers = ["concept", "latent", "effect", "AUROC", "p", "q", "verdict", "why"]
    keys = ("concept", "latent", "effect", "auroc", "p_value", "q_value", "verdict", "reason")
    blocks: list[Block] = []
    if summary.get("power"):
        blocks.append(Prose(str(summary["power"])))
    if summary.get("unit") == "subject":
        blocks.append(Prose("The unit is the subject of a text, not an author, since these texts have one author."))
    blocks.append(Table(headers, [[row[k] for k in keys] for row in rows], numeric=[1, 2, 3, 4, 5]))
    missing = rows[0]["missing"] if rows else []
    if missing:
        blocks.append(Prose("Baselines not computed for this run: " + ", ".join(missing) + ".", quiet=True))
    written = inspect.cleandoc(rules).split("\nArgs:")[0].strip()
    return [*blocks, Prose(written, summary="The written rules of a verdict")]


def cards(interpreted: Artifact, count: int) -> list[Block]:
    """A card for each of the `count` first candidates, in the order of the hypotheses."""
    judged = read_rows(interpreted.path / "hypotheses.parquet")[:count]
    wanted = [row["latent"] for row in judged]
    latents = {
        row["latent"]: row for row in read_rows(interpreted.path / "latents.parquet") if row["latent"] in set(wanted)
    }
    examples = _by_latent(interpreted, "examples", wanted)
    units = _by_latent(interpreted, "units", wanted)
    total = interpreted.summary.get("n_alive")
    note = (
        f"{len(judged)} of {total:,} latents that fire are shown, the candidates first; all are in latents.parquet."
        if total
        else ""
    )
    made: list[Block] = [Prose(note, quiet=True)] if note else []
    owed = _owed(interpreted)
    for row in judged:
        latent = row["latent"]
        made.append(_card(row, latents[latent], examples.get(latent, []), units.get(latent, []), owed))
    return made


def _by_latent(interpreted: Artifact, name: str, wanted: list[int]) -> dict[int, list[dict]]:
    found: dict[int, list[dict]] = {}
    keep = set(wanted)
    for row in read_rows(interpreted.path / f"{name}.parquet"):
        if row["latent"] in keep:
            found.setdefault(row["latent"], []).append(row)
    return found


def _card(
    judged: Mapping[str, Any], facts: Mapping[str, Any], examples: list[dict], units: list[dict], owed: str
) -> Latent:
    shown = [
        ("effect", judged["effect"]),
        ("AUROC", judged["auroc"]),
        ("q", judged["q_value"]),
        ("density", facts["density"]),
        ("mean when firing", facts["mean_when_firing"]),
        ("max", facts["max"]),
        ("intraclass correlation", judged["icc"]),
    ]
    strongest = sorted(units, key=lambda row: -row["mean"])[:_UNITS]
    return Latent(
        latent=judged["latent"],
        verdict=judged["verdict"],
        reason=f"{judged['reason']}; {owed}" if judged["verdict"] == "supported" else judged["reason"],
        facts=shown,
        up=list(facts["top_logit_tokens"])[:8],
        down=list(facts["bottom_logit_tokens"])[:8],
        examples=[_example(row) for row in examples[:5]],
        units=[(row["unit"], row["role"], float(row["mean"])) for row in strongest],
    )


def _example(row: Mapping[str, Any]) -> Example:
    top = max(row["heat"], default=0.0) or 1.0
    strengths = [max(0.0, float(h) / top) for h in row["heat"]]
    pieces = list(row["pieces"])
    strengths = (strengths + [0.0] * len(pieces))[: len(pieces)]
    year = f", {row['year']}" if row["year"] else ""
    where = f"{row['work']} ({row['author']}{year}), {row['source_id']} {row['char_start']}-{row['char_end']}"
    return Example(pieces, strengths, float(row["activation"]), where)
