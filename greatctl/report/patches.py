"""The section on patching: a map for each metric and direction, with its numbers on hover, and the pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..store.artifact import Artifact
from ..store.tables import read_rows
from .charts import heat_map
from .view import Block, Prose, Table

__all__ = ["finding", "section"]


def finding(name: str, summary: Mapping[str, Any]) -> str:
    """A run's peak in one sentence with numbers."""
    peak = summary["peak"]
    p = peak.get("p_max_t")
    weight = f", family-wise p = {p:.2g}" if p is not None else ""
    share = peak.get("normalised_effect")
    restored = f" ({share:.0%} of the difference)" if share is not None and peak.get("direction") == "denoising" else ""
    return (
        f"In {name}, patching {summary['site']} at layer {peak['layer']}, position {peak['position']} changes the "
        f"{summary['metric']} by {peak['effect']:+.2f}{restored}{weight}, over {summary['n_pairs']} pairs "
        f"({summary['n_refused']} refused)."
    )


def section(name: str, patched: Artifact) -> list[Block]:
    """Maps and pairs of one run."""
    cells = read_rows(patched.path / "cells.parquet")
    pairs = read_rows(patched.path / "pairs.parquet")
    words = (
        f"{name}: 0 means that the patch does nothing, 1 that it carries the whole difference between the clean and the "
        "corrupted prompt. Positions count from the end (-1 is where the answer is read)."
    )
    blocks: list[Block] = [Prose(words)]
    kinds = dict.fromkeys((row["metric"], row["direction"]) for row in cells)
    for metric, direction in kinds:
        part = [row for row in cells if (row["metric"], row["direction"]) == (metric, direction)]
        blocks.append(_map(name, metric, direction, part, _labels(pairs, part)))
    headers = ["pair", "clean", "corrupted", "answer", "against", "status", "reason"]
    keys = ("id", "clean", "corrupted", "answer", "wrong_answer", "status", "reason")
    blocks.append(Table(headers, [[row[k] for k in keys] for row in pairs], caption=f"Pairs of {name}"))
    return blocks


def _map(name: str, metric: str, direction: str, rows: list[dict], columns: list[str]) -> Block:
    layers = sorted({row["layer"] for row in rows})
    places = sorted({row["position_from_end"] for row in rows})
    grid = {(row["layer"], row["position_from_end"]): row for row in rows}
    values = [[_carried(grid[layer, place]) for place in places] for layer in layers]
    hover = [[_hover(grid[layer, place]) for place in places] for layer in layers]
    top = max(rows, key=lambda row: abs(row["mean_effect"]) if row["mean_effect"] is not None else -1.0)
    words = (
        f"Strongest cell: layer {top['layer']}, position {top['position_from_end']}, mean effect "
        f"{top['mean_effect']:+.3g}{_interval(top)}, pairs: {top['n_pairs']}."
    )
    return heat_map(f"{name}: {metric}, {direction}", columns, layers, values, hover, words=words)


def _carried(row: Mapping[str, Any]) -> float | None:
    """Share of the difference that the cell carries: read from the corrupted end when denoising, from the other when not."""
    value = row["normalised_effect"]
    if value is None:
        return None
    return value if row["direction"] == "denoising" else 1 - value


def _hover(row: Mapping[str, Any]) -> str:
    p = "not available" if row["p_max_t"] is None else f"{row['p_max_t']:.2g}"
    return (
        f"layer {row['layer']}, position {row['position_from_end']}<br>mean effect {row['mean_effect']:+.3g}"
        f"{_interval(row)}<br>family-wise p {p}<br>pairs: {row['n_pairs']}"
    )


def _interval(row: Mapping[str, Any]) -> str:
    """The bootstrap interval, where there is more than one pair to draw from."""
    if row["low"] is None or row["high"] is None:
        return ""
    return f" (95 % {row['low']:+.3g} to {row['high']:+.3g})"


def _labels(pairs: list[dict], rows: list[dict]) -> list[str]:
    """A column's name: its place from the end, and the token where all pairs share it."""
    tokens = [row["tokens"] for row in pairs if row["status"] == "executed" and row["tokens"]]
    labels = []
    for place in sorted({row["position_from_end"] for row in rows}):
        here = {row[place] for row in tokens if len(row) >= -place}
        shared = here.pop().strip() if len(here) == 1 else ""
        labels.append(f"{shared} {place}".strip())
    return labels
