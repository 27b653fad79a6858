"""From windows to authors: the numbers that a verdict may rest on.

Passages of one work are alike, and so are works of one author; a test that counts them one by one finds
effects where there are none (Squair et al. 2021 met the same in single-cell genomics). So windows are
averaged into *cells* (one work, or the part of it that shares era, genre and topic), works into authors with
equal weight, and the author is the unit.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from ..errors import UsageError

__all__ = ["FACTORS", "Cells", "Documents", "Parts", "average", "columns_of", "gather", "positive_role"]

FACTORS = ("era", "genre", "topic", "translated")
POSITIVE = ("character", "seed")
HELD_OUT, HELD_OUT_WORK = "heldout-author", "heldout-work"
_NAMES = ("work", "source_id", "character", "unit", "author")  # by which a control may say what it matches

Floats = NDArray[np.float64]
# rows, columns, or a table of pyarrow, pandas or polars
Documents = Sequence[Mapping[str, object]] | Mapping[str, Sequence[object]] | Any


@dataclass(frozen=True)
class Parts:
    """Pieces of text, of which a work can be made from fewer.

    Attributes:
        values: mean activations [n_parts, n_latents].
        amount: how much text each is [n_parts], in windows or tokens.
        of: what each is a part of [n_parts]: a row of the documents for `gather`, a work in `Cells`.
    """

    values: NDArray
    amount: Floats
    of: NDArray[np.int64]


@dataclass(frozen=True)
class Cells:
    """Cells and authors of a corpus, with their mean activations.

    Attributes:
        means: [n_cells, n_latents], the mean over each cell's windows.
        author: index of each cell's author [n_cells].
        role: each cell's role [n_cells], 1 for a character and 0 for a control.
        factors: era, genre, topic and translated -> index of each cell's level [n_cells]; a factor without
            values is left out, and so is `translated` where all is, or nothing.
        levels: names of each factor's levels.
        authors: names [n_authors].
        author_means: [n_authors, n_latents]; works count equally inside an author.
        author_role: [n_authors] bool.
        heldout: authors whose works are all marked `heldout-author` [n_authors] bool.
        ambiguous: authors that appear under both roles, and were left out.
        work_means: [n_works, n_latents]; work_author [n_works] is the author's index, work_heldout [n_works] bool
            marks works of authors in training that were themselves kept apart (`heldout-work`).
        hard: controls that share the subject of praise but not the role [n_authors] bool.
        matched: [n_pairs, n_latents], a control's matched works (equally by author) minus the control, one row a
            control that names works or characters in `matches`; matched_names are those controls.
        unit: what an author is called (`author`, or `subject` where subjects took the authors' place).
        parts: the works' parts, by which authors can be made alike in how much text they have; None if unknown.
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
    ambiguous: list[str]
    work_means: Floats
    work_author: NDArray[np.int64]
    work_heldout: NDArray[np.bool_]
    hard: NDArray[np.bool_]
    matched: Floats
    matched_names: list[str] = field(default_factory=list)
    unit: str = "author"
    parts: Parts | None = None


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
    """The named columns of a document table, given as rows, as columns, or as a table that another library made.

    A missing field is None, and so is NaN, which is how such libraries mark one.

    Raises:
        UsageError: the columns differ in length, or this is no table.
    """
    known = getattr(documents, "column_names", None) or getattr(documents, "columns", None)  # pyarrow; pandas, polars
    if isinstance(documents, Mapping):
        found = {name: list(documents[name]) for name in names if name in documents}
        n_rows = len(next(iter(documents.values()), ()))
    elif known is not None and not callable(known):
        table: Any = documents
        there = set(known)
        found = {name: _values(table[name]) for name in names if name in there}
        n_rows = len(documents)
    else:
        rows = list(documents)
        if not all(isinstance(row, Mapping) for row in rows):
            fix = "give a list of dicts, a dict of columns, or a table"
            raise UsageError("the documents are no table", why="a row is not a mapping of names to values", fix=fix)
        return {name: [_none_for_nan(row.get(name)) for row in rows] for name in names}
    uneven = [name for name, values in found.items() if len(values) != n_rows]
    if uneven:
        why = f"{n_rows} rows, and {len(found[uneven[0]])} in {uneven[0]}"
        raise UsageError("the document table's columns differ in length", why=why)
    return {name: [_none_for_nan(v) for v in found.get(name, [None] * n_rows)] for name in names}


def _values(column: Any) -> list[object]:
    """A column of such a table as Python values."""
    for name in ("to_pylist", "to_list", "tolist"):
        if hasattr(column, name):
            return list(getattr(column, name)())
    return list(column)


def _none_for_nan(value: object) -> object:
    return None if isinstance(value, float) and value != value else value


def gather(
    activations: NDArray, documents: Documents, weights: NDArray | None = None, *, parts: Parts | None = None
) -> Cells:
    """Average rows into cells and authors.

    Args:
        activations: [n_rows, n_latents] float; a row is a window, or a document's mean.
        documents: one row each, with author, work, role, and where known era, genre, topic, translated, split,
            hard (bool) and matches (a list, or text with commas, of works, source ids or characters).
        weights: [n_rows] windows (or tokens) behind each row; default 1.
        parts: of the rows, where a row is more than a window; default: each row is a part.

    Raises:
        UsageError: lengths differ, a number is not finite, or a row has no author or an unknown role.
    """
    values = np.asarray(activations)
    columns = columns_of(documents, ("role", "split", "hard", "matches", *_NAMES, *FACTORS))
    _validate(values, columns)
    weight = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=np.float64)
    positive = [positive_role(role) for role in columns["role"]]
    ambiguous = _ambiguous(columns["author"], positive)
    kept = [i for i, a in enumerate(columns["author"]) if str(a) not in ambiguous]
    keys = [tuple(str(columns[c][i]) for c in ("author", "work", *FACTORS)) for i in kept]
    order, cell = _index(keys)
    means = average(values, kept, cell, weight, len(order))
    first = {key: i for i, key in zip(reversed(kept), reversed(keys), strict=True)}
    rows = [first[key] for key in order]
    authors, author = _index([key[0] for key in order])
    works, work = _index([key[:2] for key in order])
    # windows of a work that change their topic make several cells, but the work still counts once
    cell_weight = np.asarray(np.bincount(cell, weight[kept], len(order)), dtype=np.float64)
    work_means = average(means, range(len(order)), work, cell_weight, len(works))
    work_author = np.array([authors.index(w[0]) for w in works], dtype=np.int64)
    author_means = average(work_means, range(len(works)), work_author, np.ones(len(works)), len(authors))
    role = np.array([positive[i] for i in rows], dtype=np.float64)
    author_role = np.zeros(len(authors), dtype=bool)
    author_role[author] = role > 0
    of_work = _rows_of_works(kept, columns, {key: i for i, key in enumerate(works)})
    split = [{columns["split"][i] for i in of_work[w]} for w in range(len(works))]
    held = _by_author(work_author, [found == {HELD_OUT} for found in split], len(authors), all_of=True)
    hard = _by_author(work_author, [any(columns["hard"][i] is True for i in found) for found in of_work], len(authors))
    factors, levels = _factors(columns, kept, order)
    pairs, names = _matched(columns, of_work, work_means, work_author, author_role, author_means)
    pieces = _of_works(parts or Parts(values, weight, np.arange(len(values))), of_work)
    return Cells(
        means, author, role, factors, levels, authors, author_means, author_role, held, ambiguous,
        work_means, work_author, np.array([found == {HELD_OUT_WORK} for found in split], dtype=bool),
        hard & ~author_role, pairs, [authors[i] for i in names], parts=pieces,
    )  # fmt: skip


