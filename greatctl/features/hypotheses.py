"""From feature tables to written hypotheses: one concept, its candidates, and all that stands for and against each.

    contrasts.parquet   positive documents against controls, for every latent that fires, one block a concept
    hypotheses.parquet  the candidates, with verdict, reason, held-out numbers, the strongest baseline and the claim
    evidence.parquet    the fourteen checks of each candidate (see `gate`)
    baselines.parquet   what each baseline reaches on the held-out authors, or why it is missing

Candidates are chosen on training works alone. All latents that fire are in the family of tests, so the choice is paid
for in full.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..store.tables import write_table
from .baselines import Baseline, beats, interval, margin
from .concepts import Concept, select
from .gate import Candidate, Check, check, claim, settle
from .judgement import Judgement, weigh, with_causal
from .probes import column, strongest, testable, training
from .units import Cells, Parts, gather

__all__ = ["Evidence", "Known", "Weighed", "assemble", "shown", "weigh_concept", "write_evidence"]

_ROLE = {"positive": "character", "control": "control", "hard": "control"}
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Weighed:
    """One concept over all latents that fire.

    Attributes:
        rows: the documents that take part, with the roles that the concept gives them; `places` are their numbers.
        cells: their latents, gathered; column j is latent `alive[j]`.
        judgement: its rows' `latent` is the latent's number.
        candidates: latents, strongest in training first.
    """

    concept: Concept
    rows: list[dict[str, object]]
    places: list[int]
    cells: Cells
    alive: Sequence[int]
    judgement: Judgement
    candidates: list[int]

    def row(self, latent: int) -> dict[str, object]:
        """What the rules say of a latent."""
        return self.judgement.rows[self.column(latent)]

    def column(self, latent: int) -> int:
        """The column of a latent."""
        return list(self.alive).index(latent)


@dataclass(frozen=True)
class Known:
    """What other tables say of latents, by latent; what is not there is a missing check.

    Attributes:
        cosines: largest decoder |cosine| in each SAE of another seed.
        on_words: share of its strongest passages that peak on a name or a word of the concept.
        token_share, position_share: explained by the token id, by the position.
        whole_range: deciles and near misses are on the pages.
        causal: as `judge` takes it.
    """

    cosines: Mapping[int, Sequence[float]] = field(default_factory=dict)
    on_words: Mapping[int, float] = field(default_factory=dict)
    token_share: Mapping[int, float] = field(default_factory=dict)
    position_share: Mapping[int, float] = field(default_factory=dict)
    whole_range: bool = False
    causal: Mapping[int, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Evidence:
    """One concept, weighed to the end: `rows` are those of hypotheses.parquet, in the order in which they are shown."""

    weighed: Weighed
    baselines: list[Baseline]
    rows: list[dict[str, Any]]
    checks: dict[int, list[Check]]


def weigh_concept(
    concept: Concept,
    means: Floats,
    documents: Sequence[Mapping[str, object]],
    unit: str,
    alive: Sequence[int],
    *,
    n_candidates: int,
    stretches: tuple[NDArray, NDArray] | None = None,
    seed: int = 0,
) -> Weighed:
    """Weigh the latents in `alive` on the mean activations of the documents that a concept names.

    Args:
        means: mean activation of each latent in each document, [n_documents, d_sae]; NaN rows were not read.
        unit: the document column that names the unit (`author` or `unit`).
        stretches: of each document's stretches, the tokens [n_documents, S] (0 where it has fewer) and the summed
            activations [n_documents, S, d_sae], by which authors are compared on equal amounts of text.
    """
    sides = select(concept, documents)
    places = [i for i, side in enumerate(sides) if side and np.isfinite(means[i]).all()]
    rows = [
        {**documents[i], "author": documents[i][unit], "role": _ROLE[str(sides[i])], "hard": sides[i] == "hard"}
        for i in places
    ]
    parts = None if stretches is None else _parts(*stretches, places, alive)
    cells = gather(means[places][:, list(alive)], rows, parts=parts)
    cells = replace(cells, unit="author" if unit == "author" else "subject")
    found, cells = weigh(cells, seed=seed), replace(cells, parts=None)  # the parts are large, and have had their say
    for row, latent in zip(found.rows, alive, strict=True):
        row["latent"] = latent
    chosen = strongest(*training(cells), n_candidates)
    return Weighed(concept, rows, places, cells, alive, found, [alive[i] for i in chosen])


def _parts(tokens: NDArray, totals: NDArray, places: Sequence[int], alive: Sequence[int]) -> Parts:
    """The stretches that hold tokens, of the documents that take part."""
    row, stretch = np.nonzero(tokens[places])
    amount = tokens[places][row, stretch].astype(np.float64)
    sums = totals[np.asarray(places, dtype=np.int64)[row], stretch][:, list(alive)]
    return Parts(sums / amount[:, None].astype(sums.dtype), amount, row)


def assemble(weighed: Weighed, measured: Sequence[Baseline], known: Known, *, seed: int = 0) -> Evidence:
    """Hold every candidate against baselines, interventions and the gate."""
    by_name = {one.name: one for one in measured}
    rows, checks = [], {}
    for latent in weighed.candidates:
        candidate = _candidate(weighed, latent, by_name, known, seed)
        verdict, reason = settle(candidate)
        candidate = replace(candidate, row={**candidate.row, "verdict": verdict, "reason": reason})
        checks[latent] = check(candidate)
        rows.append({**_shared(weighed), **_row(candidate, checks[latent], measured)})
    return Evidence(weighed, list(measured), shown(rows), checks)


def shown(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows in the order in which they are shown: supported ones first, then by size of effect."""
    return [dict(r) for r in sorted(rows, key=lambda r: (r["verdict"] != "supported", -abs(r["effect"]), r["latent"]))]


