"""What a patching run looks like in a terminal: its facts, a map a metric and direction, or a list of units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType

from ...patching.sites import place_of
from ...stages.context import Result
from ..text import literal
from .heat import HeatMap
from .table import facts, near, number, table

__all__ = ["render_patch"]

_LEVEL = 0.05
_SHOWN = 24  # rows of a list; the others are in cells.parquet
_SENTENCES = ("power", "chosen")
_PLACES = {"each": "each position", "spans": "each marked span", "all": "all positions together"}


def render_patch(result: Result) -> RenderableType:
    """Facts, pictures, and why pairs were refused."""
    summary = result.summary
    metrics: Mapping[str, Mapping] = summary["metrics"]  # type: ignore[assignment]
    names = sorted(metrics, key=lambda name: name != summary["metric"])  # the first one first
    parts: list[RenderableType] = [
        literal(_finding(summary), "bold"),
        _facts(summary, names),
        _peaks({name: metrics[name] for name in names}),
    ]
    for panel in list(result.view.get("panels") or []):  # type: ignore[call-overload]
        parts.append(_list(panel) if panel["kind"] == "list" else _map(panel))
    parts += [literal(str(summary[name]), "dim") for name in _SENTENCES if summary.get(name)]
    parts += [literal(str(sentence), "yellow") for sentence in summary.get("verified") or []]  # type: ignore[union-attr]
    if summary.get("untested"):
        names = "; ".join(summary["untested"])  # type: ignore[arg-type]
        parts.append(literal(f"no p-values for {names}: from that end the metric can only move one way", "dim"))
    for name, reason in list(result.view.get("refused") or [])[:8]:  # type: ignore[call-overload]
        parts.append(literal(f"refused {name}: {reason}", "yellow"))
    if result.artifact:
        parts.append(facts([("artifact", near(result.artifact))]))
    return Group(*parts)


def _finding(summary: Mapping) -> str:
    """The first metric's strongest cell as a sentence; an estimate says so, and one that may be chance too."""
    metric = summary["metric"]
    peaks: Mapping[str, Mapping] = summary["metrics"][metric]["peaks"]
    if not peaks:
        return f"{metric}: nothing was measured"
    direction, peak = next(iter(peaks.items()))
    p = peak["p_max_t"] if peak["p_max_t"] is not None else peak["q_value"]
    beyond = "" if p is None or p <= _LEVEL else ", which may be chance"
    kind = "estimate" if _guessed(peak) else "effect"
    return f"{metric}, {direction}: the largest {kind} is {peak['effect']:+.3g} at {place_of(peak)}{beyond}"


def _facts(summary: Mapping[str, object], names: Sequence[str]) -> RenderableType:
    """What was patched, over how many pairs, and what each metric says of the two unpatched runs."""
    metrics: Mapping[str, Mapping] = summary["metrics"]  # type: ignore[assignment]
    corruption = "" if summary.get("corruption") == "counterpart" else f", {summary.get('corruption')} ablation"
    lines: list[tuple[str, object]] = [
        ("model", summary.get("model")),
        *([("method", f"{summary['method']}: estimates by gradients, not patches")] if _guessed(summary) else []),
        ("site", f"{summary['site']}, {_PLACES.get(str(summary.get('positions')), '')}{corruption}"),
        *((key, summary[key]) for key in ("sae", "hook_point") if summary.get(key)),
        ("pairs", f"{summary['n_pairs']} executed, {summary['n_refused']} refused"),
        *((f"{n}", f"clean {number(metrics[n]['clean'])}, corrupted {number(metrics[n]['corrupted'])}") for n in names),
        ("correction", f"{summary['correction']} over {number(summary['looks'])} looks"),
    ]
    return facts([(name.replace("_", " "), value) for name, value in lines])


