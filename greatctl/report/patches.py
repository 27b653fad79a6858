"""The section on patching: a map for each metric and direction with its numbers on hover (or a table, where neurons,
latents or edges were patched), what so many pairs can find, and the pairs. Where effects are estimates by gradients,
every title says so, and a calibration plot shows them against the cells that were run exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..store.artifact import Artifact
from .charts import heat_map, points
from .tables import rows as read_rows
from .view import Block, Finding, Origin, Prose, Table, read_from

__all__ = ["finding", "section"]

_LABEL = 10  # most characters of a token under a map
_LISTED = 40  # neurons or latents shown; all are in cells.parquet


def finding(name: str, patched: Artifact) -> Finding:
    """A run's peak in one sentence with numbers."""
    return Finding(_said(name, patched.summary), "patching", Origin(patched.fingerprint, "cells.parquet"))


def _said(name: str, summary: Mapping[str, Any]) -> str:
    peak = summary["peak"]
    weight = ""
    if peak.get("p_max_t") is not None:
        weight = f", family-wise p = {peak['p_max_t']:.2g}"
    elif peak.get("q_value") is not None:
        weight = f", q = {peak['q_value']:.2g}"
    share = peak.get("normalised_effect")
    restored = f" ({share:.0%} of the difference)" if share is not None and peak.get("direction") == "denoising" else ""
    if _guessed(summary):
        exact = "which was not run" if peak.get("exact") is None else f"which run exactly is {peak['exact']:+.2f}"
        return (
            f"In {name}, gradients ({summary['method']}) find the largest effect on the {summary['metric']} where "
            f"{summary['site']} is patched at {_place(peak)}: an estimate of {peak['effect']:+.2f}, {exact}, over "
            f"{summary['n_pairs']} pairs ({summary['n_refused']} refused)."
        )
    reach = "" if summary.get("reachable", True) else " So few pairs could not have made any cell significant."
    return (
        f"In {name}, patching {summary['site']} at {_place(peak)} changes the "
        f"{summary['metric']} by {peak['effect']:+.2f}{restored}{weight}, over {summary['n_pairs']} pairs "
        f"({summary['n_refused']} refused).{reach}"
    )


def section(name: str, patched: Artifact) -> list[Block]:
    """Maps or lists, the power and the pairs of one run."""
    cells = read_rows(patched.path / "cells.parquet")
    pairs = read_rows(patched.path / "pairs.parquet")
    words = (
        "0 means that the patch does nothing, 1 that it carries the whole difference between the clean and the "
        "corrupted prompt. Positions count from the end (-1 is where the answer is read)."
    )
    summary = patched.summary
    more = [str(summary[key]) for key in ("chosen", "power") if summary.get(key)]
    more = [sentence[0].upper() + sentence[1:] + "." for sentence in more]
    if summary.get("untested"):
        more.append(
            f"No p-values for {'; '.join(summary['untested'])}: from that end the metric can only move one way."
        )
    if summary.get("corruption", "counterpart") != "counterpart":
        more.append(
            f"Values were replaced by {summary['corruption']} ablation in the clean run; the scale is still that of the "
            "pair's two prompts."
        )
    if _guessed(summary):
        more.insert(0, f"Effects are estimates from gradients ({summary['method']}), p-values those of the estimates.")
        more += [f"{sentence[0].upper() + sentence[1:]}." for sentence in summary.get("verified", [])]
    blocks: list[Block] = [Prose(" ".join([words, *more]), title=name)]
    blocks += [_calibration(name, cells, metric) for metric in summary["metrics"] if _guessed(summary)]
    kinds = dict.fromkeys((row["metric"], row["direction"], row.get("layers") is not None) for row in cells)
    for metric, direction, window in kinds:
        part = [
            r
            for r in cells
            if (r["metric"], r["direction"], r.get("layers") is not None) == (metric, direction, window)
        ]
        how = f", estimates by {summary['method']}" if _guessed(summary) else ""
        title = f"{name}: {metric}, {direction}{', windows of layers' if window else ''}{how}"
        listed = any(row.get(key) is not None for row in part for key in ("neuron", "latent", "part", "edge"))
        tags = {"run": name, "metric": metric, "direction": direction}
        blocks.append(_list(title, part) if listed else _map(title, part, pairs, tags))
    headers = ["pair", "clean", "corrupted", "answer", "against", "status", "reason"]
    keys = ("id", "clean", "corrupted", "answer", "wrong_answer", "status", "reason")
    cells_of = [[_visible(str(row[k] or "")) for k in keys] for row in pairs]
    listed = Table(headers, cells_of, caption=f"The {len(pairs)} pairs of {name}", folded=True)
    return [*read_from(patched, "cells.parquet", blocks), *read_from(patched, "pairs.parquet", [listed])]


def _guessed(summary: Mapping[str, Any]) -> bool:
    """Whether effects are estimates by gradients."""
    return summary.get("method", "exact") != "exact"


def _calibration(name: str, cells: Sequence[Mapping[str, Any]], metric: str) -> Block:
    """Estimates against the exact effects of the same cells."""
    series = {}
    for direction in dict.fromkeys(row["direction"] for row in cells):
        rows = [r for r in cells if (r["metric"], r["direction"]) == (metric, direction) and r["exact"] is not None]
        series[direction] = ([r["exact"] for r in rows], [r["approximate"] for r in rows], [_place(r) for r in rows])
    n = sum(len(x) for x, _, _ in series.values())
    words = (
        f"{n} cells were run exactly: the strongest estimates, and as many others at random. On the dotted line an estimate "
        "is right; far from it, it is not to be believed."
    )
    return points(
        f"{name}: {metric}, estimates against exact effects", series, x_title="exact", y_title="estimate", words=words
    )


