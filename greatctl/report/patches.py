"""The section on patching: a map for each metric and direction with its numbers on hover (or a table, where neurons
or latents were patched), what so many pairs can find, and the pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ..store.artifact import Artifact
from ..store.tables import read_rows
from .charts import heat_map
from .view import Block, Prose, Table

__all__ = ["finding", "section"]

_LABEL = 10  # most characters of a token under a map
_LISTED = 40  # neurons or latents shown; all are in cells.parquet


def finding(name: str, summary: Mapping[str, Any]) -> str:
    """A run's peak in one sentence with numbers."""
    peak = summary["peak"]
    weight = ""
    if peak.get("p_max_t") is not None:
        weight = f", family-wise p = {peak['p_max_t']:.2g}"
    elif peak.get("q_value") is not None:
        weight = f", q = {peak['q_value']:.2g}"
    share = peak.get("normalised_effect")
    restored = f" ({share:.0%} of the difference)" if share is not None and peak.get("direction") == "denoising" else ""
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
        f"{name}: 0 means that the patch does nothing, 1 that it carries the whole difference between the clean and the "
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
    blocks: list[Block] = [Prose(" ".join([words, *more]))]
    kinds = dict.fromkeys((row["metric"], row["direction"], row.get("layers") is not None) for row in cells)
    for metric, direction, window in kinds:
        part = [
            r
            for r in cells
            if (r["metric"], r["direction"], r.get("layers") is not None) == (metric, direction, window)
        ]
        title = f"{name}: {metric}, {direction}{', windows of layers' if window else ''}"
        listed = any(row.get(key) is not None for row in part for key in ("neuron", "latent", "part"))
        blocks.append(_list(title, part) if listed else _map(title, part, pairs))
    headers = ["pair", "clean", "corrupted", "answer", "against", "status", "reason"]
    keys = ("id", "clean", "corrupted", "answer", "wrong_answer", "status", "reason")
    blocks.append(Table(headers, [[_visible(row[k]) for k in keys] for row in pairs], caption=f"Pairs of {name}"))
    return blocks


def _map(title: str, rows: list[dict], pairs: list[dict]) -> Block:
    """Layers down; positions, spans or heads across. Of a head patched at several places the strongest is shown."""
    across = "head" if rows[0].get("head") is not None else "span" if rows[0].get("span") else "position_from_end"
    places = list(dict.fromkeys(row[across] for row in rows))
    places = places if across == "span" else sorted(places)
    windows = rows[0].get("layers") is not None
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    grid: dict[tuple[int, Any], dict] = {}
    for row in rows:
        key = row["layer"], row[across]
        if key not in grid or abs(row["mean_effect"]) > abs(grid[key]["mean_effect"]):
            grid[key] = row
    values = [[_carried(grid[at, place]) if (at, place) in grid else None for place in places] for at in layers]
    hover = [[_hover(grid[at, place]) if (at, place) in grid else "" for place in places] for at in layers]
    top = max(rows, key=lambda row: abs(row["mean_effect"]) if row["mean_effect"] is not None else -1.0)
    words = (
        f"Strongest cell: {_place(top)}, mean effect {top['mean_effect']:+.3g}{_interval(top)}, pairs: {top['n_pairs']}."
        + (" Rows are named by the first layer of the window." if windows else "")
    )
    columns = (
        _labels(pairs, places) if across == "position_from_end" else [f"{_axis(across)}{place}" for place in places]
    )
    return heat_map(title, columns, layers, values, hover, words=words)


def _list(title: str, rows: list[dict]) -> Block:
    """Parts first, then neurons or latents, strongest first."""
    parts = [row for row in rows if row["part"] is not None]
    others = sorted((r for r in rows if r["part"] is None), key=lambda r: -abs(r["mean_effect"]))
    headers = ["place", "mean effect", "low", "high", "share of the difference", "p", "q", "pairs"]
    keys = ("mean_effect", "low", "high")
    cells = [
        [
            _place(r),
            *(_short(r[k]) for k in keys),
            _short(_carried(r)),
            _short(r["p"]),
            _short(r["q_value"]),
            r["n_pairs"],
        ]
        for r in [*parts, *others][: _LISTED + len(parts)]
    ]
    return Table(headers, cells, numeric=(1, 2, 3, 4, 5, 6, 7), caption=title)


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
    return (
        f"{escape(_place(row))}<br>mean effect {row['mean_effect']:+.3g}"
        f"{_interval(row)}<br>family-wise p {p}<br>pairs: {row['n_pairs']}"
    )


def _interval(row: Mapping[str, Any]) -> str:
    """The bootstrap interval, where there is more than one pair to draw from."""
    if row["low"] is None or row["high"] is None:
        return ""
    return f" (95 % {row['low']:+.3g} to {row['high']:+.3g})"


def _labels(pairs: list[dict], places: Sequence[int]) -> list[str]:
    """A column's name: its place from the end, and the token where all pairs share it."""
    tokens = [row["tokens"] for row in pairs if row["status"] == "executed" and row["tokens"]]
    labels = []
    for place in places:
        here = {row[place] for row in tokens if len(row) >= -place}
        shared = _visible(here.pop().strip()) if len(here) == 1 else ""
        shared = shared if len(shared) <= _LABEL else f"{shared[: _LABEL - 1]}…"
        labels.append(f"{shared} {place}".strip())
    return labels
