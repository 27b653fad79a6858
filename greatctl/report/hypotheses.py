"""The section on hypotheses: for each concept its strongest candidates as cards, with what they have to beat beside them.

A card never shows a number alone: the AUROC on held-out authors stands over the bars of the baselines on the same
authors, then come the fourteen checks of the gate, and what changing the latent does beside random directions.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, quantiles
from typing import Any

from ..store.artifact import Artifact
from .labels import by_tokens
from .tables import Row, by_latent, of_latents, rows
from .view import Block, Finding, Gate, Hypothesis, Label, Origin, Prose, Rival, Table, read_from

__all__ = ["candidates", "findings", "section"]

_CARDS = 3  # of each concept
_LABEL_CHECK = "label quality"
_ALL = {
    "latent": "latent", "effect": "effect, sd", "auroc": "AUROC, all", "heldout_auroc": "AUROC, held out",
    "baseline": "best baseline", "value": "its AUROC", "p_value": "p", "q_value": "q", "verdict": "verdict",
    "claim": "may be said", "passed": "passed", "failed": "failed", "reason": "why",
}  # fmt: skip
_TEXT = ("baseline", "verdict", "claim", "reason")
_KINDS = {
    "ablate": "taken away",
    "clamp": "held at its peak",
    "steer": "added along its row",
    "other-steer": "another latent added",
    "other-ablate": "another latent taken away",
}
_NULLS = {"ablate": "random-ablate", "steer": "random"}  # what a change is held against


def candidates(interpreted: Artifact) -> dict[str, list[Row]]:
    """Concept -> its candidates, strongest first."""
    found: dict[str, list[Row]] = {}
    for row in rows(interpreted.path / "hypotheses.parquet"):
        found.setdefault(str(row["concept"]), []).append(row)
    return found


def findings(interpreted: Artifact) -> list[Finding]:
    """Each concept in a sentence or two with numbers."""
    origin = Origin(interpreted.fingerprint, "hypotheses.parquet")
    subject = interpreted.summary.get("unit") == "subject"
    found = [Finding(_said(concept, some, subject), "hypotheses", origin)
             for concept, some in candidates(interpreted).items()]  # fmt: skip
    if found:
        return found
    return [Finding("No latent could be tested: too few characters or controls were read.", "hypotheses", origin)]


def _said(concept: str, some: Sequence[Row], subject: bool) -> str:
    best = some[0]
    supported = sum(row["verdict"] == "supported" for row in some)
    counted = "subjects of texts by one author" if subject else "authors"
    head = (
        f"{supported} of {len(some)} candidate latents for '{concept}' pass the written rules"
        if supported
        else f"No latent passes the written rules for '{concept}' ({len(some)} candidates"
        + (f", {best['n_characters']} {counted} against {best['n_controls']})" if best["n_characters"] else ")")
    )
    q = best["q_value"]
    weight = f", q = {q:.2g}" if q is not None else ""
    text = f"{head}. The strongest is latent {best['latent']} (effect {best['effect']:+.2f} sd{weight}): {best['verdict']}."
    return text + _beside(best, "subjects" if subject else "authors") + (_owed(best) if supported else "")


def _beside(row: Row, units: str) -> str:
    """Its number on held-out units beside the strongest baseline's, as a sentence."""
    if row["heldout_auroc"] is None:
        return ""
    low, high = row["auroc_low"], row["auroc_high"]
    interval = f" (95 % {low:.2f} to {high:.2f})" if low is not None and high is not None else ""
    text = f" On held-out {units} its AUROC is {row['heldout_auroc']:.2f}{interval}"
    if row["baseline"] and row["value"] is not None:
        text += f"; the best baseline, {row['baseline']}, has {row['value']:.2f}"
    return text + "."


def _owed(row: Row) -> str:
    missing = row["missing"] or []
    if not missing:
        return ""
    some = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
    return f" {len(missing)} baselines that could explain it away are not computed ({some})."


def section(interpreted: Artifact, rules: str, pages: Collection[int], named: Mapping[int, Label]) -> list[Block]:
    """Cards and the table of every candidate for each concept, the baselines, and the rules.

    Args:
        rules: the written rules of a verdict, as a docstring.
        pages: latents that have a page of their own below.
        named: what a labeler called the latents; no verdict knows of it.
    """
    path, summary = interpreted.path, interpreted.summary
    gates = by_latent(rows(path / "evidence.parquet"))
    rivals = rows(path / "baselines.parquet")
    trials = rows(path / "causal.parquet")
    shown = [row["latent"] for some in candidates(interpreted).values() for row in some[:_CARDS]]
    tokens = of_latents(path / "latents.parquet", shown, ["latent", "top_tokens"])
    units = "subjects" if summary.get("unit") == "subject" else "authors"
    powers = {row["concept"]: row.get("power", "") for row in summary.get("concepts", [])}
    blocks: list[Block] = []
    if units == "subjects":
        blocks.append(Prose("The unit is the subject of a text, not an author, since these texts have one author."))
    for concept, some in candidates(interpreted).items():
        power = str(powers.get(concept) or summary.get("power") or "")
        blocks += read_from(interpreted, "hypotheses.parquet", [Prose(_sentence(power), title=f"Concept: {concept}")])
        own = [row for row in rivals if row["concept"] == concept]
        tried = [row for row in trials if row["concept"] == concept]
        for number, row in enumerate(some[:_CARDS]):
            checks = [check for check in gates.get(row["latent"], []) if check["concept"] == concept]
            card = _card(row, own, checks, tried, units)
            label = named.get(row["latent"])
            facts = tokens.get(row["latent"], [{}])[0]
            name = label.name if label and label.holds else by_tokens(facts.get("top_tokens"))
            card = replace(
                card,
                gate=_with_label(card.gate, label),
                name=name,
                label=label,
                has_page=row["latent"] in pages,
                open=number == 0,
            )
            blocks += read_from(interpreted, "hypotheses, evidence, baselines and causal.parquet", [card])
        blocks += read_from(interpreted, "hypotheses.parquet", [_table(concept, some, units)])
    blocks += read_from(interpreted, "baselines.parquet", _baselines(rivals, units))
    written = inspect.cleandoc(rules).split("\nArgs:")[0].strip()
    return [*blocks, Prose(written, summary="The written rules of a verdict")]


