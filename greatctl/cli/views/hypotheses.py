"""The terminal view of hypotheses: one table a concept, what decided, and what each latent had to beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from ...stages.context import Result
from ..text import literal
from .labels import label_table
from .table import facts, near, number, table

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
    parts: list[RenderableType] = []
    for concept in _rows(summary.get("concepts")):
        name = concept["concept"]
        parts += [*([""] if parts else []), literal(_finding(concept), "bold"), literal(concept["power"], "dim")]
        hypotheses = [row for row in _rows(summary["hypotheses"]) if row["concept"] == name]
        parts.append(_hypotheses(hypotheses[:_ROWS]))
        if len(hypotheses) > _ROWS:
            words = f"{_ROWS} of {len(hypotheses)} candidates; effect in sd; AUROC is on those who were held out"
            parts.append(literal(words, "dim"))
        reasons = [row for row in _rows(result.view.get("reasons")) if row["concept"] == name]
        parts += [Padding(_reason(r), (0, 0, 0, 2)) for r in reasons]
        measured = [row for row in _rows(result.view.get("baselines")) if row["concept"] == name]
        parts += _baselines(measured)
    parts += label_table(_rows(result.view.get("labels")))
    return Group(*parts, "", facts(_made_of(result)))


def _made_of(result: Result) -> list[tuple[str, object]]:
    """What was read, and where the tables are."""
    said = {
        key: number(result.summary[key]) for key in ("sae", "n_latents", "n_alive", "n_tokens") if key in result.summary
    }
    rows: list[tuple[str, object]] = [("sae", said["sae"])] if "sae" in said else []
    if {"n_latents", "n_alive", "n_tokens"} <= said.keys():
        rows.append(("read", f"{said['n_alive']} of {said['n_latents']} latents fire on {said['n_tokens']} tokens"))
    return [*rows, *([("artifact", near(result.artifact))] if result.artifact else [])]


def _rows(value: object) -> list[Mapping]:
    return list(value) if isinstance(value, list) else []


def _finding(concept: Mapping) -> str:
    count, supported = concept["n_candidates"], concept["n_supported"]
    are = "is" if supported <= 1 else "are"
    return f"{concept['concept']}: {supported or 'none'} of {count} candidates {are} supported"


def _reason(row: Mapping) -> Text:
    """What decided one latent."""
    head = literal(f"{row['latent']} {row['verdict']}", "bold")
    return Text.assemble(head, literal(f" (may be said: {row['claim']}): {row['reason']}."))


def _hypotheses(rows: Sequence[Mapping]) -> RenderableType:
    cells = [
        (
            str(r["latent"]),
            f"{r['effect']:+.2f}",
            number(r["q_value"]),
            _auroc(r["heldout_auroc"]),
            _best(r),
            r["verdict"],
        )
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