def _candidate(weighed: Weighed, latent: int, measured: Mapping[str, Baseline], known: Known, seed: int) -> Candidate:
    cells, place = weighed.cells, weighed.column(latent)
    causal = known.causal.get(latent)
    found = Candidate(
        row=with_causal(weighed.row(latent), causal),
        baselines=measured,
        cosines=known.cosines.get(latent, ()),
        on_words=known.on_words.get(latent),
        token_share=known.token_share.get(latent),
        position_share=known.position_share.get(latent),
        whole_range=known.whole_range,
        causal=causal,
    )
    if not testable(cells):
        return found
    score = column(cells, place, "latent")
    margins = {name: margin(cells, score, one, seed) for name, one in measured.items() if one.bar is not None}
    recall, works = _recall(cells, place)
    band = interval(cells, score, seed)
    return replace(found, score=score, interval=band, recall=recall, works_recall=works, margins=margins)


def _recall(cells: Cells, place: int) -> tuple[float, float | None]:
    """Share of held-out characters, and of characters' kept-apart works, beyond midway between the roles in training."""
    means, role = training(cells)
    high, low = means[role, place].mean(), means[~role, place].mean()
    way = np.sign(high - low) or 1.0
    held = cells.author_means[cells.heldout & cells.author_role, place]
    apart = cells.work_means[cells.work_heldout & cells.author_role[cells.work_author], place]
    authors, works = ((found - (high + low) / 2) * way > 0 for found in (held, apart))
    return float(authors.mean()), float(works.mean()) if len(works) else None


def _shared(weighed: Weighed) -> dict[str, object]:
    judged = weighed.judgement
    return {
        "concept": weighed.concept.name,
        "unit": weighed.cells.unit,
        "n_characters": judged.n_characters,
        "n_controls": judged.n_controls,
    }


def _row(candidate: Candidate, checks: Sequence[Check], measured: Sequence[Baseline]) -> dict[str, object]:
    """A row of hypotheses.parquet: the judged numbers, the strongest baseline beside them, and the claim."""
    score = candidate.score
    rivals = [one for one in measured if one.bar is not None]
    best = max(rivals, key=lambda one: one.bar or (0.0, 0.0), default=None) if score else None
    low, high = candidate.interval or (None, None)
    beside = candidate.margins[best.name] if best else (None, None, None)
    return {
        **_known(candidate.row),
        "auroc_low": low,
        "auroc_high": high,
        "recall": candidate.recall,
        "baseline": best.name if best else None,
        "value": best.bar[0] if best and best.bar else None,
        "margin": beside[0],
        "margin_low": beside[1],
        "margin_high": beside[2],
        "beats": beats(score, best) if best and score else None,
        "causal_effect": candidate.causal["effect"] if candidate.causal else None,
        "causal_p": candidate.causal.get("p_value") if candidate.causal else None,
        "claim": claim(checks, candidate.value("effect")),
        "passed": sum(one.state == "passed" for one in checks),
        "failed": sum(one.state == "failed" for one in checks),
        "missing": [one.name for one in measured if one.bar is None],
    }


