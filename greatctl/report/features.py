"""The pages of the latents that matter most: passages with token heat, facets, the line along each work, diagnostics.

Facets say who and what a latent fires for: by author with the interval of `interpret`, by work, by era and by role. The
strongest passages alone flatter a latent, so one passage of each tenth of its range and near misses stand beside them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ..store.artifact import Artifact
from .hypotheses import candidates
from .labels import by_tokens
from .tables import Row, of_latents, rows
from .view import Block, Curve, Example, Facet, Label, Latent, Share, read_from

__all__ = ["cards", "chosen"]

_SHARES = 40  # bars of a facet
_LINES = 10  # works whose line is drawn
_PASSAGES = 5
_FACTS = {
    "density": "share of tokens on which it fires",
    "fired": "tokens on which it fires",
    "mean_when_firing": "mean when firing",
    "max": "largest",
    "token_share": "explained by the token",
    "position_share": "explained by the position",
    "logit_kurtosis": "kurtosis of its logits",
    "logit_skew": "skew of its logits",
}


def chosen(interpreted: Artifact, count: int) -> list[int]:
    """The first `count` latents: the candidates of all concepts in turn, strongest first."""
    queues = [[row["latent"] for row in some] for some in candidates(interpreted).values()]
    turns = [queue[at] for at in range(max(map(len, queues), default=0)) for queue in queues if at < len(queue)]
    return list(dict.fromkeys(turns))[:count]


@dataclass(frozen=True)
class _Tables:
    """What is known of the shown latents."""

    latents: Mapping[int, list[Row]]
    examples: Mapping[int, list[Row]]
    units: Mapping[int, list[Row]]
    stretches: Mapping[int, list[Row]]
    labels: Mapping[int, Label]
    judged: Mapping[int, list[Row]]
    documents: Mapping[str, Row]
    unit: str


def cards(
    interpreted: Artifact, tokens: Artifact | None, wanted: Sequence[int], named: Mapping[int, Label]
) -> list[Block]:
    """A page for each of the wanted latents, in that order; the first is open."""
    path = interpreted.path
    judged: dict[int, list[Row]] = {}
    for some in candidates(interpreted).values():
        for row in some:
            judged.setdefault(row["latent"], []).append(row)
    documents = {row["source_id"]: row for row in rows(tokens.path / "documents.parquet")} if tokens else {}

    def read(name: str) -> dict[int, list[Row]]:
        return of_latents(path / f"{name}.parquet", wanted)

    tables = _Tables(
        latents=read("latents"),
        examples=read("examples"),
        units=read("units"),
        stretches=read("stretches"),
        labels=named,
        judged=judged,
        documents=documents,
        unit=str(interpreted.summary.get("unit") or "author"),
    )
    files = "latents, examples, units and stretches.parquet"
    pages = [_card(latent, tables, number == 0) for number, latent in enumerate(wanted) if latent in tables.latents]
    return read_from(interpreted, files, pages)


def _card(latent: int, tables: _Tables, opened: bool) -> Latent:
    facts, judged = tables.latents[latent][0], tables.judged.get(latent, [])
    examples, label = tables.examples.get(latent, []), tables.labels.get(latent)
    shown = [(name, facts[key]) for key, name in _FACTS.items()]
    words = "; ".join(f"{row['concept']}: {row['reason']}" for row in judged if row["reason"])
    return Latent(
        latent=latent,
        name=label.name if label and label.holds else by_tokens(facts["top_tokens"]),
        verdicts=[(str(row["concept"]), str(row["verdict"])) for row in judged],
        reason=words,
        facts=shown,
        up=list(facts["top_logit_tokens"] or [])[:8],
        down=list(facts["bottom_logit_tokens"] or [])[:8],
        examples=[_example(row) for row in _of_kind(examples, "top")[:_PASSAGES]],
        facets=_facets(tables, latent),
        spread=_spread(facts["histogram"]),
        along=_along(tables.stretches.get(latent, []), tables.documents),
        more=[(heading, passages) for heading, passages in _more(examples) if passages],
        near=_near(facts),
        label=label,
        open=opened,
    )


def _facets(tables: _Tables, latent: int) -> list[Facet]:
    units, stretches = tables.units.get(latent, []), tables.stretches.get(latent, [])
    authors = [Share(str(r["unit"]), str(r["role"]), float(r["mean"]), r["low"], r["high"], _counted(r)) for r in units]
    works, eras = [], {}
    for row in stretches:
        document, means = tables.documents.get(row["source_id"], {}), row["mean"] or []
        if means:
            mean = fmean(means)
            works.append(Share(str(document.get("work") or row["source_id"]), str(document.get("role") or ""), mean))
            eras.setdefault(str(document.get("era") or "not given"), []).append(mean)
    roles: dict[str, list[float]] = {}
    for row in units:
        roles.setdefault(str(row["role"]), []).append(float(row["mean"]))
    found = [
        Facet(tables.unit, "Mean activation a token; the thin line is the 95 % interval of the mean.", authors),
        Facet("work", "Mean activation over the work.", works),
        Facet("era", "Mean over works; the thin line spans the lowest and the highest work.", _grouped(eras, "works")),
        Facet("role", "Mean over units; the thin line spans the lowest and the highest.", _grouped(roles, "units")),
    ]
    return [Facet(f.name, f.words, sorted(f.shares, key=lambda s: -s.value)[:_SHARES]) for f in found if f.shares]


def _counted(row: Row) -> str:
    over = f", interval over {row['interval']}" if row["interval"] else ""
    return f"{row['n_documents']} works, {row['n_tokens']:,} tokens{over}" if row["n_tokens"] is not None else ""


def _grouped(groups: Mapping[str, Sequence[float]], what: str) -> list[Share]:
    return [Share(name, "", fmean(v), min(v), max(v), f"{len(v)} {what}") for name, v in groups.items()]


def _spread(histogram: Sequence[int] | None) -> Curve | None:
    """How many tokens at which strength, on two logarithmic scales."""
    counts = list(histogram or [])
    used = [number for number, count in enumerate(counts) if count]
    if not used:
        return None
    part = counts[used[0] : used[-1] + 1]
    top = math.log1p(max(part))
    return Curve(
        "strengths", [round(math.log1p(c) / top, 3) for c in part],
        f"{sum(part):,} activations by strength, half octaves from weak to strong, counts on a logarithmic scale",
    )  # fmt: skip


def _along(stretches: Sequence[Row], documents: Mapping[str, Row]) -> list[Curve]:
    """The works in which it rises highest, each from its first to its last page, on one scale."""
    lines = [(row, [m for m in row["mean"] or [] if m == m]) for row in stretches]
    top = max((max(means) for _, means in lines if means), default=0.0)
    if top <= 0:
        return []
    found = sorted(((max(means), row, means) for row, means in lines if len(means) > 1), key=lambda line: -line[0])
    return [
        Curve(
            str(documents.get(row["source_id"], {}).get("work") or row["source_id"]),
            [round(mean / top, 3) for mean in means],
            f"highest stretch {high:.3g}, mean {fmean(means):.3g}",
        )
        for high, row, means in found[:_LINES]
    ]


def _near(facts: Row) -> list[tuple[str, list[tuple[int, float]]]]:
    pairs = {"Nearest decoder rows (cosine)": ("neighbours", "neighbour_cosines"),
             "Fires together with (Jaccard)": ("cofiring", "cofiring_jaccard")}  # fmt: skip
    found = [(name, list(zip(facts[ids] or [], facts[values] or [], strict=False)))
             for name, (ids, values) in pairs.items()]  # fmt: skip
    return [(name, [(int(i), float(v)) for i, v in some]) for name, some in found if some]


def _of_kind(examples: Sequence[Row], kind: str) -> list[Row]:
    return [row for row in examples if row["kind"] == kind]


def _more(examples: Sequence[Row]) -> list[tuple[str, list[Example]]]:
    """Passages across the latent's range, one a tenth, and those in which it is silent but nearly fires."""
    deciles: dict[int, Row] = {}
    for row in _of_kind(examples, "decile"):
        deciles.setdefault(row["decile"], row)
    near = [{**row, "activation": row["cosine"]} for row in _of_kind(examples, "near")]
    return [
        ("Across its range, a passage of each tenth", [_example(row) for row in deciles.values()]),
        ("Near misses: silent, by the cosine of the state to the latent's direction", [_example(r) for r in near]),
    ]


def _example(row: Mapping[str, Any]) -> Example:
    heat = [_known(h) for h in row.get("heat") or []]
    top = max(heat, default=0.0) or 1.0
    pieces = list(row.get("pieces") or [])
    strengths = ([max(0.0, h / top) for h in heat] + [0.0] * len(pieces))[: len(pieces)]
    year = f", {row['year']}" if row.get("year") else ""
    where = f"{row.get('work')} ({row.get('author')}{year}), {row.get('source_id')}"
    if row.get("char_start") is not None:
        where += f" {row['char_start']}-{row['char_end']}"
    return Example(pieces, strengths, _known(row.get("activation")), where)


def _known(value: Any) -> float:
    """The number, 0 where there is none."""
    return float(value) if value is not None and value == value else 0.0
