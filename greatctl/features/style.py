"""The style of texts in numbers, without any model: how often which letters stand together, and which small words.

Stylometry tells authors apart by exactly these (Mosteller and Wallace 1964; Kestemont 2014), so a latent that tells
characters from controls no better has shown a way of writing and nothing more.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["character_ngrams", "function_words"]

BUCKETS = 4096
_LENGTHS = (2, 3, 4)
_FUNCTION_WORDS = (
    "the of and to a in that is was it for as with be by on not he his at but from have are which this or an had they "
    "were their one all him been we my her has if me more when there so she would who them will no your what its "
    "than do then into only some could any our these may other such very upon those how before must can should our up "
    "did being never should about over now out where after most much every own shall us while against under though "
    "through between because both each without yet here again still too nor either whether thus am himself itself"
)
_WORD = re.compile(r"[a-z]+")
_SPACE = re.compile(r"\s+")


def character_ngrams(texts: Sequence[str]) -> NDArray[np.float64]:
    """Hashed frequencies of runs of 2 to 4 bytes, [n_texts, 3 * BUCKETS]; square roots, so that rare runs count.

    Case and the kind of white space are levelled: they are the file's habits, not the author's.
    """
    return np.stack([_ngrams(text) for text in texts]) if texts else np.zeros((0, len(_LENGTHS) * BUCKETS))


def _ngrams(text: str) -> NDArray[np.float64]:
    data = np.frombuffer(_SPACE.sub(" ", text.lower()).encode(), dtype=np.uint8).astype(np.uint64)
    parts = []
    for length in _LENGTHS:
        n = max(len(data) - length + 1, 0)
        code = np.zeros(n, dtype=np.uint64)
        for i in range(length):
            code = code * np.uint64(257) + data[i : i + n]
        bucket = (code * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(52)
        count = np.bincount(bucket.astype(np.int64), minlength=BUCKETS)
        parts.append(np.sqrt(count / max(n, 1)))
    return np.concatenate(parts)


def function_words(texts: Sequence[str]) -> NDArray[np.float64]:
    """How often each of about 130 small words stands among all words, [n_texts, n_words]."""
    words = list(dict.fromkeys(_FUNCTION_WORDS.split()))
    rows = np.zeros((len(texts), len(words)))
    for row, text in zip(rows, texts, strict=True):
        count = Counter(_WORD.findall(text.lower()))
        row[:] = [count[word] for word in words]
        row /= max(sum(count.values()), 1)
    return rows
