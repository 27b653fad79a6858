"""Simple rivals of a latent: directions and single columns, fitted on training authors, scored on held-out ones.

Everything here takes `Cells` (works and authors with their mean features: residual stream, word counts, latents of
another SAE) and gives a score for each author and work. All are measured alike: chosen or fitted on training works
alone, then AUROC and effect on authors who were held out, so that a latent and its rivals stand in one column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..stats import auroc, effect_size
from .agreement import training_works
from .units import Cells

__all__ = [
    "Score",
    "arbitrary_labels",
    "best_column",
    "column",
    "components",
    "difference_of_means",
    "logistic",
    "measure",
    "random_directions",
    "shuffled_labels",
    "spread_of_columns",
    "strongest",
    "testable",
    "training",
]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
_COMPONENTS = 20
_RIDGE = 1.0  # on columns of unit variance, against one unit of weight an author
_NEWTON_STEPS = 30


@dataclass(frozen=True)
class Score:
    """How well something tells held-out characters from controls.

    Attributes:
        auroc, effect: over held-out authors, positive and above .5 when characters are higher, as in training.
        works_auroc: kept-apart works of training authors against controls' works; None where there are none.
        what: what was chosen ("column 17"), for people.
        authors: the score of each author [n_authors], turned so that characters are higher in training.
        n: how many were looked at to choose it, or drawn.
    """

    auroc: float
    effect: float
    works_auroc: float | None
    what: str
    authors: Floats
    n: int = 1


def testable(cells: Cells) -> bool:
    """Whether both roles have authors in training and among the held-out."""
    role, held = cells.author_role, cells.heldout
    return all(bool((a & b).any()) for a in (held, ~held) for b in (role, ~role))


def training(cells: Cells) -> tuple[Floats, Bools]:
    """Author means over training works alone, works counting equally [n_training, n_columns], and their roles."""
    works = training_works(cells)
    authors = np.unique(cells.work_author[works])
    place = np.searchsorted(authors, cells.work_author[works])
    total = np.zeros((len(authors), cells.work_means.shape[1]))
    np.add.at(total, place, cells.work_means[works])
    return total / np.bincount(place, minlength=len(authors))[:, None], cells.author_role[authors]


def strongest(means: Floats, role: Bools, n: int) -> list[int]:
    """The n columns with the largest difference of roles, in standard deviations over units; ties by number."""
    if not role.any() or role.all():
        return list(range(min(n, means.shape[1])))
    return np.argsort(-np.abs(_standardised(means, role)), kind="stable")[:n].tolist()


def measure(cells: Cells, direction: Floats, what: str, n: int = 1) -> Score:
    """Score authors and works by their projection on a direction [n_columns]."""
    return _score(cells, cells.author_means @ direction, cells.work_means @ direction, what, n)


def _score(cells: Cells, authors: Floats, works: Floats, what: str, n: int) -> Score:
    held, role = cells.heldout, cells.author_role
    area = float(auroc(authors[held], role[held])[0])
    effect = float(effect_size(authors[held & role, None], authors[held & ~role, None])[0])
    return Score(area, effect, _works(cells, works), what, authors, n)


def _works(cells: Cells, score: Floats) -> float | None:
    role = cells.author_role[cells.work_author]
    positive = cells.work_heldout & role
    unseen = ~role & (cells.work_heldout | cells.heldout[cells.work_author])
    if not positive.any() or not unseen.any():
        return None
    return float(auroc(score[positive | unseen], positive[positive | unseen])[0])


def _standardised(means: Floats, role: Bools) -> Floats:
    spread = np.maximum(means.std(axis=0), np.finfo(float).tiny)
    return (means[role].mean(axis=0) - means[~role].mean(axis=0)) / spread


def best_column(cells: Cells, name: str) -> Score:
    """The column that differs most in training (a latent, a neuron)."""
    means, role = training(cells)
    return column(cells, int(np.abs(_standardised(means, role)).argmax()), name)


def column(cells: Cells, place: int, name: str) -> Score:
    """One column, turned as in training."""
    means, role = training(cells)
    sign = np.sign(_standardised(means[:, [place]], role)[0]) or 1.0
    authors, works = cells.author_means[:, place] * sign, cells.work_means[:, place] * sign
    return _score(cells, authors, works, f"{name} {place}", means.shape[1])


def spread_of_columns(cells: Cells, n: int, quantile: float = 0.95) -> tuple[float, float]:
    """AUROC and effect on held-out authors that `quantile` of the n columns strongest in training stay below.

    They are chosen as candidates are, each turned as in training.
    """
    means, role = training(cells)
    chosen = strongest(means, role, n)
    sign = np.sign(_standardised(means[:, chosen], role))
    held = cells.heldout
    y = cells.author_means[:, chosen] * sign
    area = auroc(y[held], cells.author_role[held])
    effect = effect_size(y[held & cells.author_role], y[held & ~cells.author_role])
    order = np.lexsort((effect, area))
    here = order[min(int(np.ceil(quantile * len(order))), len(order)) - 1]
    return float(area[here]), float(effect[here])


def difference_of_means(cells: Cells) -> Score:
    """The line from the controls' mean to the characters' (training authors)."""
    means, role = training(cells)
    return measure(cells, means[role].mean(axis=0) - means[~role].mean(axis=0), "")


def logistic(cells: Cells) -> Score:
    """A logistic probe with a ridge, on training works weighted equally by author, and roles equally."""
    works = training_works(cells)
    x, author = cells.work_means[works], cells.work_author[works]
    role = cells.author_role[author]
    weight = 1.0 / np.bincount(author)[author]
    for side in (role, ~role):
        weight[side] *= len(np.unique(author)) / 2 / weight[side].sum()
    scale = np.maximum(x.std(axis=0), 1e-9 * max(float(np.abs(x).max()), np.finfo(float).tiny))
    direction = _logistic((x - x.mean(axis=0)) / scale, role.astype(np.float64), weight)
    return measure(cells, direction / scale, "")


def _logistic(x: Floats, y: Floats, weight: Floats) -> Floats:
    """Newton steps in the span of the rows (few rows, many columns); the direction [n_columns]."""
    _, size, basis = np.linalg.svd(x, full_matrices=False)
    basis = basis[size > 1e-9 * max(size.max(initial=0.0), 1e-300)]
    design = np.concatenate([x @ basis.T / np.sqrt(x.shape[1]), np.ones((len(x), 1))], axis=1)
    ridge = np.diag([_RIDGE / x.shape[1]] * len(basis) + [1e-9])
    b = np.zeros(design.shape[1])
    for _ in range(_NEWTON_STEPS):
        p = 1 / (1 + np.exp(-np.clip(design @ b, -30, 30)))
        slope = design.T @ (weight * (y - p)) - ridge @ b
        curve = (design * (weight * np.maximum(p * (1 - p), 1e-6))[:, None]).T @ design + ridge
        step = np.linalg.solve(curve, slope)
        b += np.clip(step, -5, 5)
        if np.abs(step).max() < 1e-8:
            break
    return b[:-1] @ basis / np.sqrt(x.shape[1])


def components(cells: Cells) -> Score:
    """The best of the first principal components of the training works."""
    x = cells.work_means[training_works(cells)]
    basis = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)[2][:_COMPONENTS]
    means, role = training(cells)
    difference = _standardised(means @ basis.T, role)
    best = int(np.abs(difference).argmax())
    return measure(cells, basis[best] * (np.sign(difference[best]) or 1.0), f"component {best}", len(basis))


def random_directions(cells: Cells, seed: int, draws: int = 1000, quantile: float = 0.95) -> Score:
    """What `quantile` of random directions, each turned as in training, stay below on held-out authors."""
    basis = np.random.default_rng(seed).normal(size=(cells.author_means.shape[1], draws))
    means, role = training(cells)
    y = cells.author_means @ basis * np.sign(_standardised(means @ basis, role))
    held = cells.heldout
    area = auroc(y[held], cells.author_role[held])
    effect = effect_size(y[held & cells.author_role], y[held & ~cells.author_role])
    here = np.lexsort((effect, area))[int(np.ceil(quantile * draws)) - 1]
    return Score(float(area[here]), float(effect[here]), None, f"{quantile:.0%} of {draws:,}", y[:, here], draws)


def shuffled_labels(cells: Cells, seed: int, draws: int = 100, quantile: float = 0.95) -> Score:
    """The whole choice on shuffled author labels: what `quantile` of the shuffles stay below on held-out authors.

    Labels are shuffled inside the training and the held-out authors, so that the counts stay.
    """
    rng = np.random.default_rng(seed)
    held, role = cells.heldout, cells.author_role
    found = []
    for _ in range(draws):
        labels = role.copy()
        for part in (held, ~held):
            labels[part] = rng.permutation(role[part])
        found.append(_under_labels(cells.author_means, labels, held))
    area, effect = sorted(found)[int(np.ceil(quantile * draws)) - 1]
    return Score(area, effect, None, f"{quantile:.0%} of {draws} shuffles", np.zeros(len(role)), draws)


def arbitrary_labels(cells: Cells, names: Sequence[str]) -> Score | None:
    """The same choice on a label that means nothing: names in the first half of the alphabet against the second."""
    order = sorted(range(len(names)), key=lambda i: str(names[i]).casefold())
    labels = np.zeros(len(names), dtype=bool)
    labels[order[: len(order) // 2]] = True
    if not all((labels & part).any() and (~labels & part).any() for part in (cells.heldout, ~cells.heldout)):
        return None
    area, effect = _under_labels(cells.author_means, labels, cells.heldout)
    return Score(area, effect, None, "names by initial", np.zeros(len(names)), cells.author_means.shape[1])


def _under_labels(y: Floats, labels: Bools, held: Bools) -> tuple[float, float]:
    difference = _standardised(y[~held], labels[~held])
    best = int(np.abs(difference).argmax())
    column = y[:, best] * (np.sign(difference[best]) or 1.0)
    area = float(auroc(column[held], labels[held])[0])
    return area, float(effect_size(column[held & labels, None], column[held & ~labels, None])[0])
