"""What a labeler called the latents, and how far each name may be believed.

A label is a stranger's words. It never stands without who gave it, what it scored on passages that its author had not
seen, and what the label of another latent scored on the very same questions. One that does no better than that other
label says nothing: it is shown as such, and the latent goes by its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..store.artifact import Artifact
from .tables import Row, rows
from .view import Block, Label, Origin, Prose, Score, read_from

__all__ = ["by_tokens", "introduction", "read"]

_TASKS = ("detection", "fuzzing")
_TOKENS = 3
_CHANCE = 0.5


def read(labels: Artifact | None) -> dict[int, Label]:
    """Latent -> its label; empty where no labeler was asked."""
    if labels is None:
        return {}
    origin = Origin(labels.fingerprint, "labels.parquet")
    return {row["latent"]: _label(row, origin) for row in rows(labels.path / "labels.parquet")}


def by_tokens(tokens: Sequence[str] | None) -> str:
    """What a latent is called without a label: the tokens on which it fires most."""
    return " · ".join(token.strip() or repr(token)[1:-1] for token in list(tokens or [])[:_TOKENS])


def introduction(labels: Artifact | None, named: Mapping[int, Label]) -> list[Block]:
    """Who named how many latents and how well, or that nobody did."""
    if labels is None:
        words = (
            "No labels were written for this run: a latent is named by the tokens on which it fires most. "
            "`greatctl interpret --labeler URL --labeler-model NAME` asks for some."
        )
        return [Prose(words, quiet=True)]
    summary = labels.summary
    means = [_beside(task, summary) for task in _TASKS]
    doubted = sum(bool(label.name) and not label.holds for label in named.values())
    aside = f" {doubted} did no better than that or than guessing: they are shown as such, and the latents go by their tokens."
    words = (
        f"{summary.get('labeler')} named {summary.get('n_named')} of {summary.get('n_latents')} latents: on average "
        f"{', '.join(means)}; guessing gives {_CHANCE}. A label is a way to find a latent again. It is no part of any verdict."
    )
    return read_from(labels, "labels.parquet", [Prose(words + (aside if doubted else ""))])


def _label(row: Row, origin: Origin) -> Label:
    named = row["source"] == "labeler"
    scores = [_score(row, task) for task in _TASKS]
    clear = [score for score in scores if _clear(score)]
    return Label(
        name=str(row["name"] or "") if named else "",
        description=str(row["description"] or "") if named else "",
        by=str(row["labeler"] or "an unknown labeler"),
        scores=scores,
        shuffled_with=row["shuffled_with"],
        asked_about=str(row["split"] or "passages"),
        holds=named and bool(clear),
        doubt=_doubt(row, scores, clear),
        origin=origin,
    )


def _score(row: Row, task: str) -> Score:
    low, high = row[f"{task}_low"], row[f"{task}_high"]
    return Score(task, row[task], low, high, row[f"{task}_shuffled"], row[f"n_{task}"] or 0)


def _clear(score: Score) -> bool:
    """It does better than another latent's label, and its interval (where there is one) leaves guessing out."""
    if score.value is None or score.shuffled is None:
        return False
    return score.value > score.shuffled and (score.low is None or score.low > _CHANCE)


def _doubt(row: Row, scores: Sequence[Score], clear: Sequence[Score]) -> str:
    """What speaks against a label; empty where it does clearly better than another latent's in all that was asked."""
    if row["source"] != "labeler":
        return f"The labeler gave no name that could be used: {row['problem'] or 'it did not say why'}."
    measured = [score for score in scores if score.value is not None]
    compared = [score for score in measured if score.shuffled is not None]
    if not measured:
        return "It was not scored, since too few passages could be asked about: nothing says that it fits."
    if not compared:
        return "There is no other latent's label to hold it against: its scores say little."
    if not clear:
        return "It does no better than another latent's label or than guessing: it says nothing of this latent."
    weak = [score.task for score in compared if score not in clear]
    return f"In {weak[0]} it does no better than another latent's label or than guessing." if weak else ""


def _beside(task: str, summary: Mapping[str, Any]) -> str:
    """The mean score of a task, that of other latents' labels, and what lies between them."""
    value, shuffled, gain = (summary.get(f"{task}{end}") for end in ("", "_shuffled", "_gain"))
    if value is None:
        return f"{task} not available"
    more = f"; {gain[0]:+.2f}, 95 % {gain[1]:+.2f} to {gain[2]:+.2f}" if gain else ""
    return f"{task} {value:.2f}" + (f" (another latent's label {shuffled:.2f}{more})" if shuffled is not None else "")