def _ambiguous(authors: Sequence[object], positive: Sequence[bool]) -> list[str]:
    sides: dict[str, set[bool]] = {}
    for author, side in zip(authors, positive, strict=True):
        sides.setdefault(str(author), set()).add(side)
    return sorted(a for a, found in sides.items() if len(found) > 1)


def _rows_of_works(
    kept: Sequence[int], columns: Mapping[str, list[object]], place: Mapping[tuple[str, ...], int]
) -> list[list[int]]:
    """The rows of each work."""
    found: list[list[int]] = [[] for _ in place]
    for i in kept:
        found[place[str(columns["author"][i]), str(columns["work"][i])]].append(i)
    return found


def _of_works(parts: Parts, of_work: Sequence[Sequence[int]]) -> Parts:
    """The parts of rows as parts of works; -1 where the row was left out."""
    n_rows = int(parts.of.max(initial=-1)) + 1
    work = np.full(n_rows, -1, dtype=np.int64)
    for number, rows in enumerate(of_work):
        work[[row for row in rows if row < n_rows]] = number
    return Parts(parts.values, parts.amount, work[parts.of])


def _by_author(
    work_author: NDArray[np.int64], marked: Sequence[bool], n_authors: int, *, all_of: bool = False
) -> NDArray[np.bool_]:
    """Authors of whom any work is marked, or all are [n_authors]."""
    count = np.bincount(work_author, np.asarray(marked, dtype=np.float64), n_authors)
    return count == np.bincount(work_author, minlength=n_authors) if all_of else count > 0


