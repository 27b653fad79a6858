"""Could era, genre, topic or one author explain a latent better than role does?

The answer comes from a small mixed model over cells (works):

    activation = a + b * role + (random effect of the author) + (random effect of the factor's level) + noise

with both variances found by REML on a grid (Patterson and Thompson 1971). Random levels treat crossed and
nested tables alike: where a level holds both roles the comparison is made inside it, where it does not,
levels count as units. One grid serves all latents, so that thousands cost as much as one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats as scipy_stats

from .units import Cells

__all__ = ["Adjusted", "adjust", "icc", "outlying_author"]

Floats = NDArray[np.float64]
AUTHOR_GRID = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # variance ratios to the noise
LEVEL_GRID = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_TINY = 1e-12


@dataclass(frozen=True)
class Adjusted:
    """What is left of role once a factor is in the model; each [n_latents].

    Attributes:
        difference: the coefficient of role with the factor's levels as random effects.
        p: its two-sided p-value (t; degrees of freedom by authors, or by levels where no level holds both
            roles).
        share: difference divided by the one without the factor.
        factor_p: p-value of the factor itself, with role and author in the model: the better of "its levels
            differ" (likelihood ratio) and "one of its levels differs" (t, paid for by the number of levels),
            doubled.
        aliased: role cannot be told from the factor at all (each level has one role, and no two levels share
            a role).
    """

    difference: Floats
    p: Floats
    share: Floats
    factor_p: Floats
    aliased: bool


def adjust(cells: Cells, factor: str) -> Adjusted:
    """Fit the model with and without one factor, for all latents at once.

    Args:
        cells: at least three authors, both roles among them.
        factor: a key of `cells.factors`.
    """
    y = cells.means - cells.means.mean(axis=0)
    y = y / np.maximum(np.sqrt((y**2).mean(axis=0)), _TINY)
    x = np.stack([np.ones(len(y)), cells.role], axis=1)
    grouped = _Grouped(y, x, cells.author, cells.factors[factor])
    without = _fit(grouped, (0.0,))
    within = _fit(grouped, LEVEL_GRID)
    ratio = np.maximum(2 * (within.likelihood - without.likelihood), 0.0)
    spread_p = np.where(ratio > 0, 0.5 * scipy_stats.chi2.sf(ratio, 1), 1.0)  # a variance at its boundary
    single_p = _single_level(y, x, cells, factor, without.author_ratio)
    factor_p = np.minimum(2 * np.minimum(spread_p, single_p), 1.0)
    freedom = _freedom(cells, factor)
    t = within.difference / np.maximum(within.error, _TINY)
    p = 2 * scipy_stats.t.sf(np.abs(t), max(freedom, 1))
    share = within.difference / np.where(np.abs(without.difference) > _TINY, without.difference, np.inf)
    return Adjusted(within.difference, p, share, factor_p, _aliased(x, cells.factors[factor]))


def outlying_author(cells: Cells) -> tuple[Floats, NDArray[np.int64]]:
    """The author who stands out most from the others of the same role.

    Returns:
        p-value [n_latents] of the largest externally studentised deviation, paid for by the number of authors
        (Bonferroni), and that author's index [n_latents]. With fewer than five authors p is 1.
    """
    y, role = cells.author_means, cells.author_role
    n = len(y)
    sizes = np.where(role, role.sum(), (~role).sum())
    if n < 5:
        return np.ones(y.shape[1]), np.zeros(y.shape[1], dtype=np.int64)
    group_means = np.where(role[:, None], y[role].mean(axis=0), y[~role].mean(axis=0))
    residual = y - group_means
    leverage = 1 / sizes
    squares = (residual**2).sum(axis=0)
    alone = leverage >= 1  # the only author of a role cannot stand out from it
    room = np.where(alone, 1.0, 1 - leverage)[:, None]
    left = np.maximum(squares - residual**2 / room, _TINY * np.maximum(squares, _TINY))
    t = np.abs(residual) / np.sqrt(room * left / (n - 3))
    t[alone] = 0.0
    who = t.argmax(axis=0)
    p = np.minimum(2 * n * scipy_stats.t.sf(t.max(axis=0), n - 3), 1.0)
    return np.where(squares > _TINY, p, 1.0), who


def icc(values: Floats, clusters: NDArray) -> Floats:
    """Intraclass correlation, one-way ANOVA estimate with unequal cluster sizes (Donner 1986), cut at 0.

    Args:
        values: [n, n_columns]; `clusters` is the cluster of each row.

    Returns:
        [n_columns]; NaN where there is only one cluster, no cluster of two, or no variance.
    """
    _, group = np.unique(clusters, return_inverse=True)
    sizes = np.bincount(group).astype(np.float64)
    n, m = len(values), len(sizes)
    if m < 2 or n == m:
        return np.full(values.shape[1], np.nan)
    means = _members(group).T @ values / sizes[:, None]
    between = (sizes[:, None] * (means - values.mean(axis=0)) ** 2).sum(axis=0) / (m - 1)
    within = ((values - means[group]) ** 2).sum(axis=0) / (n - m)
    size = (n - (sizes**2).sum() / n) / (m - 1)
    total = between + (size - 1) * within
    known = total > 0
    return np.where(known, np.maximum((between - within) / np.where(known, total, 1.0), 0.0), np.nan)


@dataclass(frozen=True)
class _Fit:
    difference: Floats
    error: Floats
    likelihood: Floats
    author_ratio: Floats


class _Grouped:
    """Cells [n, n_latents] with a random effect of each author and of each level, in products of that many rows.

    The covariance is 1 + Z D Z', Z the membership of cells and D its variances, so its inverse needs only the inverse of
    D^-1 + Z'Z (Woodbury), which has as many rows as there are authors and levels, however many cells there are.
    """

    def __init__(self, y: Floats, x: Floats, author: NDArray[np.int64], level: NDArray[np.int64]) -> None:
        self.n, self.n_latents = y.shape
        members = [_members(author), _members(level)]
        z = np.concatenate(members, axis=1)
        self.sizes = tuple(part.shape[1] for part in members)
        self._zz, self._zx, self._zy = z.T @ z, z.T @ x, z.T @ y
        self._xx, self._xy, self._yy = x.T @ x, x.T @ y, (y**2).sum(axis=0)

    def at(self, author_ratio: float, level_ratio: float) -> tuple[float, Floats, Floats, Floats]:
        """log |V|, X'V^-1 X [2, 2], X'V^-1 y [2, n_latents] and y'V^-1 y [n_latents] at these variance ratios."""
        ratios = np.repeat([author_ratio, level_ratio], self.sizes)
        used = ratios > 0
        zx, zy = self._zx[used], self._zy[used]
        inner = self._zz[np.ix_(used, used)] + np.diag(1 / ratios[used])
        solved = np.linalg.solve(inner, np.concatenate([zx, zy], axis=1))
        ax, ay = solved[:, :2], solved[:, 2:]
        log_size = float(np.linalg.slogdet(inner)[1] + np.log(ratios[used]).sum())
        return log_size, self._xx - zx.T @ ax, self._xy - zx.T @ ay, self._yy - (zy * ay).sum(axis=0)


