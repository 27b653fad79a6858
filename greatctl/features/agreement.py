"""Does a difference between the roles hold wherever else one looks?

Without any one author, among authors and works that nobody looked at while choosing, between a control and the works
it was matched to, and against the hard controls, who share the subject and not the role. All of it on author means,
for all latents at once; `judgement` says what follows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray
from scipy import stats as scipy_stats

from ..stats import auroc, effect_size, sign_flip_max_t
from .units import Cells

__all__ = ["Agreement", "agreement", "training_units", "training_works"]

HALF = 0.5  # of the difference must remain: nearer to "all of it" than to "nothing"
LEVEL = 0.05
_DRAWS = 10_000
_REACHABLE = 50  # arrangements of the held-out labels; with fewer, p <= .05 needs perfect luck

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Agreement:
    """What each look gave; arrays are [n_latents], numbers that cannot be had are NaN.

    Attributes:
        without_one: role holds (sign, half its size, p <= .05) without any one author; `worst` is the index of the
            author whose loss hurts most.
        heldout_effect, heldout_auroc: characters against controls among the held-out authors, in pooled standard
            deviations; the AUROC is turned so that above .5 means "as among the others".
        works_auroc: the same for the kept-apart works of training authors against all controls' works.
        matched_share, hard_share: what is left of the difference between the roles inside matched pairs, and against
            the hard controls alone (1 = all of it, 0 = nothing, negative = the other way).
        matched_p: two-sided, by sign flips of the pairs.
        n_held: held-out characters and controls. n_matched: pairs. hard_names: the hard controls.
    """

    without_one: Bools
    worst: NDArray[np.int64]
    heldout_effect: Floats
    heldout_auroc: Floats
    works_auroc: Floats
    matched_share: Floats
    matched_p: Floats
    hard_share: Floats
    n_held: tuple[int, int]
    n_works: int
    n_matched: int
    hard_names: list[str]
    heldout: Callable[[int], tuple[bool, str]]


def agreement(cells: Cells) -> Agreement:
    """Look everywhere. Both roles must have an author."""
    y, role = cells.author_means, cells.author_role
    n_latents = y.shape[1]
    difference = y[role].mean(axis=0) - y[~role].mean(axis=0)
    kept, worst = _without_each_author(cells)
    held = cells.heldout
    known = bool((held & role).any() and (held & ~role).any() and (~held & role).any() and (~held & ~role).any())
    unknown = np.full(n_latents, np.nan)
    sign = np.sign(_training_difference(cells)) if known else np.sign(difference)
    heldout_auroc, heldout_effect = unknown, unknown
    if known:
        heldout_auroc = auroc(y[held] * sign, role[held])
        heldout_effect = effect_size(y[held & role], y[held & ~role])
    works, n_works = _works_auroc(cells, sign)
    soft, hard = ~role & ~cells.hard, cells.hard
    against_hard = y[role].mean(axis=0) - y[hard].mean(axis=0) if hard.any() else unknown
    reference = y[role].mean(axis=0) - y[soft].mean(axis=0) if soft.any() else difference
    matched = len(cells.matched) >= 3
    return Agreement(
        without_one=kept,
        worst=worst,
        heldout_effect=heldout_effect,
        heldout_auroc=heldout_auroc,
        works_auroc=works,
        matched_share=_share(cells.matched.mean(axis=0), difference) if matched else unknown,
        matched_p=sign_flip_max_t(cells.matched).p if matched else unknown,
        hard_share=_share(against_hard, reference) if hard.any() and soft.any() else unknown,
        n_held=(int((held & role).sum()), int((held & ~role).sum())),
        n_works=n_works,
        n_matched=len(cells.matched),
        hard_names=[cells.authors[i] for i in np.flatnonzero(hard)],
        heldout=lambda i: _held_out(cells, i),
    )


def training_units(cells: Cells) -> Bools:
    """Authors on whom something may be chosen [n_authors]."""
    return ~cells.heldout


def training_works(cells: Cells) -> Bools:
    """Works on which something may be chosen [n_works]: of training authors, and not kept apart themselves."""
    return ~cells.heldout[cells.work_author] & ~cells.work_heldout


def _share(part: Floats, whole: Floats) -> Floats:
    return np.divide(part, whole, out=np.zeros_like(whole), where=np.abs(whole) > 1e-12)


def _training_difference(cells: Cells) -> Floats:
    y, role, train = cells.author_means, cells.author_role, ~cells.heldout
    return y[train & role].mean(axis=0) - y[train & ~role].mean(axis=0)


def _works_auroc(cells: Cells, sign: Floats) -> tuple[Floats, int]:
    """AUROC of kept-apart works against controls' works; works of the controls that were not read while choosing,
    where there are any."""
    positive = cells.work_heldout & cells.author_role[cells.work_author]
    controls = ~cells.author_role[cells.work_author]
    unseen = controls & (cells.work_heldout | cells.heldout[cells.work_author])
    against = unseen if unseen.any() else controls
    if not positive.any() or not against.any():
        return np.full(cells.work_means.shape[1], np.nan), 0
    rows = positive | against
    return auroc(cells.work_means[rows] * sign, positive[rows]), int(positive.sum())


def _without_each_author(cells: Cells) -> tuple[Bools, NDArray[np.int64]]:
    """Whether role holds without any one author [n_latents], and the author whose loss hurts most."""
    y, role = cells.author_means, cells.author_role
    whole = y[role].mean(axis=0) - y[~role].mean(axis=0)
    worst = np.full(y.shape[1], np.inf)
    who = np.zeros(y.shape[1], dtype=np.int64)
    for left_out in range(len(y)):
        kept = np.arange(len(y)) != left_out
        a, b = y[kept & role], y[kept & ~role]
        if not len(a) or not len(b):
            continue
        difference = a.mean(axis=0) - b.mean(axis=0)
        freedom = max(len(a) + len(b) - 2, 1)
        squares = ((a - a.mean(axis=0)) ** 2).sum(axis=0) + ((b - b.mean(axis=0)) ** 2).sum(axis=0)
        error = np.sqrt(squares / freedom * (1 / len(a) + 1 / len(b)))
        bar = np.maximum(float(scipy_stats.t.isf(LEVEL / 2, freedom)) * error, HALF * np.abs(whole))
        margin = np.sign(whole) * difference - bar
        who, worst = np.where(margin < worst, left_out, who), np.minimum(margin, worst)
    return worst >= 0, who


def _held_out(cells: Cells, i: int) -> tuple[bool, str]:
    """Whether the held-out authors agree with the others on latent i, and the words for it."""
    held, role, y = cells.heldout, cells.author_role, cells.author_means[:, i]
    n1, n0 = int((held & role).sum()), int((held & ~role).sum())
    n_train1, n_train0 = int((~held & role).sum()), int((~held & ~role).sum())
    if not (n1 and n0 and n_train1 and n_train0):
        return True, f"no {cells.unit}s of both roles were held out"
    train = y[~held & role].mean() - y[~held & ~role].mean()
    test = y[held & role].mean() - y[held & ~role].mean()
    said = f"held-out {cells.unit}s ({n1} against {n0})"
    if train * test <= 0:
        return False, f"{said} differ the other way"
    if comb(n1 + n0, n1) < _REACHABLE:
        return True, f"{said} differ the same way (too few for a test of their own)"
    p = _one_sided(y[held] * np.sign(train), role[held])
    return p <= LEVEL, f"{said}: p {p:.2g}"


def _one_sided(y: Floats, role: Bools) -> float:
    """One-sided permutation p that labelled authors are higher; exact where the arrangements are few."""
    n, k = len(y), int(role.sum())
    if comb(n, k) <= _DRAWS:
        sums, extra = np.array([y[list(chosen)].sum() for chosen in combinations(range(n), k)]), 0
    else:
        labels = np.random.default_rng(0).permuted(np.tile(role, (_DRAWS, 1)), axis=1)
        sums, extra = labels @ y, 1
    # with the number of labels fixed, the sum over them orders like the difference of means
    reached = sums >= y[role].sum() - 1e-10 * np.abs(y).sum()
    return float((reached.sum() + extra) / (len(sums) + extra))
