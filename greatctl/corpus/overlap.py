"""What works repeat of each other, word for word: runs of 13 words and more, found exactly.

Letters printed in two volumes, a chapter reprinted, a page of Washington's among Jefferson's papers: whoever holds out the
one has trained on the other. Thirteen words is the length that language-model corpora are cleaned by (Brown et al. 2020,
arXiv 2005.14165, appendix C). Words are compared without case, punctuation and line ends.

The earlier work keeps a passage and the later one loses it, in the order of the manifest: the seed first, then the
characters' works, then the controls, so that a control never takes a word from a character.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

__all__ = ["WORDS", "Leak", "leaks", "overlaps", "table"]

WORDS = 13
_WORD = re.compile(r"[^\W_]+")  # an underscore is a mark of italics
_TAIL = re.compile(r"[^\w\s]*[^\S\n]*")  # punctuation and blanks that go with the word before them
_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Leak:
    """What `loser` repeats of the earlier work `keeper`.

    Attributes:
        shared: 13-grams of the loser that the keeper has as well.
        fraction: of the loser's 13-grams.
        spans: characters (from, to) of the loser's text, in order, without overlap.
    """

    loser: str
    keeper: str
    shared: int
    fraction: float
    spans: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class _Work:
    name: str
    words: np.ndarray  # int64 ids
    starts: np.ndarray
    ends: np.ndarray
    text: str

    @property
    def n_grams(self) -> int:
        return max(0, len(self.words) - WORDS + 1)


def leaks(texts: Mapping[str, str]) -> list[Leak]:
    """Every passage of a work that an earlier one has, each given to the first that has it.

    Args:
        texts: id -> text, in the order of precedence. All are held in memory at once.
    """
    found = []
    seen = _Seen()
    for number, work in enumerate(_works(texts)):
        keeper = seen.first_with(work)
        for other in np.unique(keeper[keeper >= 0]):
            places = np.flatnonzero(keeper == other)
            name = seen.works[int(other)].name
            found.append(Leak(work.name, name, len(places), len(places) / work.n_grams, _spans(work, places)))
        seen.add(number, work)
    return found


def overlaps(texts: Mapping[str, str]) -> list[tuple[str, str, int, float]]:
    """(one, other, 13-grams of the smaller that the larger has, as a fraction of the smaller's) of every pair that shares
    any, largest fraction first.
    """
    works = list(_works(texts))
    grams = [np.unique(_hashes(work.words)) for work in works]
    found = []
    for i, one in enumerate(works):
        for j in range(i):
            shared = len(np.intersect1d(grams[i], grams[j], assume_unique=True))
            if shared:
                found.append((works[j].name, one.name, shared, shared / min(len(grams[i]), len(grams[j]))))
    return sorted(found, key=lambda row: -row[3])


def table(found: Sequence[Leak]) -> pa.Table:
    """One row a passage: loser, keeper, char_start, char_end."""
    rows = [(leak.loser, leak.keeper, start, end) for leak in found for start, end in leak.spans]
    columns = list(zip(*rows, strict=True)) or [(), (), (), ()]
    types = {"loser": pa.string(), "keeper": pa.string(), "char_start": pa.int64(), "char_end": pa.int64()}
    return pa.table({name: pa.array(list(c), t) for (name, t), c in zip(types.items(), columns, strict=True)})


class _Seen:
    """The 13-grams of earlier works: sorted hashes, each with the first work and place that has it."""

    def __init__(self) -> None:
        self.works: list[_Work] = []
        self._hashes = np.zeros(0, np.uint64)
        self._work = np.zeros(0, np.int64)
        self._place = np.zeros(0, np.int64)

    def first_with(self, work: _Work) -> np.ndarray:
        """[n_grams] number of the earlier work that has each 13-gram, -1 for none; hashes are verified word by word."""
        hashes = _hashes(work.words)
        at = np.searchsorted(self._hashes, hashes)
        at[at == len(self._hashes)] = 0
        keeper = np.full(len(hashes), -1, np.int64)
        if not len(self._hashes):
            return keeper
        for i in np.flatnonzero(self._hashes[at] == hashes):
            other, place = int(self._work[at[i]]), int(self._place[at[i]])
            if np.array_equal(self.works[other].words[place : place + WORDS], work.words[i : i + WORDS]):
                keeper[i] = other
        return keeper

    def add(self, number: int, work: _Work) -> None:
        self.works.append(work)
        hashes = np.concatenate([self._hashes, _hashes(work.words)])
        owners = np.concatenate([self._work, np.full(work.n_grams, number, np.int64)])
        places = np.concatenate([self._place, np.arange(work.n_grams, dtype=np.int64)])
        self._hashes, first = np.unique(hashes, return_index=True)  # the first of equals, which is the earlier work's
        self._work, self._place = owners[first], places[first]


def _works(texts: Mapping[str, str]) -> Iterator[_Work]:
    vocabulary: dict[str, int] = {}
    for name, text in texts.items():
        found = [(m.group().lower(), m.start(), m.end()) for m in _WORD.finditer(text)]
        ids = np.fromiter((vocabulary.setdefault(word, len(vocabulary)) for word, _, _ in found), np.int64, len(found))
        starts = np.fromiter((start for _, start, _ in found), np.int64, len(found))
        ends = np.fromiter((end for _, _, end in found), np.int64, len(found))
        yield _Work(name, ids, starts, ends, text)


def _hashes(words: np.ndarray) -> np.ndarray:
    """64-bit hash of every 13 words in a row, uint64 [n - 12]."""
    n = max(0, len(words) - WORDS + 1)
    total = np.zeros(n, np.uint64)
    with np.errstate(over="ignore"):
        mixed = (words.astype(np.uint64) + np.uint64(1)) * _MIX
        mixed ^= mixed >> np.uint64(29)
        for j in range(WORDS):
            total = total * _MIX + mixed[j : j + n]
    return total


def _spans(work: _Work, places: np.ndarray) -> list[tuple[int, int]]:
    """Character spans of the words that the 13-grams at `places` cover, with the punctuation behind them."""
    breaks = np.flatnonzero(np.diff(places) > WORDS)
    firsts = places[np.concatenate([[0], breaks + 1])]
    lasts = places[np.concatenate([breaks, [len(places) - 1]])] + WORDS - 1
    found = []
    for first, last in zip(firsts, lasts, strict=True):
        tail = _TAIL.match(work.text, int(work.ends[last]))
        assert tail is not None
        found.append((int(work.starts[first]), tail.end()))
    return found