def _map(
    title: str, rows: Sequence[Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]], tags: Mapping[str, str]
) -> Block:
    """Layers down; positions, spans or heads across. Of a head patched at several places the strongest is shown."""
    across = "head" if rows[0].get("head") is not None else "span" if rows[0].get("span") else "position_from_end"
    places = list(dict.fromkeys(row[across] for row in rows))
    places = places if across == "span" else sorted(places)
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    grid: dict[tuple[int, Any], Mapping[str, Any]] = {}
    for row in rows:
        key = row["layer"], row[across]
        if key not in grid or abs(row["mean_effect"]) > abs(grid[key]["mean_effect"]):
            grid[key] = row
    values = [[_carried(grid[at, place]) if (at, place) in grid else None for place in places] for at in layers]
    hover = [[_hover(grid[at, place]) if (at, place) in grid else "" for place in places] for at in layers]
    top = max(rows, key=lambda row: abs(row["mean_effect"]) if row["mean_effect"] is not None else -1.0)
    words = f"Strongest cell: {_place(top)}, mean effect {top['mean_effect']:+.3g}{_interval(top)}, pairs: {top['n_pairs']}."
    p_values = [[grid[at, place]["p_max_t"] if (at, place) in grid else None for place in places] for at in layers]
    windows = {row["layer"]: row["layers"] or row["layer"] for row in rows}
    columns = (
        _labels(pairs, places) if across == "position_from_end" else [f"{_axis(across)}{place}" for place in places]
    )
    named = [windows[at] for at in layers]
    return heat_map(title, columns, named, values, hover, words=words, p_values=p_values, tags=tags)


def _list(title: str, rows: Sequence[Mapping[str, Any]]) -> Block:
    """Parts first, then neurons or latents, strongest first."""
    parts = [row for row in rows if row["part"] is not None]
    others = sorted((r for r in rows if r["part"] is None), key=lambda r: -abs(r["mean_effect"]))
    guessed = rows[0].get("method", "exact") != "exact"
    headers = [
        "place",
        "estimate" if guessed else "mean effect",
        "low",
        "high",
        "share of the difference",
        "p",
        "q",
        "pairs",
    ]
    headers += ["exact"] if guessed else []
    keys = ("mean_effect", "low", "high")
    cells = [
        [
            _place(r),
            *(_short(r[k]) for k in keys),
            _short(_carried(r)),
            _short(r["p"]),
            _short(r["q_value"]),
            r["n_pairs"],
            *([_short(r["exact"])] if guessed else []),
        ]
        for r in [*parts, *others][: _LISTED + len(parts)]
    ]
    return Table(headers, cells, numeric=tuple(range(1, len(headers))), caption=title)


def _visible(text: str) -> str:
    """Control characters written out: a page has no use for them, and a terminal that prints it would obey them."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def _axis(across: str) -> str:
    return "head " if across == "head" else ""


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def _place(row: Mapping[str, Any]) -> str:
    """A cell in words."""
    words = [f"layers {row['layers']}" if row.get("layers") else f"layer {row['layer']}"]
    words = [row["edge"]] if row.get("edge") else words  # its name says where it is
    words += [f"{key} {row[key]}" for key in ("head", "neuron", "latent") if row.get(key) is not None]
    words += [row["part"]] if row.get("part") else []
    if row.get("span"):
        words.append("all positions" if row["span"] == "all" else f"span {row['span']}")
    else:
        at = row.get("position")
        words.append(f"position {row['position_from_end'] if at is None else at}")
    return ", ".join(words)


def _carried(row: Mapping[str, Any]) -> float | None:
    """Share of the difference that the cell carries: read from the corrupted end when denoising, from the other when not."""
    value = row["normalised_effect"]
    if value is None:
        return None
    return value if row["direction"] == "denoising" else 1 - value


def _hover(row: Mapping[str, Any]) -> str:
    p = "not available" if row["p_max_t"] is None else f"{row['p_max_t']:.2g}"
    what = "mean effect"
    if row.get("method", "exact") != "exact":
        what = "not run exactly; estimate" if row["exact"] is None else f"exactly {row['exact']:+.3g}; estimate"
    return (
        f"{_place(row)}\n{what} {row['mean_effect']:+.3g}{_interval(row)}\nfamily-wise p {p}\npairs: {row['n_pairs']}"
    )


def _interval(row: Mapping[str, Any]) -> str:
    """The bootstrap interval, where there is more than one pair to draw from."""
    if row["low"] is None or row["high"] is None:
        return ""
    return f" (95 % {row['low']:+.3g} to {row['high']:+.3g})"


def _labels(pairs: Sequence[Mapping[str, Any]], places: Sequence[int]) -> list[str]:
    """A column's name: its place from the end, and the token where all pairs share it."""
    tokens = [row["tokens"] for row in pairs if row["status"] == "executed" and row["tokens"]]
    labels = []
    for place in places:
        here = {row[place] for row in tokens if len(row) >= -place}
        shared = _visible(here.pop().strip()) if len(here) == 1 else ""
        shared = shared if len(shared) <= _LABEL else f"{shared[: _LABEL - 1]}…"
        labels.append(f"{shared} {place}".strip())
    return labels
