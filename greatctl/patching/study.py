"""One circuit from scores to a verdict: chosen on some pairs, judged on others, against chance, in one sentence.

The order matters. Pairs that are not held out choose the set (`choose`); everything that is claimed of it is then
measured on the held-out ones (`judge`), where there are any. A verdict names what was found even where it is
nothing: that no small set carries the behaviour is a result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..stats import Interval
from .circuits import Wiring, ladder, prune, random_sets, threshold, top_sets
from .faithfulness import (
    SIZES,
    Areas,
    Ends,
    Minimality,
    Runs,
    Sufficiency,
    areas,
    count_of,
    inflated,
    minimality,
    sufficiency,
)

__all__ = ["GOAL", "SMALL", "Curve", "Judged", "choose", "curve", "judge", "split", "verdict"]

GOAL = 0.9  # a set will do where |1 - f| <= 1 - GOAL
SMALL, FEW = 0.1, 16  # more than this share of all components, and than so many, is no small circuit
_TOGETHER = 8  # sets measured at once while the smallest is looked for
_MOST_REMOVED = 200  # components of one circuit that are taken out one by one
Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]
Progress = Callable[[str, int, int], None]


def split(heldout: Sequence[bool]) -> tuple[Mask, Mask]:
    """[n] which pairs choose, and which judge; all of them do both where one side would be empty."""
    held = np.asarray(heldout, dtype=bool)
    if held.all() or not held.any():
        return np.ones_like(held), np.ones_like(held)
    return ~held, held


def choose(
    runs: Runs,
    ends: Ends,
    scores: Floats,
    rows: Mask,
    *,
    selection: str = "threshold",
    size: int | None = None,
    wiring: Wiring | None = None,
) -> Mask:
    """The components of a circuit, [N] bool.

    `threshold` takes the best by |score|: `size` of them, or the fewest that restore the behaviour to within
    1 - GOAL. `greedy` begins with those and takes out what is not needed for that.

    Args:
        runs: the model.
        ends: what it does with nothing and with everything kept.
        scores: [N].
        rows: [n_pairs] bool: the pairs that may choose.
        selection: `threshold` or `greedy`.
        size: how many components, None for as few as will do.
        wiring: for edges.
    """

    def good(values: Floats) -> NDArray[np.bool_]:
        return np.abs(1 - ends.share(values, rows)) <= 1 - GOAL

    keep = threshold(scores, size, wiring) if size is not None else _smallest(runs, scores, good, rows, wiring)
    if selection == "greedy":
        keep = prune(keep, scores, lambda trial: bool(good(runs.values(trial[None], rows))[0]), wiring)
    return keep


def _smallest(runs: Runs, scores: Floats, good: Callable[[Floats], Mask], rows: Mask, wiring: Wiring | None) -> Mask:
    """The first set on the ladder of sizes that will do; all components do, by definition."""
    sizes = ladder(len(scores))
    for at in range(0, len(sizes), _TOGETHER):
        sets = top_sets(scores, sizes[at : at + _TOGETHER], wiring)
        will_do = np.flatnonzero(good(runs.values(sets, rows)))
        if len(will_do):
            return sets[will_do[0]]
    return np.ones(len(scores), dtype=bool)


@dataclass(frozen=True)
class Curve:
    """Faithfulness over the share of components that are kept.

    Attributes:
        sizes: [k] shares.
        counts: [k] components kept; of edges fewer than the share where the rest hangs in the air.
        values: [k, n_pairs] the metric.
        f: [k] with its interval.
        areas: CPR and CMD.
    """

    sizes: Sequence[float]
    counts: Sequence[int]
    values: Floats
    f: Interval
    areas: Areas


def curve(
    runs: Runs, ends: Ends, scores: Floats, rows: Mask, clusters: Sequence[object], *, wiring: Wiring | None = None
) -> Curve:
    """Faithfulness of the best components by |score| at each of `SIZES`, over the pairs `rows` [n_pairs] bool."""
    sets = top_sets(scores, [count_of(share, len(scores)) for share in SIZES], wiring)
    values = runs.values(sets)
    f = ends.interval(values, rows, clusters)
    return Curve(SIZES, [int(one.sum()) for one in sets], values, f, areas(f.mean))


@dataclass(frozen=True)
class Judged:
    """What a set does. f is over the judging pairs.

    Attributes:
        keep: [N] bool.
        values: [n_pairs] the metric with the set alone; `without` with everything but it.
        f, left: faithfulness of the set and of its complement, with intervals [1].
        f_chosen: faithfulness over the pairs that chose it.
        random_f: [draws] of random sets of its size.
        sufficiency: the set against them.
        removed: [m] the components that were taken out one by one, indices of `keep`'s components.
        minimality: of those.
    """

    keep: Mask
    values: Floats
    without: Floats
    f: Interval
    left: Interval
    f_chosen: float
    random_f: Floats
    sufficiency: Sufficiency
    removed: NDArray[np.int64]
    minimality: Minimality


def judge(
    runs: Runs,
    ends: Ends,
    keep: Mask,
    scores: Floats,
    rows: tuple[Mask, Mask],
    clusters: Sequence[object],
    *,
    draws: int = 200,
    seed: int = 0,
    wiring: Wiring | None = None,
    strata: Sequence[object] | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Judged:
    """Faithfulness, completeness, sufficiency and minimality of a set.

    Args:
        runs, ends: as for `choose`.
        keep: [N] bool, the set.
        scores: [N]; which components are taken out first where there are many.
        rows: [n_pairs] bool each: the pairs that chose the set, and those that judge it.
        clusters: [n_pairs] what is resampled together.
        draws: random sets, and half as many random additions.
        seed: seed of all of them.
        wiring, strata: what random sets have in common with the set, see `random_sets`.
        progress: told what is done, and how much of it.
    """
    chosen, judging = rows
    both = runs.values(np.stack([keep, ~keep]))
    f, left = (ends.interval(values[None], judging, clusters) for values in both)

    def shares(sets: NDArray[np.bool_], what: str) -> Floats:
        return _shares(runs, ends, sets, judging, lambda done: progress(what, done, len(sets)))

    others = random_sets(keep, draws, seed, wiring=wiring, strata=strata)
    random_f = shares(others, "random sets")
    removed, without = _removals(keep, scores)
    more = inflated(keep, _additions(keep, draws // 2, seed + 1, wiring, strata), seed)
    found = minimality(
        float(f.mean[0]),
        shares(without, "removals"),
        shares(more.reshape(-1, len(keep)), "additions").reshape(-1, 2),
    )
    return Judged(
        keep,
        both[0],
        both[1],
        f,
        left,
        float(ends.share(both[0], chosen)),
        random_f,
        sufficiency(float(f.mean[0]), random_f),
        removed,
        found,
    )


def _shares(runs: Runs, ends: Ends, sets: Mask, rows: Mask, said: Callable[[int], None]) -> Floats:
    """f [s] of sets [s, N] over the pairs `rows`, a few at a time."""
    parts = [np.zeros(0)]
    for at in range(0, len(sets), _TOGETHER):
        parts.append(ends.share(runs.values(sets[at : at + _TOGETHER], rows), rows))
        said(min(at + _TOGETHER, len(sets)))
    return np.concatenate(parts)


def _removals(keep: Mask, scores: Floats) -> tuple[NDArray[np.int64], Mask]:
    """The strongest components of a set [m], in order, and the set without each of them [m, N]."""
    inside = np.flatnonzero(keep)
    order = np.argsort(-np.abs(scores[inside]), kind="stable")[:_MOST_REMOVED]
    removed = inside[np.sort(order)]
    without = np.repeat(keep[None], len(removed), axis=0)
    without[np.arange(len(removed)), removed] = False
    return removed, without


def _additions(
    keep: Mask, draws: int, seed: int, wiring: Wiring | None, strata: Sequence[object] | None
) -> NDArray[np.bool_]:
    """What a set is inflated with: random sets of a tenth of its size, at least three components (a path of edges)."""
    n = max(3, int(keep.sum()) // 10)
    like = np.zeros_like(keep)
    like[np.flatnonzero(keep)[:n]] = True
    if not keep.any():
        return np.zeros((0, len(keep)), dtype=bool)
    return random_sets(like, draws, seed, wiring=wiring, strata=strata if strata and like.any() else None)


def verdict(judged: Judged, kind: str, *, held_out: bool) -> str:
    """One honest sentence for people."""
    n, total, f = int(judged.keep.sum()), len(judged.keep), float(judged.f.mean[0])
    word = kind if n != 1 else kind.removesuffix("s")
    where = " on held-out pairs" if held_out else ""
    draws, beaten = judged.sufficiency.draws, judged.sufficiency.beaten
    parts = f"the {n:,} {word} (of {total:,}) restore {f:.2f} of the effect{where}"
    chance = f"{draws - beaten} of {draws} random sets of {n:,} do as well" if draws else "no random set was drawn"
    left = f"without them {float(judged.left.mean[0]):.2f} is left"
    if not np.isfinite(f):
        return "no verdict: the two ends do not differ over these pairs"
    if n > max(SMALL * total, FEW):
        return f"no small circuit found: {parts}; {chance}; {left}"
    if abs(1 - f) > 2 * (1 - GOAL):
        return f"no faithful circuit found: {parts}, {judged.f_chosen:.2f} on those that chose them; {chance}; {left}"
    if judged.sufficiency.p > 0.05:
        return f"no better than chance: {parts}; {chance}; {left}"
    return f"{parts}; {chance}; {left}"