def write_evidence(folder: Path, found: Sequence[Evidence]) -> list[dict[str, Any]]:
    """Write the four tables, concepts in the order given; returns the rows of hypotheses.parquet."""
    contrasts = [{**_shared(one.weighed), **_known(row)} for one in found for row in _settled(one)]
    write_table(folder / "contrasts.parquet", pa.Table.from_pylist(contrasts, schema=_CONTRASTS))
    rows = [row for one in found for row in one.rows]
    write_table(folder / "hypotheses.parquet", pa.Table.from_pylist(rows, schema=_HYPOTHESES))
    checks = [
        {"concept": one.weighed.concept.name, "latent": row["latent"], "check": c.number, "name": c.name,
         "state": c.state, "value": c.value, "reason": c.reason}
        for one in found for row in one.rows for c in one.checks[row["latent"]]
    ]  # fmt: skip
    write_table(folder / "evidence.parquet", pa.Table.from_pylist(checks, schema=_EVIDENCE))
    write_table(folder / "baselines.parquet", pa.Table.from_pylist(baseline_rows(found), schema=_BASELINES))
    return rows


def _settled(found: Evidence) -> list[dict[str, object]]:
    """The judged rows of all latents, the candidates' with their last word."""
    last = {row["latent"]: row for row in found.rows}
    same = ("verdict", "reason")
    return [
        {**row, **{name: last[row["latent"]][name] for name in same}} if row["latent"] in last else row
        for row in found.weighed.judgement.rows
    ]


def _known(row: Mapping[str, object]) -> dict[str, object]:
    """The row with None for what could not be measured."""
    return {name: None if isinstance(v, float) and v != v else v for name, v in row.items()}


def baseline_rows(found: Sequence[Evidence]) -> list[dict[str, object]]:
    """The rows of baselines.parquet."""
    return [
        {
            "concept": one.weighed.concept.name,
            "baseline": b.name,
            "auroc": b.score.auroc if b.score else None,
            "effect": b.score.effect if b.score else None,
            "works_auroc": b.score.works_auroc if b.score else None,
            "bar": b.bar[0] if b.bar else None,
            "what": b.score.what if b.score else None,
            "n": b.score.n if b.score else None,
            "missing": b.why or None,
        }
        for one in found
        for b in one.baselines
    ]


def _schema(**columns: str) -> pa.Schema:
    kinds = {
        "text": pa.string(), "number": pa.float64(), "count": pa.int32(), "yes": pa.bool_(),
        "texts": pa.list_(pa.string()),
    }  # fmt: skip
    return pa.schema([(name, kinds[kind]) for name, kind in columns.items()])


_CONTRASTS = _schema(
    concept="text", unit="text", latent="count", effect="number", auroc="number", p_value="number", q_value="number",
    verdict="text", reason="text", icc="number", heldout_effect="number", heldout_auroc="number",
    works_auroc="number", matched_share="number", hard_share="number", n_characters="count", n_controls="count",
)  # fmt: skip
_HYPOTHESES = pa.unify_schemas([
    _CONTRASTS,
    _schema(
        auroc_low="number", auroc_high="number", recall="number", baseline="text", value="number", margin="number",
        margin_low="number", margin_high="number", beats="yes", causal_effect="number", causal_p="number",
        claim="text", passed="count", failed="count", missing="texts",
    ),
])  # fmt: skip
_EVIDENCE = _schema(
    concept="text", latent="count", check="count", name="text", state="text", value="number", reason="text"
)
_BASELINES = _schema(
    concept="text", baseline="text", auroc="number", effect="number", works_auroc="number", bar="number", what="text",
    n="count", missing="text",
)  # fmt: skip
