"""What `patch --circuit` leaves: circuit.json, six tables, and the summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..patching.circuits import Circuit
from ..patching.components import ComponentRuns, layer_of
from ..patching.faithfulness import Ends
from ..patching.graph import parse_edge, parse_node
from ..patching.study import Curve, Judged, verdict
from ..patching.tables import pair_table
from ..store.files import write_text
from ..store.tables import write_table

if TYPE_CHECKING:
    from .circuit_search import Search

__all__ = ["Measured", "write"]

_LISTED = 50  # components in the summary; all are in circuit.json
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Measured:
    """A circuit and the curve of the best sets under one ablation.

    Attributes:
        ends: what nothing and everything kept does.
        line: the curve.
        both: [2, n_pairs] the metric with the circuit alone, and with everything else.
    """

    ablation: str
    ends: Ends
    line: Curve
    both: NDArray[np.float64]


def write(
    search: Search,
    folder: Path,
    circuit: Circuit,
    runs: ComponentRuns,
    scores: NDArray[np.float64],
    judged: Judged,
    measured: Sequence[Measured],
    rows: tuple[Mask, Mask],
    clusters: Sequence[object],
) -> dict[str, object]:
    """Write everything; returns the summary."""
    write_text(folder / "circuit.json", circuit.to_json())
    inside = judged.keep
    method = search.job.method
    columns = {"component": list(runs.names), "score": scores.tolist(), "in_circuit": inside.tolist()}
    columns |= {"method": [method] * len(inside), "approximate": [method != "exact"] * len(inside)}
    write_table(folder / "components.parquet", columns)
    write_table(folder / "faithfulness.parquet", _by_pair(search, runs, judged, measured, rows))
    write_table(folder / "curve.parquet", _curves(measured))
    draws = list(range(len(judged.random_f)))
    size = [int(inside.sum())] * len(draws)
    write_table(folder / "random_sets.parquet", {"draw": draws, "n": size, "faithfulness": judged.random_f.tolist()})
    write_table(folder / "minimality.parquet", _minimality(runs, scores, judged, method))
    write_table(folder / "pairs.parquet", pair_table(search.job.pairs, search.executed, search.refused, search.words))
    return _summary(search, circuit, runs, scores, judged, measured, rows, clusters)


def _by_pair(
    search: Search, runs: ComponentRuns, judged: Judged, measured: Sequence[Measured], rows: tuple[Mask, Mask]
) -> dict[str, list]:
    """A row a pair, ablation and set; `set` is empty, full, circuit, complement or top (the best by score)."""
    total, n = len(judged.keep), int(judged.keep.sum())
    columns: dict[str, list] = {}
    for one in measured:
        sets: list[tuple[str, int, NDArray[np.float64]]] = [
            ("empty", 0, one.ends.empty),
            ("full", total, one.ends.full),
            ("circuit", n, one.both[0]),
            ("complement", total - n, one.both[1]),
            *(("top", count, values) for count, values in zip(one.line.counts, one.line.values, strict=True)),
        ]
        for name, count, values in sets:
            f = one.ends.each(values)
            for at, pair in enumerate(runs.pairs):
                row = {
                    "pair": pair.pair.id,
                    "heldout": pair.pair.heldout,
                    "judges": bool(rows[1][at]),
                    "ablation": one.ablation,
                    "kind": search.job.kind,
                    "per_token": False,
                    "metric": search.job.metric,
                    "set": name,
                    "n": count,
                    "share": count / total,
                    "value": float(values[at]),
                    "faithfulness": float(f[at]),
                }
                for key, value in row.items():
                    columns.setdefault(key, []).append(value)
    return columns


def _curves(measured: Sequence[Measured]) -> dict[str, list]:
    """A row a size and ablation: f over the judging pairs with its interval."""
    columns: dict[str, list] = {key: [] for key in ("ablation", "share", "n", "faithfulness", "low", "high")}
    for one in measured:
        f = one.line.f
        columns["ablation"] += [one.ablation] * len(one.line.sizes)
        columns["share"] += list(one.line.sizes)
        columns["n"] += list(one.line.counts)
        for key, values in (("faithfulness", f.mean), ("low", f.low), ("high", f.high)):
            columns[key] += values.tolist()
    return columns


def _minimality(runs: ComponentRuns, scores: NDArray[np.float64], judged: Judged, method: str) -> dict[str, list]:
    """A row a component that was taken out; `score` is by `method`, `change` was run."""
    found = judged.minimality
    return {
        "component": [runs.names[at] for at in judged.removed],
        "score": scores[judged.removed].tolist(),
        "method": [method] * len(judged.removed),
        "change": found.change.tolist(),
        "beaten": found.beaten.tolist(),
        "draws": [len(found.others)] * len(judged.removed),
        "p_value": found.p.tolist(),
        "needed": found.needed.tolist(),
    }


def _summary(
    search: Search,
    circuit: Circuit,
    runs: ComponentRuns,
    scores: NDArray[np.float64],
    judged: Judged,
    measured: Sequence[Measured],
    rows: tuple[Mask, Mask],
    clusters: Sequence[object],
) -> dict[str, object]:
    """The fixed keys of `patch`, and `circuit`."""
    job, ends = search.job, list(search.ends.values())
    order = sorted(np.flatnonzero(judged.keep).tolist(), key=lambda at: -abs(scores[at]))
    best = order[0] if order else int(np.argmax(np.abs(scores)))
    peak = {
        "layer": _layer(runs.names[best], job.kind),
        "position": None,
        "effect": float(scores[best]),
        "method": job.method,
        "approximate": job.method != "exact",
        "component": runs.names[best],
        "direction": " and ".join(job.directions),
    }
    clean, corrupted = (float(np.mean([pair[side] for pair in ends])) for side in (0, 1))
    steps = search.two_step([pair for pair, judges in zip(runs.pairs, rows[1], strict=True) if judges])
    errors = search.errors(runs, measured[0].ends, rows[1])
    told: dict[str, Any] = {
        "kind": job.kind,
        "size": len(order),
        "of": len(runs.names),
        "n_heads": search.model.n_heads,
        "n_kv_heads": search.model.n_kv_heads,
        "components": [runs.names[at] for at in order[:_LISTED]],
        "selection": circuit.selection if job.file is None else "by hand",
        "scores": job.method if job.file is None else "of the file",
        "approximate": job.method != "exact",
        "per_token": False,
        **_worth(judged, measured, rows, job.kind),
        "other_ablation": _other(measured[1], rows[1], clusters),
        **({"saes": [sae.path.name for sae in job.saes.values()]} if job.saes else {}),
        **({"error_terms": errors} if errors else {}),
        **({"two_step": {"found": steps.found, "carried": steps.carried, "why": steps.why}} if steps else {}),
    }
    return {
        "n_pairs": len(search.executed),
        "n_refused": len(search.refused),
        "metric": job.metric,
        "method": job.method,
        "site": job.kind,
        "n_layers": search.model.n_layers,
        "n_positions": max(len(pair.clean_ids) for pair in search.executed),
        "clean": clean,
        "corrupted": corrupted,
        "peak": peak,
        "metrics": {job.metric: {"clean": clean, "corrupted": corrupted, "peak": peak}},
        "model": job.info.name,
        "circuit": _plain(told),
    }


def _worth(judged: Judged, measured: Sequence[Measured], rows: tuple[Mask, Mask], kind: str) -> dict[str, Any]:
    """What was measured of the circuit, and the verdict."""
    held_out = bool((rows[0] != rows[1]).any())
    found, line = judged.sufficiency, measured[0].line
    return {
        "ablation": measured[0].ablation,
        "chosen_on": int(rows[0].sum()),
        "judged_on": int(rows[1].sum()),
        "held_out": held_out,
        "faithfulness": _interval(judged.f),
        "faithfulness_of_choice": judged.f_chosen,
        "complement": _interval(judged.left),
        "cpr": line.areas.cpr,
        "cmd": line.areas.cmd,
        "random": {
            "draws": found.draws,
            "as_good": found.draws - found.beaten,
            "p_value": found.p,
            "floor": found.floor,
        },
        "needed": int(judged.minimality.needed.sum()),
        "looked_at": len(judged.removed),
        "verdict": verdict(judged, kind, held_out=held_out),
    }


def _other(one: Measured, judging: Mask, clusters: Sequence[object]) -> dict[str, Any]:
    """What the same set does under the other ablation."""
    f = one.ends.interval(one.both, judging, clusters)
    return {
        "ablation": one.ablation,
        "faithfulness": float(f.mean[0]),
        "low": float(f.low[0]),
        "high": float(f.high[0]),
        "complement": float(f.mean[1]),
        "cpr": one.line.areas.cpr,
        "cmd": one.line.areas.cmd,
    }


def _interval(f: Any) -> dict[str, float]:
    return {"value": float(f.mean[0]), "low": float(f.low[0]), "high": float(f.high[0])}


def _plain(value: Any) -> Any:
    """JSON values: what is not finite becomes None."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _layer(name: str, kind: str) -> int:
    """The layer of a component; that of its sender for an edge."""
    if kind == "latents":
        return layer_of(name)
    return (parse_edge(name).sender if kind == "edges" else parse_node(name)).layer
