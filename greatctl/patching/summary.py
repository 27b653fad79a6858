"""What a person looks at first: the peak of a sweep, its summary, and the panels of a heat map or a list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa

from .. import stats

__all__ = ["panels", "peak", "power", "summary"]

_NEARLY = 1 - 1e-6  # cells this close to the largest count as equal, so that rounding does not choose the peak
_LEVEL = 0.05
_UNIT = ("head", "neuron", "latent", "part", "edge", "span", "layers")  # what a cell may be besides layer and position


def summary(
    cells: pa.Table, ends: Mapping[str, Sequence[tuple[float, float]]], *, n_refused: int, n_units: int | None = None
) -> dict[str, object]:
    """The fixed keys of a sweep's summary; without a suffix they are the first metric's, `metrics` maps all
    of them.

    Args:
        cells: the means over pairs (`cell_table`).
        ends: metric -> (clean, corrupted) of every executed pair.
        n_refused: pairs that were not executed.
        n_units: independent units among the pairs (clusters); default the pairs.
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
    units = n_pairs if n_units is None else n_units
    looks, floor = int(cells["looks"][0].as_py()), float(cells["floor"][0].as_py())
    searched = _is_list(cells)
    reachable = not stats.out_of_reach(floor, _LEVEL, max(looks, 1) if searched else 1)
    positions = [at for at in cells["position_from_end"].to_pylist() if at is not None]
    return {
        "n_pairs": n_pairs,
        "n_refused": n_refused,
        "metric": first,
        "method": cells["method"][0].as_py(),
        "site": cells["site"][0].as_py(),
        "n_layers": len(cells["layer"].unique()),
        "n_positions": -min(positions) if positions else 1,
        "clean": metrics[first]["clean"],
        "corrupted": metrics[first]["corrupted"],
        "peak": metrics[first]["peak"],
        "metrics": metrics,
        "smallest_p": floor,
        "looks": looks,
        "correction": "false discovery rate" if searched else "max-T",
        "reachable": reachable,
        "smallest_detectable_effect": stats.smallest_detectable_effect(units, alpha=_LEVEL / looks)
        if reachable and units > 1 and looks
        else None,
        "power": power(n_pairs, looks, floor, searched=searched, n_units=units),
        "untested": _untested(cells) if n_pairs > 1 else [],
    }


def power(n: int, looks: int, floor: float, *, searched: bool = False, n_units: int | None = None) -> str:
    """What so many pairs can find, in one sentence, and the smallest p-value against what the looks ask for.

    Args:
        n: pairs.
        looks: cells that are corrected for together.
        floor: the smallest p-value that can come out.
        searched: whether false discoveries are controlled (neurons, latents) instead of the family-wise error.
        n_units: independent units among the pairs (clusters); default the pairs.
    """
    units = n if n_units is None else n_units
    asked = _LEVEL / looks if searched and looks else _LEVEL
    how = f"{looks:,} looks by false discovery rate" if searched else f"{looks:,} looks by max-T"
    reach = "within reach of" if floor <= asked else "out of reach of"
    smallest = (
        f"the smallest p that can come out is {floor:.2g}, {reach} the {asked:.2g} that one finding among {how} needs "
        "(in each metric and direction)"
    )
    who = f"{n} pair{'s' * (n != 1)}" + (f" in {units} cluster{'s' * (units != 1)}" if units != n else "")
    if units < 2 or not looks:
        return f"with {who} no effect can be tested; {smallest}"
    if floor > asked:
        return f"with {who} there is no smallest detectable effect, since none can pass, however large; {smallest}"
    least = stats.smallest_detectable_effect(units, alpha=_LEVEL / looks)
    return (
        f"with {who} the smallest detectable effect is {least:.2f} standard deviations of the "
        f"{'pairs' if units == n else 'clusters'}' effects (80 % power, 5 % over {looks:,} looks); {smallest}"
    )