def _factors(
    columns: Mapping[str, list[object]], kept: Sequence[int], order: Sequence[tuple[str, ...]]
) -> tuple[dict[str, NDArray[np.int64]], dict[str, list[str]]]:
    factors, levels = {}, {}
    for place, name in enumerate(FACTORS, start=2):
        if any(columns[name][i] not in (None, "") for i in kept):
            found, index = _index([key[place] for key in order])
            if name != "translated" or len(found) > 1:
                levels[name], factors[name] = found, index
    return factors, levels


def _matched(
    columns: Mapping[str, list[object]],
    of_work: Sequence[Sequence[int]],
    work_means: Floats,
    work_author: NDArray[np.int64],
    author_role: NDArray[np.bool_],
    author_means: Floats,
) -> tuple[Floats, list[int]]:
    """Differences [n_pairs, n_latents] between the works that a control matches and the control, and the controls."""
    named: dict[str, set[int]] = {}
    wanted: dict[int, set[str]] = {}
    for work, rows in enumerate(of_work):
        author = int(work_author[work])
        if author_role[author]:
            for name in {str(columns[c][i]) for c in _NAMES for i in rows[:1] if columns[c][i]}:
                named.setdefault(name, set()).add(work)
        else:
            wanted.setdefault(author, set()).update(*(_listed(columns["matches"][i]) for i in rows[:1]))
    pairs, controls = [], []
    for author, names in sorted(wanted.items()):
        works = sorted({work for name in names for work in named.get(name, ())})
        if works:
            _, group = np.unique(work_author[works], return_inverse=True)
            by_author = average(work_means, works, group, np.ones(len(work_means)), int(group.max()) + 1)
            pairs.append(by_author.mean(axis=0) - author_means[author])
            controls.append(author)
    return np.array(pairs).reshape(len(pairs), work_means.shape[1]), controls


def _listed(value: object) -> set[str]:
    if isinstance(value, str):
        return {part.strip() for part in value.split(",")} - {""}
    return {str(part) for part in value} if isinstance(value, list | tuple | set) else set()


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


def average(
    values: NDArray, rows: Sequence[int] | NDArray, group: NDArray[np.int64], weight: Floats, n_groups: int
) -> Floats:
    """Weighted means of `values[rows]` by group, [n_groups, n_columns] float64."""
    at = np.asarray(rows, dtype=np.int64)
    membership = sparse.csr_array((weight[at], (group, np.arange(len(at)))), shape=(n_groups, len(at)))
    size = np.bincount(group, weight[at], n_groups)
    return (membership @ values[at].astype(np.float64)) / np.maximum(size, np.finfo(float).tiny)[:, None]