def _card(row: Row, rivals: Sequence[Row], checks: Sequence[Row], trials: Sequence[Row], units: str) -> Hypothesis:
    facts = [
        (f"effect, sd between {units}", row["effect"]),
        ("q", row["q_value"]),
        (f"AUROC, all {units} (below 0.5: lower in characters)", row["auroc"]),
        ("AUROC, other works", row["works_auroc"]),
        ("share of held-out characters found", row["recall"]),
        ("left against hard controls", row["hard_share"]),
        ("left with era, genre, topic matched", row["matched_share"]),
        ("intraclass correlation", row["icc"]),
        ("margin over the best baseline", row["margin"]),
        ("effect when changed", row["causal_effect"]),
        ("its p", row["causal_p"]),
    ]
    return Hypothesis(
        concept=str(row["concept"]),
        latent=row["latent"],
        name="",
        units=units,
        verdict=str(row["verdict"]),
        claim=str(row["claim"] or "nothing yet"),
        reason=str(row["reason"] or ""),
        facts=[(name, value) for name, value in facts if value is not None],
        value=row["heldout_auroc"],
        low=row["auroc_low"],
        high=row["auroc_high"],
        rivals=[Rival(str(r["baseline"]), r["bar"], str(r["missing"] or r["what"] or "")) for r in rivals],
        gate=[Gate(c["check"], str(c["name"]), str(c["state"]), str(c["reason"] or "")) for c in checks],
        doses=_doses(row["latent"], trials),
    )


def _sentence(text: str) -> str:
    return text if not text or text.endswith(".") else f"{text}."


def _with_label(gate: Sequence[Gate], label: Label | None) -> list[Gate]:
    """The checks as they were weighed, before any label was asked for; the one on labels says where its scores stand."""
    words = "no label was there when this was weighed; the scores of the one above came later"
    later = label is not None and bool(label.name)
    return [replace(c, reason=words) if later and (c.name, c.state) == (_LABEL_CHECK, "missing") else c for c in gate]


def _doses(latent: int, trials: Sequence[Row]) -> list[list[Any]]:
    """For each change of the latent: strength, mean effect over pairs, the band of random directions, the damage."""
    own: dict[tuple[str, float], list[Row]] = {}
    for row in trials:
        if row["latent"] == latent and row["kind"] in _KINDS:
            own.setdefault((row["kind"], row["strength"]), []).append(row)
    found = []
    for kind, strength in sorted(own, key=lambda key: (list(_KINDS).index(key[0]), key[1])):
        some = own[kind, strength]
        null = [r for r in trials if r["kind"] == _NULLS.get(kind) and r["strength"] == strength]
        owned = [r for r in null if r["latent"] == latent] or [r for r in null if r["latent"] == -1]
        low, high = _band(owned)
        damage = next((row["damage_ce"] for row in some if row["damage_ce"] is not None), None)
        effect = _mean([row["effect"] for row in some])
        found.append([_KINDS[kind], strength or None, effect, low, high, damage])
    return found


def _band(null: Sequence[Row]) -> tuple[float | None, float | None]:
    """The range between the 2.5 and the 97.5 % point of the draws' mean effects."""
    draws: dict[int, list[float | None]] = {}
    for row in null:
        draws.setdefault(row["draw"], []).append(row["effect"])
    means = [mean for values in draws.values() if (mean := _mean(values)) is not None]
    if len(means) < 2:
        return None, None
    cuts = quantiles(means, n=40, method="inclusive")
    return cuts[0], cuts[-1]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and value == value]
    return fmean(known) if known else None


def _table(concept: str, some: Sequence[Row], units: str) -> Table:
    numeric = [number for number, key in enumerate(_ALL) if key not in _TEXT]
    cells = [[row[key] for key in _ALL] for row in some]
    caption = f"All {len(some)} candidates for {concept}, chosen on training {units} alone"
    return Table(list(_ALL.values()), cells, numeric=numeric, caption=caption, folded=True)


def _baselines(rivals: Sequence[Mapping[str, Any]], units: str) -> list[Block]:
    """What every latent has to beat, and which of it was not measured."""
    headers = [
        "concept",
        "baseline",
        f"AUROC, held-out {units}",
        "AUROC, other works",
        "effect, sd",
        "what",
        "of",
        "not measured",
    ]
    keys = ("concept", "baseline", "auroc", "works_auroc", "effect", "what", "n", "missing")
    if not rivals:
        return [Prose("No baseline was measured for this run: what follows is weak evidence.", quiet=True)]
    cells = [["" if row[key] is None and key in ("what", "missing") else row[key] for key in keys] for row in rivals]
    return [Table(headers, cells, numeric=[2, 3, 4, 6], caption="What a latent has to beat", folded=True)]
