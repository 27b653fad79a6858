"""How faithful a circuit is: what is left of a behaviour when everything outside of a set takes other values.

    f(C) = (m(C) - m(nothing kept)) / (m(everything kept) - m(nothing kept))

With values from the counterpart prompt the ends are the corrupted and the clean run (MIB 2025); with zeros or
means they are the model without any of its components and the clean run (feature circuits, Marks et al. 2024).
1 is the whole behaviour; more than 1 is no better, it means that something that held it back is missing. Over
pairs it is the ratio of the summed numerators and denominators, never a mean of ratios, which a pair with a
small gap would rule.

A high f alone says little, so four more questions are asked. *Completeness*: what do the other components still
do without the circuit? *Sufficiency*: is it more faithful than nine out of ten random sets of its size?
*Minimality*: does each component matter more than one that was added at random? (Both after Shi et al. 2024,
with a binomial test.) And what happens on pairs that did not choose it?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from ..stats import Interval, bootstrap_interval

__all__ = [
    "SIZES",
    "Areas",
    "Ends",
    "Minimality",
    "Runs",
    "Sufficiency",
    "areas",
    "count_of",
    "inflated",
    "minimality",
    "sufficiency",
]

SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # shares of all components (MIB)
QUANTILE = 0.9
Floats = NDArray[np.float64]
Sets = NDArray[np.bool_]


class Runs(Protocol):
    """The model with everything outside of a set replaced; implemented for nodes, edges and latents.

    Attributes:
        names: N components, in the order in which they are computed.
        ablation: what the rest is replaced with.
    """

    names: Sequence[str]
    ablation: str

    def values(self, keep: Sets, rows: Sets | None = None) -> Floats:
        """The metric of each pair in the run that keeps these components alone: [s, n_pairs] of [s, N] bool.

        Pairs that are not in `rows` [n_pairs] bool may be NaN.
        """
        ...


@dataclass(frozen=True)
class Ends:
    """The two runs that set the scale: the metric [n_pairs] with nothing and with everything kept."""

    empty: Floats
    full: Floats

    @classmethod
    def of(cls, runs: Runs) -> Ends:
        """Measure both."""
        both = np.stack([np.zeros(len(runs.names), dtype=bool), np.ones(len(runs.names), dtype=bool)])
        empty, full = runs.values(both)
        return cls(empty, full)

    @property
    def gap(self) -> Floats:
        """[n_pairs] what there is to explain."""
        return self.full - self.empty

    def each(self, values: Floats) -> Floats:
        """f of every pair [..., n_pairs]; NaN for a pair without a gap."""
        with np.errstate(divide="ignore", invalid="ignore"):
            found = (values - self.empty) / self.gap
        return np.where(self.gap == 0, np.nan, found)

    def share(self, values: Floats, rows: NDArray[np.bool_] | None = None) -> Floats:
        """f over pairs [s] of values [s, n_pairs]; `rows` [n_pairs] bool picks some."""
        rows = np.ones(len(self.empty), dtype=bool) if rows is None else rows
        total = self.gap[rows].sum()
        above = (values - self.empty)[..., rows].sum(-1)
        return above / total if total else np.full(np.shape(above), np.nan)

    def interval(self, values: Floats, rows: NDArray[np.bool_], clusters: Sequence[object], seed: int = 0) -> Interval:
        """f with its bootstrap interval over pairs, [s] each, of values [s, n_pairs]."""
        labels = [label for label, row in zip(clusters, rows, strict=True) if row]
        return bootstrap_interval((values - self.empty)[..., rows].T, clusters=labels, seed=seed, over=self.gap[rows])


def count_of(share: float, total: int) -> int:
    """How many components a share of all is, rounded."""
    return int(share * total + 0.5)


@dataclass(frozen=True)
class Areas:
    """Areas over the share of components that are kept.

    Attributes:
        cpr: under f; higher is better.
        cmd: under |1 - f|; lower is better, 0 is a circuit of any size that is as good as the model.
    """

    cpr: float
    cmd: float


def areas(f: Sequence[float] | Floats, sizes: Sequence[float] = SIZES) -> Areas:
    """CPR and CMD by trapezoids over `sizes` (MIB 2025)."""
    y = np.asarray(f, dtype=np.float64)
    return Areas(float(np.trapezoid(y, sizes)), float(np.trapezoid(np.abs(1 - y), sizes)))


@dataclass(frozen=True)
class Sufficiency:
    """A circuit against random sets of its size.

    Attributes:
        draws: how many random sets.
        beaten: how many it is strictly more faithful than: nearer to 1.
        p: binomial p-value of "it beats at most `QUANTILE` of all such sets".
        floor: the smallest p that so many draws can give.
    """

    draws: int
    beaten: int
    p: float
    floor: float


def sufficiency(f: float, others: Floats, quantile: float = QUANTILE) -> Sufficiency:
    """Is a set with faithfulness `f` better than the `quantile` of random sets with faithfulness `others` [draws]?"""
    draws = len(others)
    if not draws:
        return Sufficiency(0, 0, 1.0, 1.0)
    beaten = int((np.abs(1 - others) > abs(1 - f)).sum())
    p = float(binomtest(beaten, draws, quantile, alternative="greater").pvalue)
    return Sufficiency(draws, beaten, p, quantile**draws)


@dataclass(frozen=True)
class Minimality:
    """What each component of a circuit is worth; all [n] in the order of the circuit.

    Attributes:
        change: f(C) - f(C without it).
        beaten: of the random additions, how many changed f less when they were taken out again.
        p: binomial p-value of "it matters no more than `QUANTILE` of random additions", one a component.
        needed: p, times the number of components, is at most .05.
        others: [draws] what the random additions changed.
    """

    change: Floats
    beaten: NDArray[np.int64]
    p: Floats
    needed: NDArray[np.bool_]
    others: Floats


def minimality(f: float, without: Floats, with_added: Floats, quantile: float = QUANTILE) -> Minimality:
    """Judge every component by what its removal does to f.

    Args:
        f: f(C).
        without: [n] f(C without the component).
        with_added: [draws, 2] f of a randomly inflated C, and of it without one of the additions.
        quantile: of the random additions, to be beaten.
    """
    change = f - without
    others = np.abs(with_added[:, 0] - with_added[:, 1])
    draws = len(others)
    beaten = (np.abs(change)[:, None] > others[None]).sum(1)
    p = np.array([binomtest(int(k), draws, quantile, alternative="greater").pvalue if draws else 1.0 for k in beaten])
    return Minimality(change, beaten, p, p * len(p) <= 0.05, others)


def inflated(keep: Sets, additions: Sets, seed: int) -> Sets:
    """[draws, 2, N]: the set with random additions, and the same without one of them.

    Args:
        keep: [N] the circuit.
        additions: [draws, N] what is added; those that add nothing new are left out.
        seed: which addition is taken out again.
    """
    rng = np.random.default_rng(seed)
    made = []
    for extra in additions:
        new = np.flatnonzero(extra & ~keep)
        if len(new):
            whole = keep | extra
            less = whole.copy()
            less[rng.choice(new)] = False
            made.append(np.stack([whole, less]))
    return np.stack(made) if made else np.zeros((0, 2, len(keep)), dtype=bool)
