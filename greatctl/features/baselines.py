"""What a latent has to beat, one row a baseline, all measured on the same held-out authors.

A claim about a latent is worth its margin over the simplest thing that does as well: a direction or a probe on the
raw residual stream, a single neuron, the letters and small words of the text, an autoencoder that had nothing to
learn, and the same search under labels that mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from . import probes
from .probes import Score
from .style import character_ngrams, function_words
from .units import Cells, gather

__all__ = ["BASELINES", "COMPANIONS", "Baseline", "Material", "baselines", "beats", "interval", "margin"]

FROZEN, UNTRAINED, SEEDS = "SAE with a frozen decoder", "SAE on a random model", "SAEs of other seeds"
COMPANIONS = (FROZEN, UNTRAINED, SEEDS)  # of `train --controls`
MEANS, PROBE, NEURONS, PARTS = "difference of means", "logistic probe", "neurons", "principal components"
NGRAMS, WORDS = "character n-grams", "function words"
SHUFFLED, ARBITRARY, RANDOM = "shuffled labels", "arbitrary labels", "random directions"
BASELINES = (*COMPANIONS, MEANS, PROBE, NEURONS, PARTS, NGRAMS, WORDS, SHUFFLED, ARBITRARY, RANDOM)
"""What a claim is printed next to; a claim that misses one says so."""

_DRAWS = 2000

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Material:
    """What baselines are made of, by document; what is None or not there leaves its baselines missing.

    Attributes:
        residual: mean raw activation [n_documents, d_in].
        texts: some text of each document.
        controls: name of a companion (of `COMPANIONS`) -> mean latents [n_documents, d_sae], one or several of them.
        weights: tokens behind each document.
    """

    residual: NDArray | None = None
    texts: Sequence[str] | None = None
    controls: Mapping[str, Sequence[NDArray]] = field(default_factory=dict)
    weights: NDArray | None = None


@dataclass(frozen=True)
class Baseline:
    """One baseline's number, or why there is none.

    Attributes:
        score: measured on held-out authors; of companions, that of the latent chosen in the same way.
        bar: AUROC and effect that a candidate has to pass: the score's own, or the 95th percentile where many are
            drawn or chosen (companions, shuffles, random directions).
        why: why it is missing.
    """

    name: str
    score: Score | None = None
    bar: tuple[float, float] | None = None
    why: str = ""


def baselines(
    cells: Cells, rows: Sequence[Mapping[str, object]], material: Material, *, n_candidates: int, seed: int = 0
) -> list[Baseline]:
    """Measure every baseline of `BASELINES`.

    Args:
        cells: the latents themselves, gathered from `rows` (one a document).
        n_candidates: latents that were chosen as candidates; as many are chosen from each companion.
    """
    if not probes.testable(cells):
        why = f"no {cells.unit}s of both roles are held out beside {cells.unit}s in training"
        return [Baseline(name, why=why) for name in BASELINES]
    pick = _Picker(rows, material, cells.unit)
    found = [_companion(pick, name, n_candidates) for name in COMPANIONS]
    raw: list[tuple[str, Callable[[Cells], Score]]] = [
        (MEANS, probes.difference_of_means),
        (PROBE, probes.logistic),
        (NEURONS, lambda c: probes.best_column(c, "neuron")),
        (PARTS, probes.components),
    ]
    residual = pick(material.residual)
    found += [_of(name, residual, fit, "the raw activations were not summed") for name, fit in raw]
    for name, count in ((NGRAMS, character_ngrams), (WORDS, function_words)):
        features = None if material.texts is None else pick(count(material.texts))
        found.append(_of(name, features, probes.logistic, "the texts were not read"))
    found.append(_of(SHUFFLED, cells, lambda c: probes.shuffled_labels(c, seed), ""))
    arbitrary = probes.arbitrary_labels(cells, cells.authors)
    found.append(Baseline(ARBITRARY, arbitrary, _bar(arbitrary), "" if arbitrary else "too few to halve"))
    found.append(
        _of(RANDOM, residual, lambda c: probes.random_directions(c, seed), "the raw activations were not summed")
    )
    return found


class _Picker:
    """Gathers features of documents as the latents were."""

    def __init__(self, rows: Sequence[Mapping[str, object]], material: Material, unit: str) -> None:
        self._rows, self._weights, self._unit = rows, material.weights, unit
        self.controls = material.controls

    def __call__(self, features: NDArray | None) -> Cells | None:
        return None if features is None else gather(features, self._rows, self._weights)


def _of(name: str, cells: Cells | None, fit: Callable[[Cells], Score], why: str) -> Baseline:
    if cells is None:
        return Baseline(name, why=why)
    score = fit(cells)
    return Baseline(name, score, _bar(score))


def _bar(score: Score | None) -> tuple[float, float] | None:
    return None if score is None else (score.auroc, score.effect)


def _companion(pick: _Picker, name: str, n_candidates: int) -> Baseline:
    """The best latent of a companion, and what 95 % of its candidates stay below; of several, the strongest."""
    found = []
    for means in pick.controls.get(name, ()):
        cells = pick(means)
        assert cells is not None
        found.append((probes.spread_of_columns(cells, n_candidates), probes.best_column(cells, "latent")))
    if not found:
        return Baseline(name, why="it was not trained, or not read: greatctl train --controls")
    bar, score = max(found, key=lambda pair: pair[0])
    return Baseline(name, score, bar)


def margin(cells: Cells, candidate: Score, baseline: Baseline, seed: int = 0) -> tuple[float, float, float]:
    """AUROC of the candidate minus the baseline's bar, with a 95 % bootstrap interval over held-out authors.

    Where the bar is the baseline's own score the authors are drawn for both together; else the bar is fixed.
    """
    assert baseline.bar is not None and baseline.score is not None
    role = cells.author_role[cells.heldout]
    wins = _wins(candidate.authors[cells.heldout], role)
    own = baseline.score.authors.any() and baseline.bar[0] == baseline.score.auroc
    against = _wins(baseline.score.authors[cells.heldout], role) if own else np.full_like(wins, baseline.bar[0])
    low, high = _drawn(wins - against, seed)
    return candidate.auroc - baseline.bar[0], low, high


def interval(cells: Cells, score: Score, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of a score's AUROC over held-out authors."""
    return _drawn(_wins(score.authors[cells.heldout], cells.author_role[cells.heldout]), seed)


def _drawn(wins: Floats, seed: int) -> tuple[float, float]:
    """2.5 % and 97.5 % of the mean of `wins` [n_characters, n_controls] when both sides are drawn again."""
    ones, zeros = _draws(*wins.shape, seed)
    low, high = np.quantile(((ones @ wins) * zeros).sum(axis=1), [0.025, 0.975])
    return float(low), float(high)


@lru_cache(maxsize=8)
def _draws(n_characters: int, n_controls: int, seed: int) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(seed)
    one, other = (rng.multinomial(n, np.full(n, 1 / n), size=_DRAWS) / n for n in (n_characters, n_controls))
    return one, other


def beats(candidate: Score, baseline: Baseline) -> bool:
    """Whether a candidate's AUROC on the held-out authors is above a baseline's bar; as good is not better."""
    assert baseline.bar is not None
    return candidate.auroc > baseline.bar[0]


def _wins(score: Floats, role: NDArray[np.bool_]) -> Floats:
    """1 where a character's score is above a control's, 1/2 where equal [n_characters, n_controls]."""
    above = score[role][:, None] - score[~role][None, :]
    return (np.sign(above) + 1) / 2
