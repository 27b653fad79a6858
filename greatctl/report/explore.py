"""The latents that one can search and sort on the page, thousands of them without a server.

The page has a size that it must not pass, however many latents there are. So the candidates come first, then what
separates most, then what fires most; at most `ROWS` latents are listed, and passages go with them until `BYTES` are
used up. What is left out is counted in words.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..store.artifact import Artifact
from .tables import Row, columns, of_latents, rows
from .view import Block, Index, Label, Prose, read_from

__all__ = ["BYTES", "ROWS", "index"]

ROWS = 4000
BYTES = 3_500_000  # of labels and passages, in UTF-8
_PASSAGES = 2
_UNITS = 6
_WORDS = 3
_NUMBERS = {"density": 3, "max": 3, "mean_when_firing": 3, "token_share": 2}
_LISTS = {"tokens": "top_tokens", "up": "top_logit_tokens", "down": "bottom_logit_tokens"}
_JUDGED = {"effect": 3, "auroc": 3, "heldout_auroc": 2, "q_value": 2}


def index(interpreted: Artifact, first: Sequence[int], named: Mapping[int, Label]) -> list[Block]:
    """The list of latents, those of `first` at its head and those with a label next."""
    path = interpreted.path
    contrasts = columns(path / "contrasts.parquet", ["concept", "latent", "verdict", *_JUDGED])
    latents = columns(path / "latents.parquet", ["latent", "density"])
    if not latents.get("latent"):
        return [Prose("No latent was read for this run.", quiet=True)]
    order = _order(latents, contrasts, [*first, *named])[:ROWS]
    facts = {row["latent"]: row for row in rows(path / "latents.parquet", latents=order)}
    labels = {latent: named[latent] for latent in order if latent in named}
    wanted = ["latent", "kind", "rank", "activation", "source_id", "work", "author", "pieces", "heat"]
    examples = of_latents(path / "examples.parquet", order, wanted)
    units = of_latents(path / "units.parquet", order, ["latent", "unit", "role", "mean"])
    pages, names, places = _pages(order, examples, units, BYTES - _size({k: asdict(v) for k, v in labels.items()}))
    n_all, n_pages = len(latents["latent"]), sum(page is not None for page in pages)
    found = Index(
        columns=_columns([facts[latent] for latent in order], labels),
        judged=_judged(contrasts, order),
        pages=pages,
        units=names,
        places=places,
        n_all=n_all,
        n_pages=n_pages,
        words=_words(n_all, len(order), n_pages, bool(contrasts.get("latent")), bool(labels)),
        labels=labels,
    )
    return read_from(interpreted, "latents, contrasts, examples and units.parquet", [found])


def _words(n_all: int, listed: int, pages: int, judged: bool, labelled: bool) -> str:
    order = ", the candidates first, then those with a label, those that separate most, and those that fire most"
    said = [f"{listed:,} of {n_all:,} latents are listed{order if listed < n_all else ''}"]
    if listed < n_all:
        said.append(f"{n_all - listed:,} are left out for the size of this page")
    if pages < listed:
        said.append(f"for {listed - pages:,} of them there was no room for passages")
    turned = " AUROC below 0.5 is lower in characters; held out, above 0.5 is as among the others." if judged else ""
    turned += " Detection and fuzzing are a label's scores, in brackets those of another latent's." if labelled else ""
    return f"{'; '.join(said)}.{turned} All are in latents.parquet and examples.parquet."


def _order(latents: dict[str, list], contrasts: dict[str, list], first: Sequence[int]) -> list[int]:
    """All latents, those that matter first."""
    strongest: dict[int, float] = {}
    for latent, effect in zip(contrasts.get("latent", []), contrasts.get("effect", []), strict=False):
        if effect is not None and math.isfinite(effect):
            strongest[latent] = max(strongest.get(latent, 0.0), abs(effect))
    density = dict(zip(latents["latent"], latents.get("density") or [0.0] * len(latents["latent"]), strict=True))
    head = [latent for latent in dict.fromkeys(first) if latent in density]
    rest = density.keys() - set(head)
    return head + sorted(rest, key=lambda n: (-strongest.get(n, -1.0), -(density[n] or 0.0), n))


def _columns(facts: Sequence[Row], labels: Mapping[int, Label]) -> dict[str, list[object]]:
    found: dict[str, list[object]] = {"latent": [row["latent"] for row in facts]}
    for name, digits in _NUMBERS.items():
        found[name] = [_round(row[name], digits) for row in facts]
    for name, column in _LISTS.items():
        found[name] = [list(row[column] or [])[:_WORDS] for row in facts]
    shown = [labels.get(row["latent"]) for row in facts]
    found["label"] = [label.name if label and label.holds else "" for label in shown]
    for task in dict.fromkeys(score.task for label in shown if label for score in label.scores):
        found[task] = [_score(label, task) for label in shown]
    return found


def _judged(contrasts: dict[str, list], order: Sequence[int]) -> dict[str, dict[str, list[object]]]:
    """For each concept what its test says of the listed latents, None where it says nothing."""
    place = {latent: number for number, latent in enumerate(order)}
    found: dict[str, dict[str, list[object]]] = {}
    names = [name for name in (*_JUDGED, "verdict") if name in contrasts]
    for number, (concept, latent) in enumerate(
        zip(contrasts.get("concept", []), contrasts.get("latent", []), strict=False)
    ):
        if latent not in place:
            continue
        columns_of = found.setdefault(str(concept), {name: [None] * len(order) for name in names})
        for name in names:
            value = contrasts[name][number]
            columns_of[name][place[latent]] = _round(value, _JUDGED[name]) if name in _JUDGED else value
    return found


def _pages(
    order: Sequence[int], examples: dict[int, list[Row]], units: dict[int, list[Row]], room: int
) -> tuple[list[dict[str, Any] | None], list[list[str]], list[str]]:
    """A small page for each latent as long as there is room, and the names that the pages point to by number."""
    names: dict[tuple[str, str], int] = {}
    places: dict[str, int] = {}
    pages: list[dict[str, Any] | None] = []
    for latent in order:
        top = [row for row in examples.get(latent, []) if row["kind"] in (None, "top")][:_PASSAGES]
        passages = [_passage(row, places) for row in top]
        means = sorted(units.get(latent, []), key=lambda row: -row["mean"])[:_UNITS]
        bars = [[names.setdefault((str(r["unit"]), str(r["role"])), len(names)), _round(r["mean"], 3)] for r in means]
        page = {"p": passages, "u": bars}
        room -= _size(page)
        pages.append(page if room > 0 else None)
    return pages, [list(name) for name in names], list(places)


def _passage(row: Row, places: dict[str, int]) -> list[object]:
    pieces, heat = list(row["pieces"] or []), [h if h == h else 0.0 for h in row["heat"] or []]
    top = max(heat, default=0.0) or 1.0
    digits = "".join(str(round(9 * max(0.0, h) / top)) for h in heat)[: len(pieces)].ljust(len(pieces), "0")
    where = f"{row['work']} ({row['author']}), {row['source_id']}"
    return [pieces, digits, _round(row["activation"], 3), places.setdefault(where, len(places))]


def _score(label: Label | None, task: str) -> list[float | None] | None:
    """What a label scored, beside what another latent's label did."""
    found = next((score for score in label.scores if score.task == task), None) if label else None
    return None if found is None or found.value is None else [_round(found.value, 2), _round(found.shuffled, 2)]


def _size(value: object) -> int:
    return len(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())


def _round(value: float | None, digits: int) -> float | None:
    """The number with so many digits that count; None where there is none."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}")
