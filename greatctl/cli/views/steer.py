"""What steering looks like in a terminal: a small table of what each way did, and each way's text beside its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from ...stages.context import Result
from ..text import literal
from .table import facts, number, table

__all__ = ["render_steer"]

_NAMES = {
    "none": "as it is",
    "latent": "latent",
    "diff-means": "difference in means",
    "random": "random direction",
    "prompt": "plain words before",
}
_WORDS = {"add": "add {} x {}", "clamp": "hold at {} ({})", "ablate": "ablate (hold at {} {})"}


def render_steer(result: Result) -> RenderableType:
    """Facts, and for each prompt the numbers and the texts."""
    summary = result.summary
    form = _WORDS[str(summary["form"])].format(number(summary["strength"]), summary["unit"])
    parts: list[RenderableType] = [
        facts(
            [
                ("latent", f"{summary['latent']} of {summary['sae']}"),
                ("at", f"{summary['hook_point']} of {summary['model']}"),
                ("steering", form),
                ("a norm", f"{number(summary['residual_norm'])}, the mean of the residual stream there"),
                ("perplexity", f"of {number(summary['neutral_tokens'])} tokens of unrelated text: the price"),
                ("KL", "how far the next token's distribution moved, nats"),
            ]
        )
    ]
    for row in summary["prompts"]:  # type: ignore[attr-defined]
        parts += ["", literal(row["prompt"], "bold"), _numbers(row["texts"])]
        parts.append(facts((_NAMES[text["kind"]], _text(text)) for text in row["texts"]))
    parts += [literal(f"missing: {_NAMES[str(name)]}", "yellow") for name in summary["missing"]]  # type: ignore[attr-defined]
    return Group(*parts)


def _text(text: Mapping) -> Text:
    """What was written, or why nothing was."""
    if text["text"]:
        return literal(text["text"])
    why = "the text ends here" if text["kl"] is not None else "pushed this far, the model gives no numbers"
    return literal(f"(nothing: {why})", "dim")


def _numbers(texts: Sequence[Mapping]) -> RenderableType:
    rows = [
        (
            _NAMES[t["kind"]],
            "–" if t["norms"] is None else f"{t['norms']:+,.{2 if abs(t['norms']) < 1000 else 0}f}",
            number(t["kl"]),
            number(t["perplexity"]),
        )
        for t in texts
    ]
    return table(["", "norms", "KL", "perplexity"], rows, right=(1, 2, 3))