def _fit(grouped: _Grouped, level_grid: tuple[float, ...]) -> _Fit:
    """The best REML fit over the grid, for each latent."""
    n, n_latents = grouped.n, grouped.n_latents
    best = _Fit(np.zeros(n_latents), np.ones(n_latents), np.full(n_latents, -np.inf), np.zeros(n_latents))
    for author_ratio in AUTHOR_GRID:
        for level_ratio in level_grid:
            log_size, information, xy, yy = grouped.at(author_ratio, level_ratio)
            covariance = np.linalg.inv(information)
            coefficients = covariance @ xy
            squares = np.maximum(yy - (coefficients * xy).sum(axis=0), _TINY)
            penalty = log_size + np.linalg.slogdet(information)[1]
            likelihood = -0.5 * ((n - 2) * np.log(squares) + penalty)
            error = np.sqrt(squares / (n - 2) * covariance[1, 1])
            better = likelihood > best.likelihood + 1e-9
            best = _Fit(
                np.where(better, coefficients[1], best.difference),
                np.where(better, error, best.error),
                np.where(better, likelihood, best.likelihood),
                np.where(better, author_ratio, best.author_ratio),
            )
    return best


def _single_level(y: Floats, x: Floats, cells: Cells, factor: str, author_ratio: Floats) -> Floats:
    """p-value [n_latents] that one level of a factor differs from all others, paid for by the number of
    levels.

    Levels of a single author are not looked at: that is the author's explanation, not the factor's.
    """
    level = cells.factors[factor]
    shared = [v for v in np.unique(level) if len(np.unique(cells.author[level == v])) > 1]
    freedom = len(y) - 3
    smallest = np.ones(y.shape[1])
    if freedom < 1:
        return smallest
    for ratio in np.unique(author_ratio):
        chosen = author_ratio == ratio
        inverse = np.linalg.inv(np.eye(len(y)) + ratio * _same(cells.author))
        for one in shared:
            design = np.concatenate([x, (level == one)[:, None]], axis=1)
            information = design.T @ inverse @ design
            if np.linalg.cond(information) > 1e10:
                continue
            covariance = np.linalg.inv(information)
            coefficients = covariance @ (design.T @ (inverse @ y[:, chosen]))
            residual = y[:, chosen] - design @ coefficients
            squares = np.maximum((residual * (inverse @ residual)).sum(axis=0), _TINY)
            t = coefficients[2] / np.sqrt(squares / freedom * covariance[2, 2])
            paid = 2 * len(shared) * scipy_stats.t.sf(np.abs(t), freedom)
            smallest[chosen] = np.minimum(smallest[chosen], paid)
    return np.minimum(smallest, 1.0)


def _members(group: NDArray[np.int64]) -> Floats:
    """Which rows belong to which group, [n, n_groups] of 0 and 1."""
    return (group[:, None] == np.unique(group)[None, :]).astype(np.float64)


def _same(group: NDArray[np.int64]) -> Floats:
    return (group[:, None] == group[None, :]).astype(np.float64)


def _freedom(cells: Cells, factor: str) -> int:
    """Authors - 2, or levels - 2 where no level holds both roles: a level then takes the author's place."""
    level = cells.factors[factor]
    both = any(len(np.unique(cells.role[level == v])) > 1 for v in np.unique(level))
    units = len(cells.authors) if both or len(np.unique(level)) == 1 else len(np.unique(level))
    return min(units, len(cells.authors)) - 2


def _aliased(x: Floats, level: NDArray[np.int64]) -> bool:
    """Whether the factor says exactly what role says: it has several levels, and they add nothing to role."""
    dummies = _members(level)
    rank = np.linalg.matrix_rank
    return rank(dummies) > 1 and rank(np.concatenate([x, dummies], axis=1)) == rank(x)
