"""The terminal view of each stage's result."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich.console import Group, RenderableType

from ...corpus.manual import bring_command
from ...stages.context import Result
from ..text import literal
from .circuits import render_circuit
from .heat import heat_strip
from .hypotheses import render_hypotheses
from .latent import render_latent
from .patches import render_patch
from .steer import render_steer
from .table import facts, number, size, table

__all__ = ["VIEWS"]


def _fetch(result: Result) -> RenderableType:
    summary = result.summary
    if "audit" in summary:
        return _audit(result)
    rows = list(summary["sources"])  # type: ignore[call-overload]
    cells = [(r["id"], r["character"] or r["role"], r["status"] or r.get("state"), size(r["bytes"])) for r in rows]
    total = facts(
        [
            ("clean text", size(summary["text_bytes"])),  # type: ignore[arg-type]
            ("tokens, about", summary["tokens_estimate"]),
            ("activations a layer", size(summary["activation_bytes_per_layer"])),  # type: ignore[arg-type]
        ]
    )
    parts: list[RenderableType] = [table(["source", "of", "status", "size"], cells, right=(3,)), total]
    if "totals" in summary:
        parts[1] = _totals(summary["totals"])  # type: ignore[arg-type]
    parts += [literal(f"{r['id']}: {r['why']}", "yellow") for r in rows if r.get("why") and r["status"] != "manual"]
    by_hand = [r for r in rows if r.get("get")]
    if by_hand:
        parts += ["", literal(f"Still to be brought by a person ({len(by_hand)}):", "bold")]
        parts += [literal(f"  {r['id']}: {r['get']}") for r in by_hand]
        parts.append(literal(f"Each with  {bring_command('ID')}", "bold"))
    return Group(*parts)


def _totals(totals: Mapping[str, Mapping[str, int]]) -> RenderableType:
    cells = [
        (name.replace("_", " "), row["sources"], size(row["text_bytes"]), f"{row['tokens']:,}",
         size(row["activation_bytes_per_layer"]))
        for name, row in totals.items()
    ]  # fmt: skip
    return table(["", "works", "clean text", "tokens, about", "activations a layer"], cells, right=(1, 2, 3, 4))


def _audit(result: Result) -> RenderableType:
    """A table a work: what each rule cut, then the lines that one should look at."""
    rows: list[Mapping] = list(result.summary["audit"])  # type: ignore[call-overload]
    cells = [
        (r["id"], size(r["bytes_in"]), size(r["kept"]), f"{r['kept'] / max(1, r['bytes_in']):.1%}",
         sum(r["removed_by_rule"].values()), r["licence"], len(r["suspicious"]), r["unaccounted"])
        for r in rows
    ]  # fmt: skip
    head = ["source", "in", "kept", "share", "cut, bytes", "licence", "odd lines", "unaccounted"]
    parts: list[RenderableType] = [table(head, cells, right=tuple(range(1, 8)))] if rows else []
    for row in rows:
        cut = sorted(row["removed_by_rule"].items(), key=lambda item: -item[1])
        parts += ["", literal(row["id"], "bold")]
        parts.append(facts([(rule, size(n)) for rule, n in cut]))
        parts += [literal(f"  {line}", "yellow") for line in row["suspicious"][:12]]
        if len(row["suspicious"]) > 12:
            parts.append(literal(f"  … and {len(row['suspicious']) - 12} more (--json has them)", "dim"))
    missing = [r for r in list(result.summary["sources"]) if r["status"] != "up-to-date"]  # type: ignore[call-overload]
    parts += [literal(f"{r['id']}: {r.get('why') or r['status']}", "yellow") for r in missing]
    return Group(*parts)


def _plain(result: Result) -> RenderableType:
    lines = [(k, v) for k, v in result.summary.items() if not isinstance(v, list | dict)]
    if result.artifact:
        lines.append(("artifact", str(result.artifact)))
    return facts([(name.replace("_", " "), value) for name, value in lines])


def _train(result: Result) -> RenderableType:
    if "sweep" in result.summary:
        return _sweep(result)
    controls = result.summary.get("controls")
    if not isinstance(controls, Mapping):
        return _plain(result)
    keys = ("explained_variance", "l0", "ce_loss_recovered", "dead_fraction", "matched_ours_mean_max_cosine")
    rows = [(r["control"], *(number(r.get(key)) for key in keys)) for r in controls["controls"]]
    head = ["", "explained variance", "l0", "ce loss recovered", "dead", "decoder match"]
    return Group(_plain(result), table(head, rows, right=(1, 2, 3, 4, 5)))


def _sweep(result: Result) -> RenderableType:
    rows: list[Mapping] = list(result.summary["sweep"])  # type: ignore[call-overload]
    keys = ("arch", "k", "lr", "l0", "explained_variance", "ce_loss_recovered", "dead_fraction", "tokens_per_second")
    head = ["arch", "k", "lr", "l0", "EV", "CE rec.", "dead", "tokens/s", "name"]
    cells = [(*(number(r[key]) for key in keys), r["name"]) for r in rows]
    states = [(state, sum(r["state"] == state for r in rows)) for state in dict.fromkeys(r["state"] for r in rows)]
    parts: list[RenderableType] = [table(head, cells, right=(1, 2, 3, 4, 5, 6, 7))]
    parts += [literal(f"{r['name']}: {r['why']}", "yellow") for r in rows if r.get("why")]
    waited = result.summary.get("waited_for_rows")
    lines = [*states, *([] if waited is None else [("waited for rows", f"{waited:.1%}")])]
    return Group(*parts, facts([*lines, ("artifact", str(result.artifact))]))


def _interpret(result: Result) -> RenderableType:
    view = result.view
    if "strip" in view:
        return _snippet(result)
    if "page" in view:
        return render_latent(view["page"], view.get("headline"))  # type: ignore[arg-type]
    return render_hypotheses(result)


def _snippet(result: Result) -> RenderableType:
    by_token: dict[tuple[int, str], list[str]] = {}
    for row in result.summary["top"]:  # type: ignore[attr-defined]
        cell = f"{row['latent']} ({row['activation']:.2f})"
        by_token.setdefault((row.get("position", 0), row["token"]), []).append(cell)
    rows = [(repr(token)[1:-1], "  ".join(cells)) for (_, token), cells in by_token.items()]
    strip = result.view["strip"]
    return Group(heat_strip(strip["tokens"], strip["strength"]), "", table(["token", "latents (activation)"], rows))  # type: ignore[index]


VIEWS: dict[str, Callable[[Result], RenderableType]] = {
    "fetch": _fetch,
    "tokenize": _plain,
    "harvest": _plain,
    "train": _train,
    "interpret": _interpret,
    "patch": lambda result: (render_circuit if "circuit" in result.summary else render_patch)(result),
    "report": _plain,
    "steer": render_steer,
}