def peak(cells: pa.Table, metric: str, direction: str) -> dict[str, object]:
    """The cell with the largest mean effect, in size, among those that every pair has; single layers and real
    units only.

    Returns `layer`, `position` (absolute where all prompts are of one length; otherwise from the end, -1
    being the answer position; None where a cell is no single position), `position_from_end`, `direction`,
    `effect` (mean, in the metric's unit), `normalised_effect`, `low` and `high` of the effect, `p_max_t` or
    `q_value`, the `method`, the `exact` effect (None for an estimate that was not verified), and what else
    names the cell. Of equal cells it is the first, in the order of layers.
    """
    rows = [r for r in cells.to_pylist() if r["metric"] == metric and r["direction"] == direction]
    rows = [r for r in rows if r["layers"] is None and r["part"] is None] or rows
    most = max(r["n_pairs"] for r in rows)
    rows = [r for r in rows if r["n_pairs"] == most]
    largest = max(abs(r["mean_effect"]) for r in rows)
    row = next(r for r in rows if abs(r["mean_effect"]) >= largest * _NEARLY)
    position = row["position_from_end"] if row["position"] is None else row["position"]
    keys = ("layer", "position_from_end", "direction", "normalised_effect", "low", "high", "p_max_t", "q_value")
    keys += ("method", "exact")
    named = {key: row[key] for key in _UNIT if row[key] is not None}
    return {"position": position, "effect": row["mean_effect"], **{key: row[key] for key in keys}, **named}


def panels(cells: pa.Table, tokens: Sequence[Sequence[str]]) -> list[dict[str, object]]:
    """What a picture needs, one panel per metric and direction (and one more for windows of layers).

    A `map` has the keys `columns` (what they are: `position`, `span` or `head`), `positions` (their numbers or
    names), `labels` (the token where all pairs share it, else ""), `layers` (the rows' names), and `matrix` and
    `p` ([rows][columns]; normalised effect and max-T p-value, None where unknown; of a head that was patched at
    several places the strongest). A `list`, for neurons and latents, has `rows`: cells, strongest first. Both
    have `kind`, `metric`, `direction` and `neutral`, the normalised effect of a patch that does nothing (0
    denoising, 1 noising) and the `method`.
    """
    found: dict[tuple[str, str, bool], list[dict]] = {}
    for row in cells.to_pylist():
        found.setdefault((row["metric"], row["direction"], row["layers"] is not None), []).append(row)
    made = []
    for (metric, direction, window), rows in found.items():
        neutral = 0.0 if direction == "denoising" else 1.0
        head = {"metric": metric, "direction": direction, "neutral": neutral, "windows": window}
        head["method"] = rows[0]["method"]
        made.append({**head, **(_listed(rows) if _is_list(cells) else _map(rows, tokens))})
    return made


def _untested(cells: pa.Table) -> list[str]:
    """Metrics and directions without p-values, since their effects can only have one sign (see `cell_table`)."""
    known = {f"{r['metric']}, {r['direction']}": False for r in cells.select(["metric", "direction"]).to_pylist()}
    for row in cells.select(["metric", "direction", "p"]).to_pylist():
        known[f"{row['metric']}, {row['direction']}"] |= row["p"] is not None
    return [name for name, tested in known.items() if not tested]


def _is_list(cells: pa.Table) -> bool:
    return any(cells[name].null_count < len(cells) for name in ("neuron", "latent", "part", "edge"))


def _listed(rows: Sequence[dict]) -> dict[str, object]:
    parts = [row for row in rows if row["part"] is not None]
    others = sorted((r for r in rows if r["part"] is None), key=lambda r: -abs(r["mean_effect"]))
    return {"kind": "list", "rows": [*parts, *others]}


def _map(rows: Sequence[dict], tokens: Sequence[Sequence[str]]) -> dict[str, object]:
    across = "head" if rows[0]["head"] is not None else "position_from_end" if rows[0]["span"] is None else "span"
    names = list(dict.fromkeys(row[across] for row in rows))
    names = names if across == "span" else sorted(names)
    layers = list(dict.fromkeys(row["layers"] or str(row["layer"]) for row in rows))
    grid: dict[tuple[str, object], dict] = {}
    for row in rows:
        key = row["layers"] or str(row["layer"]), row[across]
        if key not in grid or abs(row["mean_effect"]) > abs(grid[key]["mean_effect"]):
            grid[key] = row

    def matrix(key: str) -> list[list[float | None]]:
        return [[grid[layer, name][key] if (layer, name) in grid else None for name in names] for layer in layers]

    labels = [""] * len(names)
    if across == "position_from_end":
        for at, place in enumerate(names):
            here = {str(row[place]) for row in tokens if len(row) >= -place}
            labels[at] = here.pop() if len(here) == 1 else ""
    return {
        "kind": "map",
        "columns": "position" if across == "position_from_end" else across,
        "positions": names,
        "labels": labels,
        "layers": layers,
        "matrix": matrix("normalised_effect"),
        "p": matrix("p_max_t"),
    }
