"""Is a label any good? Two questions on examples that its author has not seen, and what chance would say.

Detection: which passages does the latent fire in, half of them silent (near misses and passages drawn at random).
Fuzzing: which passages have the right tokens marked, half of them marked elsewhere. Both are balanced accuracies, 0.5 for
guessing, and each stands beside the score of another latent's label on the very same questions: what that one gets is
what any label would.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from .label_prompts import Passage, marked

__all__ = ["Exam", "balanced_accuracy", "make_exam", "shift"]

SHOWN, TESTED = 12, 10  # passages that the labeler sees, and firing ones that it is asked about
_BATCH = 10  # passages a question


@dataclass(frozen=True)
class Exam:
    """What is shown of a latent, and what is asked about it.

    Attributes:
        shown: passages for the labeler, strongest first.
        detection: questions, each a list of (passage, whether the latent fires in it).
        fuzzing: questions, each a list of (marked text, whether it is rightly marked).
    """

    shown: Sequence[Passage]
    detection: Sequence[Sequence[tuple[Passage, bool]]]
    fuzzing: Sequence[Sequence[tuple[str, bool]]]


def make_exam(
    latent: int, firing: Sequence[Passage], near: Sequence[Passage], far: Sequence[Passage], seed: int
) -> Exam:
    """Divide a latent's passages; nothing that is asked about was shown, neither its window nor its text.

    Args:
        firing: passages in which it fires, strongest first.
        near: passages in which it is silent although the model's state leans its way.
        far: passages drawn without regard to it, in which it is silent.
    """
    dice = random.Random(f"{seed}/{latent}")
    shown = list(firing[::2])[:SHOWN]
    windows, texts = {p.window for p in shown}, {p.text for p in shown}
    unseen = [p for p in firing if p.window not in windows and p.text not in texts]
    tested = dice.sample(unseen, min(TESTED, len(unseen)))
    silent = [p for p in near if p.window not in windows]
    hard = dice.sample(silent, min(len(tested) // 2, len(silent)))
    easy = dice.sample(list(far), min(len(tested) - len(hard), len(far)))
    asked = [(p, True) for p in tested] + [(p, False) for p in hard + easy]
    dice.shuffle(asked)
    marks = [_marked(p, i % 2 == 0, dice) for i, p in enumerate(tested)]
    texts_asked = [row for row in marks if row is not None]
    dice.shuffle(texts_asked)
    return Exam(shown, _batches(asked), _batches(texts_asked))


def balanced_accuracy(truth: Sequence[bool], answers: Sequence[bool]) -> float | None:
    """Mean of the shares of yes and of no that were answered rightly; None where the truth has one of them only."""
    right = {side: [a == side for t, a in zip(truth, answers, strict=True) if t == side] for side in (True, False)}
    if not right[True] or not right[False]:
        return None
    return sum(sum(hits) / len(hits) for hits in right.values()) / 2


def shift(latents: Sequence[int], seed: int) -> dict[int, int]:
    """For each latent another one whose label takes its label's place; nobody keeps its own. Empty for one alone."""
    order = sorted(latents)
    random.Random(seed).shuffle(order)
    return dict(zip(order, order[1:] + order[:1], strict=True)) if len(order) > 1 else {}


def _marked(passage: Passage, rightly: bool, dice: random.Random) -> tuple[str, bool] | None:
    """The passage with the tokens that fire marked, or as many others; None where there are not as many others."""
    if rightly:
        return marked(passage, passage.fires), True
    others = [i for i, piece in enumerate(passage.pieces) if passage.heat[i] <= 0 and piece.strip()]
    if len(others) < len(passage.fires):
        return None
    return marked(passage, dice.sample(others, len(passage.fires))), False


def _batches(rows: list) -> list[list]:
    return [rows[i : i + _BATCH] for i in range(0, len(rows), _BATCH)]
