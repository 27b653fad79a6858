"""From activations to verdicts, by written rules.

A sparse autoencoder always offers a latent that "is about greatness". This module is the sceptic: it says
`supported` only where authors differ by role more than chance allows after every latent that was looked at
has been paid for, where authors that were held out agree, and where neither one author nor era, genre or
topic explains the difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray
from scipy import stats as scipy_stats

from ..stats import auroc, benjamini_hochberg, icc, label_permutation, smallest_detectable_effect
from .adjust import Adjusted, adjust, outlying_author
from .units import Cells, Documents, gather

__all__ = ["LEVEL", "VERDICTS", "Judgement", "judge", "weigh"]

VERDICTS = (
    "supported",
    "not-supported",
    "not-separable-author",
    "not-separable-era",
    "not-separable-genre",
    "not-separable-topic",
    "no-causal-effect",
    "unstable",
    "underpowered",
)
LEVEL = 0.05
CLEAR = 0.01  # false discovery rate at which something other than role is named
HALF = 0.5  # of the difference must remain: nearer to "all of it" than to "nothing"
_DRAWS = 10_000
_REACHABLE = 50  # arrangements of the held-out labels; with fewer, p <= .05 needs perfect luck

Floats = NDArray[np.float64]
Causal = Mapping[int, Mapping[str, float]]


def judge(
    activations: NDArray, documents: Documents, *, causal: Causal | None = None, seed: int = 0
) -> list[dict[str, object]]:
    """Does a latent follow role (characters against controls) across authors? One verdict a latent.

    Rules, in the order in which they decide:

    1. The author is the unit. Windows are averaged into works, works (equally weighted) into authors. Authors
       who appear under both roles are left out, since they cannot separate the roles.
    2. `underpowered`: the author labels can be arranged in so few ways that no p-value of .05 or less can
       come out.
    3. The test: author labels are permuted, over all authors. p_value is two-sided for the latent alone;
       q_value is paid for all latents given (max-T, family-wise, so it bounds the false discovery rate too).
       Choosing latents first, by whatever authors, is therefore paid for when all latents that could have
       been chosen are given.
    4. If q_value is above .05 the latent is not supported. Where something simpler clearly explains it (false
       discovery rate .01 over latents and explanations), that is named: `not-separable-author` when one
       author stands out from the others of the same role, `not-separable-era`, `-genre` or `-topic` when the
       levels of that factor differ with role and author held in the model. Else `not-supported`.
    5. If q_value is .05 or less, role must survive:
       a. the loss of any one author: the difference keeps its sign, half its size and p <= .05, else
          `not-separable-author`;
       b. era, genre and topic, one at a time, as random effects beside a random author effect: the difference
          keeps half its size and p <= .05, else `not-separable-…`; the factor with the strongest claim is
          named. A factor that says exactly what role says can never be separated from it;
       c. the held-out authors (`split` = `heldout-author`): the difference has the same sign as among the
          others, and where at least 50 arrangements of their labels exist, its one-sided permutation p is .05
          or less, else `unstable`;
       d. where `causal` has the latent: its effect lies outside the placebo band, else `no-causal-effect`.
    6. What is left is `supported`. Its sign may be negative: the reason says so.

    Args:
        activations: [n_windows, n_latents] float; mean activation of each latent in each window.
        documents: one row a window (list of dicts, or dict of columns): author, work, role (`character`,
            `seed` or `control`), era, genre, topic, split. A missing factor is not adjusted for, and the
            reason says so.
        causal: latent -> {"effect", "placebo_low", "placebo_high"}.
        seed: seed of the permutations.

    Returns:
        Rows in the order of the latents: latent (column number), effect (standard deviations between authors,
        positive when characters are higher), auroc (over authors), p_value, q_value, verdict, reason.

    Raises:
        UsageError: shapes do not fit, a number is not finite, or a document has no author or an unknown role.
    """
    found = weigh(gather(activations, documents), causal=causal, seed=seed)
    names = ("latent", "effect", "auroc", "p_value", "q_value", "verdict", "reason")
    return [{name: row[name] for name in names} for row in found.rows]


@dataclass(frozen=True)
class Judgement:
    """What `weigh` found: rows with `judge`'s keys and icc; `power` says what could have been found."""

    rows: list[dict[str, object]]
    power: str
    smallest_effect: float
    n_characters: int
    n_controls: int


def weigh(cells: Cells, *, causal: Causal | None = None, seed: int = 0) -> Judgement:
    """Apply the rules of `judge` to cells; see there. Each row also has icc, the clustering by author."""
    role = cells.author_role
    n_latents, n1, n0 = cells.means.shape[1], int(role.sum()), int((~role).sum())
    # of two-sided label arrangements the mirrored one ties when the groups are equal
    floor = (2 if n1 == n0 else 1) / comb(n1 + n0, n1) if n1 and n0 else 1.0
    smallest = smallest_detectable_effect(n1, n0)
    power = _power(cells, n1, n0, smallest, floor)
    if not n1 or not n0:
        rows = [_row(i, 0.0, 0.5, 1.0, 1.0, "underpowered", power) for i in range(n_latents)]
        return Judgement(rows, power, smallest, n1, n0)
    test = label_permutation(cells.author_means, role, draws=_DRAWS, seed=seed)
    area = auroc(cells.author_means, role)
    if floor > LEVEL:
        verdicts = [("underpowered", power)] * n_latents
    else:
        verdicts = _Rules(cells, test.effect, test.p_max_t, causal or {}, seed, power).decide()
    clustering = icc(cells.means, cells.author)
    columns = zip(test.effect, area, test.p, test.p_max_t, verdicts, clustering, strict=True)
    rows = [
        _row(i, float(e), float(a), float(p), float(q), *verdict) | {"icc": float(c)}
        for i, (e, a, p, q, verdict, c) in enumerate(columns)
    ]
    return Judgement(rows, power, smallest, n1, n0)


