"""What a person looks at first: the peak of a sweep, its summary, and the panels of a heat map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa

from .. import stats

__all__ = ["panels", "peak", "summary"]

_NEARLY = 1 - 1e-6  # cells this close to the largest count as equal, so that rounding does not choose the peak


def summary(cells: pa.Table, ends: Mapping[str, Sequence[tuple[float, float]]], *, n_refused: int) -> dict[str, object]:
    """The fixed keys of a sweep's summary; without a suffix they are the first metric's, `metrics` maps all
    of them.

    Args:
        cells: the means over pairs (`cell_table`).
        ends: metric -> (clean, corrupted) of every executed pair.
        n_refused: pairs that were not executed.
    """
    directions = list(dict.fromkeys(cells["direction"].to_pylist()))
    metrics: dict[str, dict[str, object]] = {}
    for name, values in ends.items():
        peaks = {direction: peak(cells, name, direction) for direction in directions}
        metrics[name] = {
            "clean": sum(clean for clean, _ in values) / len(values),
            "corrupted": sum(corrupted for _, corrupted in values) / len(values),
            "peak": peaks[directions[0]],
            "peaks": peaks,
        }
    first = next(iter(ends))
    n_pairs = len(ends[first])
    n_layers = 1 + max(cells["layer"].to_pylist())
    n_positions = -min(cells["position_from_end"].to_pylist())
    detectable = stats.smallest_detectable_effect(n_pairs, alpha=0.05 / (n_layers * n_positions))
    return {
        "n_pairs": n_pairs,
        "n_refused": n_refused,
        "metric": first,
        "site": cells["site"][0].as_py(),
        "n_layers": n_layers,
        "n_positions": n_positions,
        "clean": metrics[first]["clean"],
        "corrupted": metrics[first]["corrupted"],
        "peak": metrics[first]["peak"],
        "metrics": metrics,
        "smallest_p": cells["floor"][0].as_py(),
        "smallest_detectable_effect": detectable if n_pairs > 1 else None,
    }


def peak(cells: pa.Table, metric: str, direction: str) -> dict[str, object]:
    """The cell with the largest mean effect, in size, among those that every pair has.

    Returns `layer`, `position` (absolute where all prompts are of one length; otherwise from the end, -1
    being the answer position), `position_from_end`, `direction`, `effect` (mean, in the metric's unit),
    `normalised_effect`, `low` and `high` of the effect, and `p_max_t`. Of equal cells it is the first, in
    the order of layers.
    """
    rows = [r for r in cells.to_pylist() if r["metric"] == metric and r["direction"] == direction]
    most = max(r["n_pairs"] for r in rows)
    rows = [r for r in rows if r["n_pairs"] == most]
    largest = max(abs(r["mean_effect"]) for r in rows)
    row = next(r for r in rows if abs(r["mean_effect"]) >= largest * _NEARLY)
    position = row["position_from_end"] if row["position"] is None else row["position"]
    keys = ("layer", "position_from_end", "direction", "normalised_effect", "low", "high", "p_max_t")
    return {"position": position, "effect": row["mean_effect"], **{key: row[key] for key in keys}}


def panels(cells: pa.Table, tokens: Sequence[Sequence[str]]) -> list[dict[str, object]]:
    """What a heat map needs, one panel per metric and direction.

    Keys: `metric`, `direction`, `positions` (from the end), `labels` (the token where all pairs share it,
    else ""), `matrix` and `p` ([n_layers][n_positions]; normalised effect and max-T p-value, None where
    unknown), and `neutral`, the normalised effect of a patch that does nothing (0 denoising, 1 noising).
    """
    rows = cells.to_pylist()
    found: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        found.setdefault((row["metric"], row["direction"]), []).append(row)
    positions = sorted({row["position_from_end"] for row in rows})
    labels = []
    for place in positions:
        here = {row[place] for row in tokens if len(row) >= -place}
        labels.append(here.pop() if len(here) == 1 else "")
    made = []
    for (metric, direction), part in found.items():
        grid = {(r["layer"], r["position_from_end"]): r for r in part}
        layers = range(1 + max(r["layer"] for r in part))

        def matrix(key: str, grid: dict = grid, layers: range = layers) -> list[list[float | None]]:
            return [[grid[layer, place][key] for place in positions] for layer in layers]

        made.append(
            {
                "metric": metric,
                "direction": direction,
                "positions": positions,
                "labels": labels,
                "matrix": matrix("normalised_effect"),
                "p": matrix("p_max_t"),
                "neutral": 0.0 if direction == "denoising" else 1.0,
            }
        )
    return made
