"""One latent as a page, from the sealed tables: nothing is computed again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

__all__ = ["latent_page", "marked_place"]

_FACTS = (
    "latent", "density", "mean", "mean_when_firing", "max", "fired", "histogram", "token_share", "position_share",
    "token_ids_apart", "logit_kurtosis", "logit_skew", "top_tokens",
)  # fmt: skip
_PASSAGE = (
    "kind", "decile", "rank", "window", "position", "activation", "cosine", "source_id", "work", "author", "unit",
    "role", "year", "char_start", "char_end", "before", "token", "after", "pieces", "heat",
)  # fmt: skip
_UNIT = ("unit", "role", "mean", "low", "high", "interval", "density", "n_documents")
_TABLES = ("latents", "units", "contrasts", "examples", "stretches")


def latent_page(folder: Path, latent: int) -> dict[str, object]:
    """Everything that the tables in `folder` say about a latent, as JSON values.

    Keys: the columns of latents.parquet, with top_logits and bottom_logits ([{token, logit}]), neighbours
    ([{latent, cosine}]) and cofiring ([{latent, jaccard}]); units ([{unit, role, mean, low, high, interval, density,
    n_documents}], strongest first); contrasts (rows of contrasts.parquet, one a concept, none for a latent that never
    fires) and contrast, the first of them; examples (strongest passages), deciles and near ([{…, pieces, heat, marked}],
    `marked` is the place in `pieces` of the token that the passage is shown for); along ([{source_id, mean}], the mean
    activation in stretches of each work, strongest first).
    """
    rows = {name: _rows(folder, name, latent) for name in _TABLES}
    facts = rows["latents"][0]
    contrasts = [_known(row) for row in rows["contrasts"]]
    passages = [_passage(row) for row in rows["examples"]]
    return {
        **_known({name: facts[name] for name in _FACTS}),
        **{
            f"{side}_logits": _pairs("token", facts[f"{side}_logit_tokens"], "logit", facts[f"{side}_logits"])
            for side in ("top", "bottom")
        },
        "neighbours": _pairs("latent", facts["neighbours"], "cosine", facts["neighbour_cosines"]),
        "cofiring": _pairs("latent", facts["cofiring"], "jaccard", facts["cofiring_jaccard"]),
        "units": [_known({n: row[n] for n in _UNIT}) for row in sorted(rows["units"], key=lambda r: -r["mean"])],
        "contrast": contrasts[0] if contrasts else None,
        "contrasts": contrasts,
        "examples": [row for row in passages if row["kind"] == "top"],
        "deciles": [row for row in passages if row["kind"] == "decile"],
        "near": [row for row in passages if row["kind"] == "near"],
        "along": [
            {"source_id": row["source_id"], "mean": row["mean"]}
            for row in sorted(rows["stretches"], key=lambda r: -max(r["mean"], default=0.0))
        ],
    }


def _pairs(name: str, first: Sequence[object], other: str, second: Sequence[object]) -> list[dict[str, object]]:
    return [{name: a, other: b} for a, b in zip(first, second, strict=True)]


def _known(row: Mapping[str, object]) -> dict[str, object]:
    """The row with None for what is no finite number."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def _passage(row: Mapping) -> dict[str, object]:
    """A row of examples.parquet with the place of its marked token."""
    return {**{name: row[name] for name in _PASSAGE}, "marked": marked_place(row)}


def marked_place(row: Mapping) -> int:
    """The place in `pieces` of the token that a passage is shown for."""
    done = 0
    for i, piece in enumerate(row["pieces"]):
        if done == len(row["before"]) and piece:
            return i
        done += len(piece)
    return 0


def _rows(folder: Path, name: str, latent: int) -> list[dict]:
    table = pq.read_table(folder / f"{name}.parquet", filters=pc.field("latent") == latent)
    return table.to_pylist()
