"""Is a label any good? Two questions on examples that its author has not seen, and what chance would say.

Detection: which passages does the latent fire in, half of them silent (near misses and passages drawn at random).
Fuzzing: which passages have the right tokens marked, half of them marked elsewhere. Both are balanced accuracies, 0.5 for
guessing, and each stands beside the score of another latent's label on the very same questions: what that one gets is
what any label would.

What is asked about comes from works of which nothing was shown, where a latent fires in enough of them: a label that
names a book would otherwise be right for the wrong reason. `Exam.split` says whether that was possible.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from .label_prompts import Passage, marked

__all__ = ["EXAMS", "Asked", "Exam", "accuracy_interval", "balanced_accuracy", "make_exam", "shift"]

EXAMS = 2
"""Raised when the rules below change, so that labels with scores by the old ones are made again."""

SHOWN, TESTED = 12, 10  # passages that the labeler sees, and firing ones that it is asked about
_FEWEST = 4  # passages on each side without which works are not kept apart
_BATCH = 10  # passages a question
_Z = 1.959964  # 95 %


@dataclass(frozen=True)
class Asked:
    """One example of a question: `text` as the labeler reads it, and the right answer."""

    passage: Passage
    text: str
    right: bool


@dataclass(frozen=True)
class Exam:
    """What is shown of a latent, and what is asked about it.

    Attributes:
        shown: passages for the labeler, strongest first.
        detection: questions, each a list of passages; right where the latent fires in it.
        fuzzing: questions, each a list of marked passages; right where the marks are.
        split: what shown and asked share none of: `works`, or `passages` where works were too few.
    """

    shown: Sequence[Passage]
    detection: Sequence[Sequence[Asked]]
    fuzzing: Sequence[Sequence[Asked]]
    split: str = "passages"


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
    pool, split = _to_show(firing)
    shown = pool[:SHOWN]
    taken = {p.source for p in pool} if split == "works" else set()
    windows, texts = {p.window for p in shown}, {p.text for p in shown}

    def unseen(passages: Sequence[Passage]) -> list[Passage]:
        return [p for p in passages if p.window not in windows and p.text not in texts and p.source not in taken]

    candidates = unseen(firing)
    tested = dice.sample(candidates, min(TESTED, len(candidates)))
    silent, drawn = unseen(near), unseen(far)
    hard = dice.sample(silent, min(len(tested) // 2, len(silent)))
    easy = dice.sample(drawn, min(len(tested) - len(hard), len(drawn)))
    asked = [Asked(p, p.text, True) for p in tested] + [Asked(p, p.text, False) for p in hard + easy]
    dice.shuffle(asked)
    marks = [_marked(p, i % 2 == 0, dice) for i, p in enumerate(tested)]
    texts_asked = [row for row in marks if row is not None]
    dice.shuffle(texts_asked)
    return Exam(shown, _batches(asked), _batches(texts_asked), split)


def balanced_accuracy(truth: Sequence[bool], answers: Sequence[bool]) -> float | None:
    """Mean of the shares of yes and of no that were answered rightly; None where the truth has one of them only."""
    sides = _hits(truth, answers)
    return sum(right / of for right, of in sides) / 2 if all(of for _, of in sides) else None


def accuracy_interval(truth: Sequence[bool], answers: Sequence[bool]) -> tuple[float, float] | None:
    """The 95 % interval of a balanced accuracy; None where there is none.

    Wilson intervals of the two shares, put together by square-and-add (Newcombe 1998): honest for ten examples a side,
    and never of no width, as a bootstrap of ten right answers would be.
    """
    sides = _hits(truth, answers)
    if not all(of for _, of in sides):
        return None
    limits = [(right / of, *_wilson(right, of)) for right, of in sides]
    middle = sum(share for share, _, _ in limits) / 2
    below, above = (sqrt(sum((row[0] - row[end]) ** 2 for row in limits)) / 2 for end in (1, 2))
    return max(0.0, middle - below), min(1.0, middle + above)


def shift(latents: Sequence[int], seed: int) -> dict[int, int]:
    """For each latent another one whose label takes its label's place; nobody keeps its own. Empty for one alone."""
    order = sorted(latents)
    random.Random(seed).shuffle(order)
    return dict(zip(order, order[1:] + order[:1], strict=True)) if len(order) > 1 else {}


def _to_show(firing: Sequence[Passage]) -> tuple[list[Passage], str]:
    """The passages that may be shown: all of about half the works, or every second where that leaves too few."""
    sides: dict[bool, list[Passage]] = {True: [], False: []}
    side_of: dict[str, bool] = {}
    for passage in firing:
        side = side_of.setdefault(passage.source, len(sides[True]) <= len(sides[False]))
        sides[side].append(passage)
    if min(map(len, sides.values())) >= _FEWEST:
        return sides[True], "works"
    return list(firing[::2]), "passages"


def _hits(truth: Sequence[bool], answers: Sequence[bool]) -> list[tuple[int, int]]:
    """For yes and for no: how many were answered rightly, of how many."""
    both = list(zip(truth, answers, strict=True))
    return [(sum(a == side for t, a in both if t == side), sum(t == side for t, _ in both)) for side in (True, False)]


def _wilson(right: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    share, z2 = right / of, _Z * _Z
    middle = (share + z2 / (2 * of)) / (1 + z2 / of)
    half = _Z * sqrt(share * (1 - share) / of + z2 / (4 * of * of)) / (1 + z2 / of)
    return middle - half, middle + half


def _marked(passage: Passage, rightly: bool, dice: random.Random) -> Asked | None:
    """The passage with the tokens that fire marked, or as many others; None where there are not as many others."""
    if rightly:
        return Asked(passage, marked(passage, passage.fires), True)
    others = [i for i, piece in enumerate(passage.pieces) if passage.heat[i] <= 0 and piece.strip()]
    if len(others) < len(passage.fires):
        return None
    return Asked(passage, marked(passage, dice.sample(others, len(passage.fires))), False)


def _batches(rows: list[Asked]) -> list[list[Asked]]:
    return [rows[i : i + _BATCH] for i in range(0, len(rows), _BATCH)]
