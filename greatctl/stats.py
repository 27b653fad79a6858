"""The few statistics that greatctl's claims rest on: pure, seeded functions over numpy arrays.

Three habits run through all of them. The *unit* is what was drawn independently (an author, a prompt pair), never the
passage or the token. A p-value from `draws` random rearrangements is (count + 1) / (draws + 1), or exact where all
rearrangements can be enumerated; the *floor*, the smallest p that could have come out at all, travels with it,
because a floor above level / looks means that no result could have passed. And many looks are paid for by max-T: one
rearrangement serves all columns, the largest statistic among them is kept, and each column is compared with that
(Westfall and Young 1993), which controls the family-wise error and uses the dependence between columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats

__all__ = [
    "Interval",
    "LabelTest",
    "SignFlipTest",
    "auroc",
    "benjamini_hochberg",
    "bootstrap_interval",
    "detection_power",
    "draws_for",
    "effect_size",
    "label_permutation",
    "out_of_reach",
    "sign_flip_max_t",
    "smallest_detectable_effect",
]

Floats = NDArray[np.float64]
Measure = Callable[[Floats], Floats]  # arrangements [n, n_units] -> statistics [n, n_columns]
EXACT_PAIRS = 12  # 2^11 different flips: enumerated
LARGEST_EFFECT = 99.0  # what a difference without any spread inside the groups is reported as
_CHUNK = 1 << 22  # numbers held at once by the resampling loops
_CACHED = 1 << 17  # the same where each number is read three times: what stays in a processor's cache
_TIE = 1e-10  # relative; rearrangements of the same numbers differ by rounding


@dataclass(frozen=True)
class Interval:
    """A mean with its interval; each is [n_columns] float64, NaN where there are too few units to tell."""

    mean: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True)
class SignFlipTest:
    """Result of `sign_flip_max_t`.

    Attributes:
        t: one-sample t of each column [n_cells]; infinite where all effects of a column are equal and not
            0, NaN for a single pair.
        p: two-sided p-value of each column alone [n_cells].
        p_max_t: family-wise p-value [n_cells].
        floor: the smallest p that this many pairs and draws can give.
        n_units: what was flipped: pairs, or clusters of pairs.
    """

    t: Floats
    p: Floats
    p_max_t: Floats
    floor: float
    n_units: int

    @property
    def q(self) -> Floats:
        """False-discovery q-values [n_cells] over all columns; for lists (latents), where many may be real."""
        return benjamini_hochberg(self.p)


@dataclass(frozen=True)
class LabelTest:
    """Result of `label_permutation`.

    Attributes:
        difference: mean of labelled minus mean of unlabelled units [n_latents], in the values' own unit.
        effect: the difference as `effect_size` gives it [n_latents].
        p: two-sided p-value of each column alone [n_latents].
        p_max_t: family-wise p-value [n_latents].
        floor: the smallest p that these labels and draws can give.
        exact: every rearrangement of the labels was enumerated.
    """

    difference: Floats
    effect: Floats
    p: Floats
    p_max_t: Floats
    floor: float
    exact: bool


def bootstrap_interval(
    values: ArrayLike,
    clusters: Sequence[object] | NDArray | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    *,
    over: ArrayLike | None = None,
) -> Interval:
    """Percentile bootstrap interval of the mean over units, or of a ratio of means.

    Args:
        values: [n] or [n, n_columns] float, one row a unit.
        clusters: label of each unit's cluster [n]; whole clusters are drawn (pairs of one template, works
            of one author).
        level: coverage.
        draws: bootstrap samples; the same samples serve all columns.
        seed: seed of the samples.
        over: denominators [n]; then the statistic is sum(values) / sum(over), not a mean of ratios.

    Returns:
        An `Interval` of [n_columns] ([1] for one-dimensional values); NaN limits for fewer than two clusters.
    """
    x = _columns(values)
    below = np.ones(len(x)) if over is None else np.asarray(over, dtype=np.float64)
    _, group = np.unique(np.arange(len(x)) if clusters is None else np.asarray(clusters), return_inverse=True)
    n_groups = int(group.max()) + 1 if len(x) else 0
    mean = _ratio(x.sum(axis=0), below.sum())
    if n_groups < 2:
        unknown = np.full(x.shape[1], np.nan)
        return Interval(mean, unknown, unknown.copy())
    top = _sums(x, group)
    bottom = np.bincount(group, weights=below, minlength=n_groups)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=draws).astype(np.float64)
    bottoms = counts @ bottom
    limits = [(1 - level) / 2, (1 + level) / 2]
    width = max(1, _CHUNK // draws)
    parts = [
        _quantiles(_ratio(top[:, a : a + width].T @ counts.T, bottoms), limits) for a in range(0, x.shape[1], width)
    ]
    low, high = np.concatenate(parts, axis=1)
    return Interval(mean, low, high)


def sign_flip_max_t(
    effects: ArrayLike,
    draws: int = 5000,
    seed: int = 0,
    clusters: Sequence[object] | NDArray | None = None,
) -> SignFlipTest:
    """Is the mean effect of a column 0? Sign flips of whole pairs, with max-T control over all columns.

    Under the null hypothesis a pair's effects are symmetric around 0 jointly in all cells, so one sign a
    pair is flipped in all columns at once. Pairs of one cluster are flipped together, and their sum is one
    unit. Up to 12 units all flips are enumerated; the floor is then 2 / 2^n.

    Args:
        effects: [n_pairs, n_cells] (or [n_pairs]) float, finite.
        draws: random flips where they are not enumerated (`draws_for` a list of looks).
        seed: seed of the random flips.
        clusters: label of each pair's cluster [n_pairs]; default every pair by itself.
    """
    x = _columns(effects)
    x = x if clusters is None else _sums(x, np.unique(np.asarray(clusters), return_inverse=True)[1])
    n = len(x)
    rms = np.sqrt((x**2).sum(axis=0) * n)
    unit = _ratio(x, rms)  # |column sum| is then |mean| / rms: monotone in |t|, and finite when t is not
    observed = np.abs(unit.sum(axis=0))
    if n <= EXACT_PAIRS:
        bits = np.arange(2 ** (n - 1))[:, None] >> np.arange(n - 1)
        signs = np.concatenate([np.ones((len(bits), 1)), 1.0 - 2.0 * (bits & 1)], axis=1)
    else:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(draws, n))
    alone, family = _exceedances(signs, _difference(unit), observed)
    extra = 0 if n <= EXACT_PAIRS else 1
    total = len(signs) + extra
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.sign(unit.sum(axis=0)) * observed * np.sqrt(max(n - 1, 0)) / np.sqrt(np.maximum(1 - observed**2, 0))
    t = np.where(observed == 0, 0.0, t)
    return SignFlipTest(t, (alone + extra) / total, (family + extra) / total, 1 / total, n)


def label_permutation(
    values: ArrayLike,
    labels: ArrayLike,
    draws: int = 10_000,
    seed: int = 0,
    statistic: Literal["standardised", "studentised"] = "standardised",
) -> LabelTest:
    """Do labelled units differ from the others? Labels of whole units are permuted, with max-T over all
    columns.

    The statistic is the difference of means in standard deviations of the column over all units (the same
    order as the pooled two-sample t), two-sided. `studentised` takes it in its own standard error (Welch's t), which
    keeps the level where the groups' spreads differ (Janssen 1997): one work a unit here, three there. Where the labels
    can be arranged in at most `draws` ways all are enumerated and p is exact.

    Args:
        values: [n_units, n_latents] (or [n_units]) float, one row a unit (an author, not a passage).
        labels: [n_units] bool; both groups must have a unit.
        draws: random permutations where they are not enumerated.
        seed: seed of the permutations.

    Raises:
        ValueError: one group is empty.
    """
    x, chosen = _columns(values), np.asarray(labels, dtype=bool)
    n, k = len(chosen), int(chosen.sum())
    if k in (0, n):
        raise ValueError(f"both groups need a unit: {k} of {n} units are labelled")
    centred = x - x.mean(axis=0)
    spread = np.sqrt((centred**2).mean(axis=0))
    constant = spread <= _TIE * np.maximum(np.abs(x).max(axis=0), np.finfo(float).tiny)
    unit = np.where(constant, 0.0, _ratio(centred, spread))
    measure = _difference(unit, k) if statistic == "standardised" else _studentised(unit, k)
    exact = comb(n, k) <= draws
    masks = _all_labels(n, k) if exact else _random_labels(chosen, draws, seed)
    observed = measure(chosen[None].astype(float))[0]
    alone, family = _exceedances(masks, measure, observed)
    extra = 0 if exact else 1
    total = len(masks) + extra
    smallest = (2 if exact and 2 * k == n else 1) / total  # equal groups: the mirrored labels tie with the observed
    difference = x[chosen].mean(axis=0) - x[~chosen].mean(axis=0)
    p, family_wise = (alone + extra) / total, (family + extra) / total
    return LabelTest(difference, effect_size(x[chosen], x[~chosen]), p, family_wise, smallest, exact)


def benjamini_hochberg(p: ArrayLike) -> Floats:
    """False-discovery q-values [n] of p-values [n] (Benjamini and Hochberg 1995).

    NaN stays NaN and does not count as a look.
    """
    values = np.asarray(p, dtype=np.float64)
    q = np.full(values.shape, np.nan)
    known = ~np.isnan(values)
    if known.any():
        q[known] = scipy_stats.false_discovery_control(values[known], method="bh")
    return q


def auroc(values: ArrayLike, labels: ArrayLike) -> Floats:
    """Chance that a labelled unit has the larger value, ties counting half; [n_columns] of values [n,
    n_columns] or [n].

    Raises:
        ValueError: one group is empty.
    """
    x, chosen = _columns(values), np.asarray(labels, dtype=bool)
    k, others = int(chosen.sum()), int((~chosen).sum())
    if not k or not others:
        raise ValueError(f"both groups need a unit: {k} labelled, {others} not")
    ranks = np.asarray(scipy_stats.rankdata(x, axis=0))
    return (ranks[chosen].sum(axis=0) - k * (k + 1) / 2) / (k * others)


def effect_size(first: Floats, second: Floats) -> Floats:
    """Cohen's d [n_columns]: difference of means in pooled standard deviations, cut at `LARGEST_EFFECT`."""
    difference = first.mean(axis=0) - second.mean(axis=0)
    freedom = max(len(first) + len(second) - 2, 1)
    squares = sum(((x - x.mean(axis=0)) ** 2).sum(axis=0) for x in (first, second))
    with np.errstate(divide="ignore", invalid="ignore"):
        d = np.where(difference == 0, 0.0, difference / np.sqrt(squares / freedom))
    return np.clip(d, -LARGEST_EFFECT, LARGEST_EFFECT)


def smallest_detectable_effect(n1: int, n2: int | None = None, alpha: float = 0.05, power: float = 0.8) -> float:
    """The effect, in standard deviations, that a two-sided t test finds with probability `power`.

    Args:
        n1: units in the first group, or pairs where `n2` is None (then the unit is the standard deviation
            of the paired differences).
        n2: units in the second group.
        alpha: level; divide it by the number of looks where looks are corrected for.
        power: wanted power.

    Returns:
        (t(1 - alpha/2) + t(power)) times the standard error, infinite where no degree of freedom is left.
    """
    freedom = n1 - 1 if n2 is None else n1 + n2 - 2
    if freedom < 1 or n1 < 1 or (n2 is not None and n2 < 1):
        return float("inf")
    error = np.sqrt(1 / n1 if n2 is None else 1 / n1 + 1 / n2)
    return float((scipy_stats.t.isf(alpha / 2, freedom) + scipy_stats.t.ppf(power, freedom)) * error)


def detection_power(effect: float, n: int, alpha: float = 0.05) -> float:
    """Chance that a two-sided one-sample t test of `n` pairs finds a mean of `effect` standard deviations.

    Args:
        effect: mean over standard deviation of the paired differences.
        n: pairs, or clusters of pairs; fewer than two find nothing.
        alpha: level; divide it by the number of looks where looks are corrected for.
    """
    if n < 2:
        return 0.0
    bar, shift = scipy_stats.t.isf(alpha / 2, n - 1), abs(effect) * np.sqrt(n)
    return float(sum(np.nan_to_num(scipy_stats.nct.sf(bar, n - 1, way)) for way in (shift, -shift)))


def draws_for(looks: int, level: float = 0.05, least: int = 5000) -> int:
    """Random flips after which one true effect among `looks` can still pass level / looks."""
    return max(least, int(np.ceil(looks / level)))


def out_of_reach(floor: float, level: float = 0.05, looks: int = 1) -> str:
    """Why nothing can be significant, in words for people, or "" where something can.

    Args:
        floor: the smallest p-value that could have come out.
        level: the level that is asked for.
        looks: comparisons that each p-value is corrected for; 1 for max-T, which has them in its p-values, and
            the length of the list for false-discovery control with a single true effect.
    """
    if floor <= level / looks:
        return ""
    looked = f" over {looks} looks" if looks > 1 else ""
    return (
        f"no p-value can be below {floor:.2g} with so few pairs or draws, so nothing can be significant at "
        f"{level:g}{looked}: this sweep can describe, not decide"
    )


def _columns(values: ArrayLike) -> Floats:
    x = np.asarray(values, dtype=np.float64)
    return x[:, None] if x.ndim == 1 else x


def _sums(x: Floats, group: NDArray) -> Floats:
    """Sums [n_groups, n_columns] of the rows of each group."""
    total = np.zeros((int(group.max()) + 1 if len(group) else 0, x.shape[1]))
    np.add.at(total, group, x)
    return total


def _ratio(above: ArrayLike, below: ArrayLike) -> Floats:
    """above / below, 0 / 0 = 0 where the numerator vanishes too, NaN for other divisions by 0."""
    top, bottom = np.broadcast_arrays(np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64))
    filler = np.where(top == 0, 0.0, np.nan)
    return np.divide(top, bottom, out=filler, where=bottom != 0)