def _peaks(metrics: Mapping[str, Mapping]) -> RenderableType:
    """The strongest cell of each metric and direction, with its interval and corrected p-value."""
    cells = []
    for name, found in metrics.items():
        for direction, peak in found["peaks"].items():
            p = peak["p_max_t"] if peak["p_max_t"] is not None else peak["q_value"]
            place = place_of(peak).removesuffix(", all positions")
            row = [f"{name}, {direction}", place, f"{peak['effect']:+.3g}", _interval(peak), number(p)]
            cells.append([*row, _exact(peak)] if _guessed(peak) else row)
    head = ["strongest cell", "place", "effect", "95 %", "p or q"]
    if cells and len(cells[0]) > len(head):
        head = ["strongest cell", "place", "estimate", "95 %", "p or q", "exact"]
    view = table(head, cells, right=(2, 3, 4, 5))
    view.columns[0].no_wrap = view.columns[3].no_wrap = True  # a place may be folded, these may not
    return view


def _guessed(row: Mapping) -> bool:
    """Whether the effects are estimates."""
    return row.get("method", "exact") != "exact"


def _exact(row: Mapping) -> str:
    return "not run" if row.get("exact") is None else f"{row['exact']:+.3g}"


def _interval(row: Mapping) -> str:
    return "–" if row["low"] is None or row["high"] is None else f"{row['low']:+.2g} … {row['high']:+.2g}"


def _title(panel: Mapping) -> str:
    sense = "destroyed by" if panel["neutral"] == 1.0 else "restored by"
    windows = " of a window of layers" if panel["windows"] else ""
    how = f" (estimates by {panel['method']})" if _guessed(panel) else ""
    return f"{panel['metric']}, {panel['direction']}{how}: per cent of the difference {sense} the patch{windows}"


def _map(panel: Mapping) -> RenderableType:
    """A direction's map. Both read the same way: 0 is "the patch does nothing", 100 "it carries all of the difference"."""
    noising = panel["neutral"] == 1.0
    places = [str(place) for place in panel["positions"]]
    columns = [
        f"{label.strip()[:6]}\n{place}" if label else (place if panel["columns"] == "head" else place[:6])
        for label, place in zip(panel["labels"], places, strict=True)
    ]
    rows = [
        (str(layer), [None if v is None else (1 - v if noising else v) for v in values])
        for layer, values in zip(panel["layers"], panel["matrix"], strict=True)
    ]
    return HeatMap(_title(panel), columns, rows, wrap=panel["columns"] == "head", of=panel["columns"])


def _list(panel: Mapping) -> RenderableType:
    """Units, strongest first; what they are not is a row of its own."""
    rows = list(panel["rows"])
    cells = [
        (
            _unit(row),
            f"{row['mean_effect']:+.3g}",
            _interval(row),
            _share(row["normalised_effect"], panel["neutral"]),
            number(row["p"]),
            number(row["q_value"]),
            *([_exact(row)] if _guessed(row) else []),
        )
        for row in rows[:_SHOWN]
    ]
    head = ["unit", "effect", "95 %", "share", "p", "q"]
    head = ["unit", "estimate", *head[2:], "exact"] if _guessed(panel) else head
    parts: list[RenderableType] = [literal(_title(panel), "bold"), table(head, cells, right=(1, 2, 3, 4, 5, 6))]
    if len(rows) > _SHOWN:
        parts.append(literal(f"  ({len(rows) - _SHOWN} weaker ones are in cells.parquet)", "dim"))
    return Group(*parts)


def _unit(row: Mapping) -> str:
    words = (
        row["part"]
        or row["edge"]
        or (f"latent {row['latent']}" if row["latent"] is not None else f"L{row['layer']} {row['neuron']}")
    )
    if row["span"] is None:
        return f"{words} at {row['position_from_end']}"
    return words if row["span"] == "all" else f"{words}, {row['span']}"


def _share(value: float | None, neutral: float) -> str:
    return "–" if value is None else f"{round(100 * (neutral - value if neutral else value))} %"
