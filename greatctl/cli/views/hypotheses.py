"""The terminal view of hypotheses: one table a concept, what decided, and what each latent had to beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType

from ...stages.context import Result
from ..text import literal
from .labels import label_table
from .table import facts, number, table

__all__ = ["render_hypotheses"]

_ROWS = 12
_SHORT = {
    "SAE with a frozen decoder": "frozen decoder",
    "SAE on a random model": "random model",
    "SAEs of other seeds": "other seeds",
    "difference of means": "mean difference",
    "logistic probe": "probe",
    "neurons": "neuron",
    "principal components": "component",
    "character n-grams": "n-grams",
}


def render_hypotheses(result: Result) -> RenderableType:
    """Everything that fits in 80 columns; the tables on disk have the rest."""
    summary = result.summary
    head = [(k.replace("_", " "), summary[k]) for k in ("sae", "n_latents", "n_alive", "n_tokens") if k in summary]
    parts: list[RenderableType] = [facts(head)]
    for concept in _rows(summary.get("concepts")):
        name = concept["concept"]
        parts += ["", literal(f"{name}: {concept['power']}")]
        hypotheses = [row for row in _rows(summary["hypotheses"]) if row["concept"] == name]
        parts.append(_hypotheses(hypotheses[:_ROWS]))
        if len(hypotheses) > _ROWS:
            words = f"{_ROWS} of {len(hypotheses)} candidates, {concept['n_supported']} of them supported"
            parts.append(literal(f"{words}; AUROC is on those who were held out", "dim"))
        reasons = [row for row in _rows(result.view.get("reasons")) if row["concept"] == name]
        parts += [literal(f"{r['latent']} {r['verdict']} (may be said: {r['claim']}): {r['reason']}.") for r in reasons]
        measured = [row for row in _rows(result.view.get("baselines")) if row["concept"] == name]
        parts += _baselines(measured)
    parts += label_table(_rows(result.view.get("labels")))
    if result.artifact:
        parts += ["", literal(f"{result.artifact}: hypotheses, evidence, baselines.parquet", "dim")]
    return Group(*parts)


def _rows(value: object) -> list[Mapping]:
    return list(value) if isinstance(value, list) else []


def _hypotheses(rows: Sequence[Mapping]) -> RenderableType:
    cells = [
        (r["latent"], f"{r['effect']:+.2f}", number(r["q_value"]), _auroc(r["heldout_auroc"]), _best(r), r["verdict"])
        for r in rows
    ]
    return table(["latent", "effect", "q", "AUROC", "best baseline", "verdict"], cells, right=(0, 1, 2, 3))


def _best(row: Mapping) -> str:
    name = row.get("baseline")
    return f"{_SHORT.get(name, name)} {_auroc(row['value'])}" if name else "–"


def _auroc(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _baselines(rows: Sequence[Mapping]) -> list[RenderableType]:
    """One line of what was reached on the held-out, one of what is missing."""
    measured = [f"{_SHORT.get(r['baseline'], r['baseline'])} {r['bar']:.2f}" for r in rows if r["bar"] is not None]
    missing = [str(r["baseline"]) for r in rows if r["bar"] is None]
    lines = [literal("held-out AUROC to beat: " + ", ".join(measured))] if measured else []
    return [*lines, literal("baselines missing: " + ", ".join(missing), "dim")] if missing else list(lines)
