"""How far an approximation can be believed: some of its cells are run exactly, and both values compared.

The strongest cells are the ones that anybody will speak of, so they are run; but a comparison over them alone would
say nothing about what the approximation overlooked, so others are drawn at random from the rest.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

__all__ = ["Calibration", "calibrate", "to_verify"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """Approximate against exact effects, each a cell's mean over pairs.

    Attributes:
        n_top, n_random: cells that were run because they are the strongest, and at random.
        spearman: rank correlation over all of them; None where either side is constant.
        spearman_random: the same over the random ones.
        slope, intercept: approximate = slope · exact + intercept, by least squares; 1 and 0 are ideal.
    """

    n_top: int
    n_random: int
    spearman: float | None
    spearman_random: float | None
    slope: float | None
    intercept: float | None

    def row(self) -> dict[str, object]:
        """As a dictionary."""
        return asdict(self)


def to_verify(means: Floats, n: int, *, seed: int) -> tuple[list[int], list[int]]:
    """Cells to run exactly: the n strongest, and as many of the rest at random.

    Args:
        means: approximate effect of each cell; NaN is never taken.
        n: how many of either kind.
        seed: of the draw.
    """
    known = np.flatnonzero(~np.isnan(means))
    order = known[np.argsort(-np.abs(means[known]), kind="stable")]
    top, rest = order[:n], order[n:]
    drawn = np.random.default_rng(seed).choice(rest, min(n, len(rest)), replace=False) if len(rest) else rest
    return top.tolist(), sorted(drawn.tolist())


def calibrate(approximate: Floats, exact: Floats, random: NDArray[np.bool_]) -> Calibration:
    """Compare n cells.

    Args:
        approximate, exact: effects [n].
        random: [n] whether a cell was drawn at random.
    """
    slope = intercept = None
    if len(exact) > 1 and np.ptp(exact) > 0:
        slope, intercept = (float(x) for x in np.polyfit(exact, approximate, 1))
    return Calibration(
        int((~random).sum()),
        int(random.sum()),
        _ranks(approximate, exact),
        _ranks(approximate[random], exact[random]),
        slope,
        intercept,
    )


def _ranks(a: Floats, b: Floats) -> float | None:
    if len(a) < 3:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a constant side, which is what None says
        found = float(spearmanr(a, b)[0])  # type: ignore[arg-type]
    return None if np.isnan(found) else found