def _quantiles(values: Floats, limits: Sequence[float]) -> Floats:
    """Quantiles [len(limits), n] over the last axis of [n, draws], NaN left out; rows lie together in memory."""
    if np.isnan(values).any():
        return np.nanquantile(values, limits, axis=1)
    return np.quantile(values, limits, axis=1, overwrite_input=True)


def _difference(unit: Floats, k: int | None = None) -> Measure:
    """|sums| over arrangements of centred columns; over k labelled units in the scale of a difference of means."""
    scaled = unit if k is None else unit * (len(unit) / (k * (len(unit) - k)))

    def measure(masks: Floats) -> Floats:
        found = masks @ scaled
        return np.abs(found, out=found)

    return measure


def _studentised(unit: Floats, k: int) -> Measure:
    """|Welch's t| of k labelled units against the others, of columns with mean 0 and spread 1."""
    n, squares = len(unit), unit**2
    others, whole = n - k, squares.sum(axis=0)

    def measure(masks: Floats) -> Floats:
        total, square = masks @ unit, masks @ squares
        spread = (square - total**2 / k) / (max(k - 1, 1) * k)
        spread += (whole - square - total**2 / others) / (max(others - 1, 1) * others)
        return np.abs(total) * (n / (k * others)) / np.sqrt(np.maximum(spread, _TIE))

    return measure


def _exceedances(arrangements: Floats, measure: Measure, observed: Floats) -> tuple[Floats, Floats]:
    """How many arrangements reach each column's statistic: by the same column, and by the largest column."""
    alone, largest = np.zeros(len(observed)), np.zeros(len(arrangements))
    bar = observed * (1 - _TIE)
    rows = max(1, _CACHED // max(1, len(observed)))
    for a in range(0, len(arrangements), rows):
        found = measure(arrangements[a : a + rows])
        alone += np.add.reduce(found >= bar, axis=0, dtype=np.int32)
        largest[a : a + rows] = found.max(axis=1, initial=0.0)
    largest.sort()
    return alone, len(largest) - np.searchsorted(largest, bar, side="left").astype(np.float64)


def _all_labels(n: int, k: int) -> Floats:
    places = np.array(list(combinations(range(n), k)))
    masks = np.zeros((len(places), n))
    np.put_along_axis(masks, places, 1.0, axis=1)
    return masks


def _random_labels(chosen: NDArray[np.bool_], draws: int, seed: int) -> Floats:
    rng = np.random.default_rng(seed)
    return rng.permuted(np.tile(chosen.astype(np.float64), (draws, 1)), axis=1)
