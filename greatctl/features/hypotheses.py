"""From feature tables to written hypotheses, each with its verdict.

    contrasts.parquet   characters against controls, for every latent that fires
    hypotheses.parquet  the candidates, with verdict, reason and the baselines that are still missing

Candidates are chosen on training units alone. All latents that fire are in the family of tests, so the choice
is paid for in full.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..store.tables import write_table
from .judgement import Judgement, weigh
from .tables import FeatureTables
from .units import gather

__all__ = ["BASELINES", "COMPANIONS", "Hypotheses", "weigh_latents", "write_hypotheses"]

COMPANIONS = ("SAE with a frozen decoder", "SAE on a random model", "SAEs of other seeds")  # of `train --controls`
# what a claim must be printed next to; a claim that misses one says so
BASELINES = (
    *COMPANIONS,
    "difference of means",
    "logistic probe",
    "neurons and principal components",
    "word and character n-grams",
    "arbitrary labels",
    "placebo directions",
)


@dataclass(frozen=True)
class Hypotheses:
    """Verdicts on every latent that fires (`judgement.rows`), and which of them are candidates."""

    judgement: Judgement
    candidates: list[int]


def weigh_latents(
    tables: FeatureTables,
    documents: Sequence[Mapping[str, object]],
    unit: str,
    alive: Sequence[int],
    *,
    n_candidates: int,
    seed: int = 0,
) -> Hypotheses:
    """Weigh all latents in `alive` on the mean activations of documents; candidates differ most among
    training units.

    Args:
        unit: the document column that names the unit (`author` or `unit`).
    """
    read = [i for i, n in enumerate(tables.document_tokens.tolist()) if n]
    rows = [{**documents[i], "author": documents[i][unit]} for i in read]
    cells = gather(tables.document_means[read][:, list(alive)], rows)
    found = weigh(replace(cells, unit="author" if unit == "author" else "subject"), seed=seed)
    for row, latent in zip(found.rows, alive, strict=True):
        row["latent"] = latent
    training = ~cells.heldout
    chosen = _strongest(cells.author_means[training], cells.author_role[training], n_candidates)
    return Hypotheses(found, [alive[i] for i in chosen])


def _strongest(means: NDArray[np.float64], role: NDArray[np.bool_], n: int) -> list[int]:
    """The n columns with the largest difference of roles, in standard deviations over units."""
    if not role.any() or role.all():
        return list(range(min(n, means.shape[1])))
    spread = np.maximum(means.std(axis=0), np.finfo(float).tiny)
    size = np.abs(means[role].mean(axis=0) - means[~role].mean(axis=0)) / spread
    return np.argsort(-size, kind="stable")[:n].tolist()


def write_hypotheses(
    folder: Path, concept: str, unit: str, found: Hypotheses, *, missing: Sequence[str] = BASELINES
) -> list[dict[str, object]]:
    """Write contrasts.parquet (all rows) and hypotheses.parquet (the candidates'); returns the latter.

    Supported ones come first, then by size of effect. `missing` names the baselines that were not computed.
    """
    judged = found.judgement
    shared = {
        "concept": concept,
        "unit": unit,
        "n_characters": judged.n_characters,
        "n_controls": judged.n_controls,
    }
    table = [{**shared, **row} for row in judged.rows]
    write_table(folder / "contrasts.parquet", pa.Table.from_pylist(table, schema=_CONTRASTS))
    rows = _shown_order([row for row in table if row["latent"] in set(found.candidates)])
    full = [{**row, "missing": list(missing)} for row in rows]
    schema = _CONTRASTS.append(pa.field("missing", pa.list_(pa.string())))
    write_table(folder / "hypotheses.parquet", pa.Table.from_pylist(full, schema=schema))
    return rows


def _shown_order(rows: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """Rows in the order in which they are shown."""

    def order(row: Mapping[str, Any]) -> tuple[bool, float, int]:
        return row["verdict"] != "supported", -abs(row["effect"]), row["latent"]

    return [dict(row) for row in sorted(rows, key=order)]


_CONTRASTS = pa.schema(
    [
        ("concept", pa.string()),
        ("unit", pa.string()),
        ("latent", pa.int32()),
        ("effect", pa.float64()),
        ("auroc", pa.float64()),
        ("p_value", pa.float64()),
        ("q_value", pa.float64()),
        ("verdict", pa.string()),
        ("reason", pa.string()),
        ("icc", pa.float64()),
        ("n_characters", pa.int32()),
        ("n_controls", pa.int32()),
    ]
)
