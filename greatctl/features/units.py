"""From windows to authors: the numbers that a verdict may rest on.

Passages of one work are alike, and so are works of one author; a test that counts them one by one finds
effects where there are none (Squair et al. 2021 met the same in single-cell genomics). So windows are
averaged into *cells* (one work, or the part of it that shares era, genre and topic), works into authors with
equal weight, and the author is the unit.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError

__all__ = ["FACTORS", "Cells", "Documents", "columns_of", "gather", "positive_role"]

FACTORS = ("era", "genre", "topic")
POSITIVE = ("character", "seed")
HELD_OUT = "heldout-author"

Floats = NDArray[np.float64]
Documents = Sequence[Mapping[str, object]] | Mapping[str, Sequence[object]]


@dataclass(frozen=True)
class Cells:
    """Cells and authors of a corpus, with their mean activations.

    Attributes:
        means: [n_cells, n_latents], the mean over each cell's windows.
        author: index of each cell's author [n_cells].
        role: each cell's role [n_cells], 1 for a character and 0 for a control.
        factors: era, genre and topic -> index of each cell's level [n_cells]; a factor without values is left
            out.
        levels: names of each factor's levels.
        authors: names [n_authors].
        author_means: [n_authors, n_latents]; works count equally inside an author.
        author_role: [n_authors] bool.
        heldout: authors whose works are all marked `heldout-author` [n_authors] bool.
        ambiguous: authors that appear under both roles, and were left out.
        unit: what an author is called (`author`, or `subject` where subjects took the authors' place).
    """

    means: Floats
    author: NDArray[np.int64]
    role: Floats
    factors: dict[str, NDArray[np.int64]]
    levels: dict[str, list[str]]
    authors: list[str]
    author_means: Floats
    author_role: NDArray[np.bool_]
    heldout: NDArray[np.bool_]
    ambiguous: list[str] = field(default_factory=list)
    unit: str = "author"


def positive_role(role: object) -> bool:
    """Whether a role counts as a character (`character` and `seed` do, `control` does not).

    Raises:
        UsageError: the role is none of the three.
    """
    if role in POSITIVE:
        return True
    if role == "control":
        return False
    raise UsageError(f"unknown role {role!r}", why="a document is of a character, the seed, or a control")


def columns_of(documents: Documents, names: Sequence[str]) -> dict[str, list[object]]:
    """The named columns of a document table, given as rows or as columns; a missing field is None."""
    if isinstance(documents, Mapping):
        n_rows = len(next(iter(documents.values()), ()))
        return {name: list(documents.get(name, [None] * n_rows)) for name in names}
    return {name: [row.get(name) for row in documents] for name in names}


def gather(activations: NDArray, documents: Documents, weights: NDArray | None = None) -> Cells:
    """Average rows into cells and authors.

    Args:
        activations: [n_rows, n_latents] float; a row is a window, or a document's mean.
        documents: one row each, with author, work, role, and where known era, genre, topic, split.
        weights: [n_rows] windows (or tokens) behind each row; default 1.

    Raises:
        UsageError: lengths differ, a number is not finite, or a row has no author or an unknown role.
    """
    values = np.asarray(activations)
    columns = columns_of(documents, ("author", "work", "role", "split", *FACTORS))
    _validate(values, columns)
    weight = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=np.float64)
    positive = [positive_role(role) for role in columns["role"]]
    sides: dict[str, set[bool]] = {}
    for author, side in zip(columns["author"], positive, strict=True):
        sides.setdefault(str(author), set()).add(side)
    ambiguous = sorted(a for a, found in sides.items() if len(found) > 1)
    kept = [i for i, a in enumerate(columns["author"]) if str(a) not in ambiguous]
    keys = [tuple(str(columns[c][i]) for c in ("author", "work", *FACTORS)) for i in kept]
    order, cell = _index(keys)
    means = _average(values, kept, cell, weight, len(order))
    first = {key: i for i, key in zip(reversed(kept), reversed(keys), strict=True)}
    rows = [first[key] for key in order]
    authors, author = _index([key[0] for key in order])
    works, work = _index([key[:2] for key in order])
    # windows of a work that change their topic make several cells, but the work still counts once
    cell_weight = np.asarray(np.bincount(cell, weight[kept], len(order)), dtype=np.float64)
    work_means = _average(means, range(len(order)), work, cell_weight, len(works))
    work_author = np.array([authors.index(w[0]) for w in works], dtype=np.int64)
    author_means = _average(work_means, range(len(works)), work_author, np.ones(len(works)), len(authors))
    held = np.ones(len(authors), dtype=bool)
    for i in kept:
        if columns["split"][i] != HELD_OUT:
            held[authors.index(str(columns["author"][i]))] = False
    factors, levels = {}, {}
    for place, name in enumerate(FACTORS, start=2):
        if any(columns[name][i] not in (None, "") for i in kept):
            levels[name], factors[name] = _index([key[place] for key in order])
    role = np.array([positive[i] for i in rows], dtype=np.float64)
    author_role = np.zeros(len(authors), dtype=bool)
    author_role[author] = role > 0
    return Cells(means, author, role, factors, levels, authors, author_means, author_role, held, ambiguous)


def _validate(values: NDArray, columns: Mapping[str, list[object]]) -> None:
    if values.ndim != 2 or len(values) != len(columns["author"]):
        raise UsageError(
            f"activations of shape {list(values.shape)} do not fit {len(columns['author'])} documents",
            why="both need one row a window",
        )
    if not np.isfinite(values).all():
        raise UsageError("an activation is not a finite number", why="NaN or infinity cannot be averaged")
    if any(author in (None, "") for author in columns["author"]):
        raise UsageError("a document has no author", why="the author is the unit of every test")


def _index(keys: Sequence[Hashable]) -> tuple[list, NDArray[np.int64]]:
    """Distinct keys in sorted order, and the place of each key among them."""
    order = sorted(set(keys))  # type: ignore[type-var]
    place = {key: i for i, key in enumerate(order)}
    return order, np.array([place[key] for key in keys], dtype=np.int64)


def _average(values: NDArray, rows: Sequence[int], group: NDArray[np.int64], weight: Floats, n_groups: int) -> Floats:
    """Weighted means of `values[rows]` by group, [n_groups, n_columns] float64."""
    total = np.zeros((n_groups, values.shape[1]))
    size = np.zeros(n_groups)
    for place, row in enumerate(rows):
        total[group[place]] += weight[row] * values[row]
        size[group[place]] += weight[row]
    return total / np.maximum(size, np.finfo(float).tiny)[:, None]
