"""How much of a latent something simple explains, and how sure its mean in a group of works is.

The share is the R² of a table of means: what the mean activation of each token id, or of each part of the window,
accounts for of the variance over all tokens. It is adjusted for the number of cells (Ezekiel 1930), since with one
cell a token any table would explain everything. Near 1 for token ids, the latent is a word.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from .tables import FeatureTables

__all__ = ["Interval", "mean_interval", "position_share", "token_share"]

LEVEL = 0.95
Floats = NDArray[np.float64]


def token_share(tables: FeatureTables) -> Floats:
    """Share of each latent's variance that the token's identity explains, [L] in 0 to 1 (NaN if it never fires).

    Where ids share buckets (`tables.token_own` below 1) it is a lower bound.
    """
    return _share(tables, tables.token_count, tables.token_total)


def position_share(tables: FeatureTables) -> Floats:
    """Share of each latent's variance that the position in its window explains, by half octaves; [L]."""
    return _share(tables, tables.position_count, tables.position_total)


def _share(tables: FeatureTables, count: Tensor, total: Tensor) -> Floats:
    n = tables.n_tokens
    used = count > 0
    cells = int(used.sum())
    between = (total[used].square() / count[used][:, None]).sum(dim=0) - tables.total.square() / max(n, 1)
    whole = (tables.square - tables.total.square() / max(n, 1)).numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        raw = np.where(whole > 0, between.numpy() / whole, np.nan)
    if n <= cells:
        return np.full(len(raw), np.nan)
    return np.clip(1 - (1 - raw) * (n - 1) / (n - cells), 0.0, 1.0)


Interval = tuple[Floats, Floats]


def mean_interval(values: Floats) -> Interval:
    """95 % t interval (low, high) of the mean over rows, [n, L] -> two [L]; NaN with fewer than two rows."""
    n = len(values)
    if n < 2:
        return np.full(values.shape[1], np.nan), np.full(values.shape[1], np.nan)
    middle = values.mean(axis=0)
    half = stats.t.ppf((1 + LEVEL) / 2, n - 1) * values.std(axis=0, ddof=1) / np.sqrt(n)
    return middle - half, middle + half
