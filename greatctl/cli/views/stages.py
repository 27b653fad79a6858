"""The terminal view of each stage's result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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
from .table import facts, near, number, size, table

__all__ = ["VIEWS"]

_FIGURES = {
    "n_tokens": ("tokens", "{:,}"),
    "n_windows": ("windows", "{:,}"),
    "window": ("window", "{:,} tokens"),
    "overlap_chars_removed": ("shared passages", "{:,} characters removed"),
    "tokens_capped": ("over the limit", "{:,} tokens left out"),
    "d_model": ("width", "{} numbers a token"),
    "tokens_per_second": ("speed", "{:,.0f} tokens/s"),
    "arch": ("architecture", ""),
    "d_sae": ("latents", "{:,}"),
    "explained_variance": ("explained variance", "{:.3f}, held out"),
    "l0": ("L0", "{:.1f} latents a token"),
    "ce_loss_recovered": ("loss recovered", "{:.1%} of what the layer is worth to the model"),
    "dead_fraction": ("dead", "{:.2%} of the latents"),
    "tokens": ("trained on", "{:,} tokens"),
    "waited_for_rows": ("waited for rows", "{:.1%} of the time"),
    "stepping": ("kind of steps", ""),
}


def _fetch(result: Result) -> RenderableType:
    summary = result.summary
    if "audit" in summary:
        return _audit(result)
    rows = list(summary["sources"])  # type: ignore[call-overload]
    sized = any(r["bytes"] for r in rows)
    cells = [
        (r["id"], r["character"] or r["role"], r["status"] or r.get("state"), *([size(r["bytes"])] if sized else []))
        for r in rows
    ]
    head = ["source", "of", "status", *(["size"] if sized else [])]
    total = facts(
        [
            ("on disk", f"{sum(bool(r['bytes']) for r in rows)} of {len(rows)} texts"),
            ("clean text", f"{size(summary['text_bytes'])}, about {number(summary['tokens_estimate'])} tokens"),  # type: ignore[arg-type]
            ("one layer", f"{size(summary['activation_bytes_per_layer'])} of activations"),  # type: ignore[arg-type]
        ]
    )
    parts: list[RenderableType] = [table(head, cells, right=(3,)), total]
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


def _plain(result: Result, headline: str, *said: str) -> RenderableType:
    """What came out as a sentence, then the figures that the sentence does not say, with their units."""
    figures = ((key, value) for key, value in result.summary.items() if key not in said)
    lines = [_figure(key, value) for key, value in figures if not isinstance(value, list | dict)]
    if result.artifact:
        lines.append(("artifact", near(result.artifact)))
    return Group(literal(headline, "bold"), facts(lines))


def _figure(key: str, value: object) -> tuple[str, object]:
    name, form = _FIGURES.get(key, (key.replace("_", " "), ""))
    return name, form.format(value) if form and isinstance(value, int | float) else value


def _tokenize(result: Result) -> RenderableType:
    said = {key: number(result.summary.get(key)) for key in ("n_tokens", "n_windows", "window")}
    return _plain(result, "{n_tokens} tokens in {n_windows} windows of {window}".format(**said), *said)


def _harvest(result: Result) -> RenderableType:
    words = f"{number(result.summary['n_tokens'])} tokens read at {result.summary['hook_point']}"
    return _plain(result, words, "n_tokens", "hook_point")


def _report(result: Result) -> RenderableType:
    where = literal(near(result.summary["path"]), "bold cyan")
    return facts([("report", where), ("size", f"{size(result.summary['bytes'])}; opens without a network")])  # type: ignore[arg-type]


def _train(result: Result) -> RenderableType:
    if "sweep" in result.summary:
        return _sweep(result)
    variance, l0 = result.summary.get("explained_variance"), result.summary.get("l0")
    measured = isinstance(variance, float) and isinstance(l0, float)
    words = f"{l0:.1f} latents a token explain {variance:.1%} of the held-out variance" if measured else "not measured"
    sheet = _plain(result, words, *(("explained_variance", "l0") if measured else ()))
    controls = result.summary.get("controls")
    if not isinstance(controls, Mapping):
        return sheet
    keys = ("explained_variance", "l0", "ce_loss_recovered", "dead_fraction", "matched_ours_mean_max_cosine")
    rows = [(r["control"], *(number(r.get(key)) for key in keys)) for r in controls["controls"]]
    head = ["companion", "explained variance", "L0", "loss recovered", "dead", "decoder match"]
    return Group(sheet, table(head, rows, right=(1, 2, 3, 4, 5)))


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
    return Group(*parts, facts([*lines, ("artifact", near(result.artifact))]))


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
        cell = f"{row['latent']:>5} ({row['activation']:.2f})"
        by_token.setdefault((row.get("position", 0), row["token"]), []).append(cell)
    wide = max((len(cell) for cells in by_token.values() for cell in cells), default=0)
    rows = [
        (repr(token)[1:-1], " ".join(cell.ljust(wide) for cell in cells).rstrip())
        for (_, token), cells in by_token.items()
    ]
    strip: Mapping[str, Any] = result.view["strip"]  # type: ignore[assignment]
    return Group(
        heat_strip(strip["tokens"], strip["strength"]),
        "",
        table(["token", "latent (activation), strongest first"], rows),
    )


VIEWS: dict[str, Callable[[Result], RenderableType]] = {
    "fetch": _fetch,
    "tokenize": _tokenize,
    "harvest": _harvest,
    "train": _train,
    "interpret": _interpret,
    "patch": lambda result: (render_circuit if "circuit" in result.summary else render_patch)(result),
    "report": _report,
    "steer": render_steer,
}
