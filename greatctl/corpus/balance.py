"""How much one voice may say: windows are left out so that no character outvotes the others.

A statistic over tokens is otherwise one about whoever wrote most; Jefferson's three volumes hold ninety times as many
tokens as the one free text of Eleanor Roosevelt.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["within_cap"]


def within_cap(
    units: Sequence[str], works: Sequence[str], owner: np.ndarray, tokens: np.ndarray, *, cap: int
) -> np.ndarray:
    """Which windows stay, so that no unit has more than about `cap` tokens.

    A unit's allowance is shared evenly by its works; what a short work does not use goes to the others. Within a work
    the windows that stay are spread evenly along it. No chance is involved.

    Args:
        units, works: of each document.
        owner: document of each window, int64 [n_windows].
        tokens: of each window [n_windows].
        cap: tokens a unit may have.

    Returns: bool [n_windows].
    """
    names = np.array(units)
    keep = np.ones(len(owner), dtype=bool)
    for unit in dict.fromkeys(units):
        documents = np.flatnonzero(names == unit).tolist()
        mine = {
            work: np.flatnonzero(np.isin(owner, [d for d in documents if works[d] == work]))
            for work in dict.fromkeys(works[d] for d in documents)
        }
        sizes = {work: int(tokens[windows].sum()) for work, windows in mine.items()}
        for work, allowed in _shares(sizes, cap).items():
            if sizes[work] > allowed:
                keep[mine[work]] = False
                keep[_spread(mine[work], max(1, len(mine[work]) * allowed // sizes[work]))] = True
    return keep


def _spread(windows: np.ndarray, n: int) -> np.ndarray:
    """`n` of the windows: the middle one of each of n equal stretches."""
    return windows[(2 * np.arange(n) + 1) * len(windows) // (2 * n)]


def _shares(sizes: dict[str, int], cap: int) -> dict[str, int]:
    """Tokens for each work: equal shares of `cap`, small works served first and in full."""
    left, shares = cap, {}
    for served, work in enumerate(sorted(sizes, key=lambda name: (sizes[name], name))):
        shares[work] = min(sizes[work], left // (len(sizes) - served))
        left -= shares[work]
    return shares