class _Rules:
    """The rules 4 to 6 of `judge` over all latents of one corpus."""

    def __init__(self, cells: Cells, effect: Floats, q: Floats, causal: Causal, seed: int, power: str) -> None:
        self.cells, self.effect, self.q, self.causal, self.seed, self.power = (
            cells,
            effect,
            q,
            causal,
            seed,
            power,
        )
        self.adjusted: dict[str, Adjusted] = {name: adjust(cells, name) for name in cells.factors}
        self.author_p, self.author = outlying_author(cells)
        self.explained = self._explanations()
        self.survives = _without_each_author(cells)

    def decide(self) -> list[tuple[str, str]]:
        """(verdict, reason) of each latent."""
        return [self._significant(i) if q <= LEVEL else self._silent(i) for i, q in enumerate(self.q)]

    def _explanations(self) -> list[tuple[str, float] | None]:
        """The strongest explanation other than role of each latent, where it is clear: (name, p)."""
        names = ["author", *self.adjusted]
        p = np.stack([self.author_p, *(a.factor_p for a in self.adjusted.values())])
        clear = benjamini_hochberg(p.ravel()).reshape(p.shape) <= CLEAR
        best = p.argmin(axis=0)
        return [(names[b], float(p[b, i])) if clear[b, i] else None for i, b in enumerate(best)]

    def _silent(self, i: int) -> tuple[str, str]:
        said = f"role over all {self.cells.unit}s: q {self.q[i]:.2g} (effect {self.effect[i]:+.2f} sd)"
        explanation = self.explained[i]
        if explanation is None:
            return "not-supported", f"{said}. {self.power}"
        name, p = explanation
        who = f"{self.cells.authors[self.author[i]]} alone" if name == "author" else f"{name}"
        return f"not-separable-{name}", f"{said}; it follows {who} (p {p:.1e})"

    def _significant(self, i: int) -> tuple[str, str]:
        way = "higher" if self.effect[i] > 0 else "lower"
        said = f"{way} in characters by {abs(self.effect[i]):.2f} sd, q {self.q[i]:.2g} over all latents given"
        kept, who = self.survives
        if not kept[i]:
            return "not-separable-author", f"{said}; without {self.cells.authors[who[i]]} it does not hold"
        failing = [name for name, a in self.adjusted.items() if not _survives(a, i)]
        if failing:
            name = min(failing, key=lambda n: (not self.adjusted[n].aliased, self.adjusted[n].factor_p[i]))
            return f"not-separable-{name}", f"{said}; {_adjustment(name, self.adjusted[name], i)}"
        agrees, heldout = _held_out(self.cells, i)
        if not agrees:
            return "unstable", f"{said}; {heldout}"
        effect = self.causal.get(i)
        if effect is not None:
            band = f"[{effect['placebo_low']:.3g}, {effect['placebo_high']:.3g}]"
            if effect["placebo_low"] <= effect["effect"] <= effect["placebo_high"]:
                return (
                    "no-causal-effect",
                    f"{said}; effect {effect['effect']:.3g} inside the placebo band {band}",
                )
            heldout += f"; effect {effect['effect']:.3g} outside the placebo band {band}"
        return "supported", f"{said}; {self._context()}; {heldout}"

    def _context(self) -> str:
        missing = [name for name in ("era", "genre", "topic") if name not in self.adjusted]
        kept = f"holds without any one {self.cells.unit}" + "".join(f", within {name}" for name in self.adjusted)
        return kept + (f"; not adjusted for {', '.join(missing)} (not given)" if missing else "")


def _survives(adjusted: Adjusted, i: int) -> bool:
    return not adjusted.aliased and bool(adjusted.share[i] >= HALF and adjusted.p[i] <= LEVEL)


def _adjustment(name: str, adjusted: Adjusted, i: int) -> str:
    if adjusted.aliased:
        return f"{name} and role say the same in this corpus"
    return f"{adjusted.share[i]:.0%} of it is left beside {name} (p {adjusted.p[i]:.2g})"


def _without_each_author(cells: Cells) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
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


def _one_sided(y: Floats, role: NDArray[np.bool_]) -> float:
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


def _power(cells: Cells, n1: int, n0: int, smallest: float, floor: float) -> str:
    left_out = f" ({len(cells.ambiguous)} under both roles left out)" if cells.ambiguous else ""
    who = f"{n1} {cells.unit}s of characters against {n0} of controls{left_out}"
    if floor > LEVEL:
        return f"{who}: the smallest p that can come out is {floor:.2g}, so nothing can be told"
    return f"{who} can show (power .8, one latent, level .05) an effect of {smallest:.1f} sd or more"


def _row(latent: int, effect: float, area: float, p: float, q: float, verdict: str, reason: str) -> dict[str, object]:
    return {
        "latent": latent,
        "effect": effect,
        "auroc": area,
        "p_value": p,
        "q_value": q,
        "verdict": verdict,
        "reason": reason,
        "icc": float("nan"),
    }
