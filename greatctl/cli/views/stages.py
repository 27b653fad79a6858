"""The terminal view of each stage's result."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich.console import Group, RenderableType

from ...stages.context import Result
from ..text import literal
from .heat import HeatMap, heat_strip
from .table import facts, number, size, table

__all__ = ["VIEWS"]


def _fetch(result: Result) -> RenderableType:
    summary = result.summary
    rows = list(summary["sources"])  # type: ignore[call-overload]
    cells = [(r["id"], r["character"] or r["role"], r["status"], size(r["bytes"])) for r in rows]
    todo = [r for r in rows if r.get("why") and r["status"] in ("manual", "failed", "changed")]
    total = facts(
        [
            ("clean text", size(summary["text_bytes"])),  # type: ignore[arg-type]
            ("tokens, about", summary["tokens_estimate"]),
            ("activations a layer", size(summary["activation_bytes_per_layer"])),  # type: ignore[arg-type]
        ]
    )
    notes = [literal(f"{r['id']}: {r['why']}", "yellow") for r in todo]
    return Group(table(["source", "of", "status", "size"], cells, right=(3,)), total, *notes)


def _plain(result: Result) -> RenderableType:
    lines = [(k, v) for k, v in result.summary.items() if not isinstance(v, list | dict)]
    if result.artifact:
        lines.append(("artifact", str(result.artifact)))
    return facts([(name.replace("_", " "), value) for name, value in lines])


def _interpret(result: Result) -> RenderableType:
    view = result.view
    if "strip" in view:
        return _snippet(result)
    if "page" in view:
        return _page(view["page"])  # type: ignore[arg-type]
    rows = [
        (r["concept"], r["latent"], f"{r['effect']:+.2f}", number(r["q_value"]), r["verdict"])
        for r in list(result.summary["hypotheses"])[:15]  # type: ignore[call-overload]
    ]
    head = [(k.replace("_", " "), v) for k, v in result.summary.items() if isinstance(v, int | float | str)]
    parts: list[RenderableType] = [
        facts(head),
        table(["concept", "latent", "effect", "q", "verdict"], rows, right=(1, 2, 3)),
    ]
    missing = list(view.get("missing") or [])  # type: ignore[call-overload]
    if missing:
        parts.append(literal("baselines missing: " + ", ".join(missing), "dim"))
    return Group(*parts)


def _snippet(result: Result) -> RenderableType:
    by_token: dict[tuple[int, str], list[str]] = {}
    for row in result.summary["top"]:  # type: ignore[attr-defined]
        cell = f"{row['latent']} ({row['activation']:.2f})"
        by_token.setdefault((row.get("position", 0), row["token"]), []).append(cell)
    rows = [(repr(token)[1:-1], "  ".join(cells)) for (_, token), cells in by_token.items()]
    strip = result.view["strip"]
    return Group(heat_strip(strip["tokens"], strip["strength"]), "", table(["token", "latents (activation)"], rows))  # type: ignore[index]


def _page(page: Mapping) -> RenderableType:
    parts: list[RenderableType] = [literal(f"latent {page['latent']}", "bold"), facts(list(page["facts"].items()))]
    examples = [(r["activation"], r["work"], r["before"], r["token"], r["after"]) for r in page["examples"]]
    parts.append(table(["act", "work", "before", "token", "after"], examples, right=(0, 2)))
    return Group(*parts)


def _patch(result: Result) -> RenderableType:
    summary = result.summary
    peak = summary["peak"]
    lines = [(k.replace("_", " "), v) for k, v in summary.items() if isinstance(v, int | float | str)]
    if isinstance(peak, Mapping):
        lines.append(("peak", f"layer {peak['layer']}, position {peak['position']}: {number(peak['effect'])}"))
    parts: list[RenderableType] = [facts(lines)]
    for panel in list(result.view.get("panels") or []):  # type: ignore[call-overload]
        parts.append(_panel(panel))
    for name, reason in list(result.view.get("refused") or [])[:8]:  # type: ignore[call-overload]
        parts.append(literal(f"refused {name}: {reason}", "yellow"))
    if result.artifact:
        parts.append(facts([("artifact", str(result.artifact))]))
    return Group(*parts)


def _panel(panel: Mapping) -> RenderableType:
    """A direction's map. Both read the same way: 0 is "the patch does nothing", 100 "it carries all of the difference"."""
    noising = panel["neutral"] == 1.0
    sense = "destroyed by" if noising else "restored by"
    title = f"{panel['metric']}, {panel['direction']}: per cent of the difference {sense} the patch"
    columns = [
        f"{label.strip()[:6]}\n{place}" for label, place in zip(panel["labels"], panel["positions"], strict=True)
    ]
    rows = [
        (str(layer), [None if v is None else (1 - v if noising else v) for v in values])
        for layer, values in enumerate(panel["matrix"])
    ]
    return HeatMap(title, columns, rows)


VIEWS: dict[str, Callable[[Result], RenderableType]] = {
    "fetch": _fetch,
    "tokenize": _plain,
    "harvest": _plain,
    "train": _plain,
    "interpret": _interpret,
    "patch": _patch,
    "report": _plain,
}
