"""From a passage of a clean text back to the bytes of the file it was downloaded as.

Cleaning joins lines, drops marks and composes accents, but never changes the order of letters. So both texts are
reduced to their letters (page numbers and footnote marks are mostly digits), the passage's beginning and end are found
in the reduced original, and positions there are bytes in the file. What was cut inside the passage lies in the range.
"""

from __future__ import annotations

import unicodedata

import numpy as np

from ..errors import IntegrityError
from .encoding import decode

__all__ = ["byte_range"]

_ANCHORS = (32, 16, 8, 4)  # letters to look for; fewer where something was cut within so many


def byte_range(original: bytes, text: str, start: int, end: int) -> tuple[int, int]:
    """The bytes (from, to) of `original` that characters `start` to `end` of its clean text come from.

    Raises:
        IntegrityError: the passage is not in the file.
    """
    raw, encoding = decode(original)
    theirs, places = _letters(raw)
    ours, _ = _letters(text)
    before = len(_letters(text[:start])[0])
    passage = _letters(text[start:end])[0]
    if not passage:
        raise IntegrityError("a passage without letters cannot be traced", why=repr(text[start:end][:40]))
    guess = before * len(theirs) // max(1, len(ours))
    first = _first(theirs, ours[:before], passage, guess)
    last = None if first is None else _last(theirs, passage, first)
    if first is None or last is None:
        raise IntegrityError(
            "the passage is not in the original file", why=f"it begins {text[start : start + 40]!r}", code="untraceable"
        )
    bare, mark = ("utf-8", 3) if encoding == "utf-8-sig" else (encoding, 0)
    head = mark + len(raw[: places[first]].encode(bare))
    return head, head + len(raw[places[first] : places[last] + 1].encode(bare))


def _first(theirs: str, context: str, passage: str, guess: int) -> int | None:
    """Where the passage begins in the original's letters: by what stands before it as well, or by itself."""
    for n in _ANCHORS:
        for lead in (context[-n:], ""):
            found = _nearest(theirs, lead + passage[:n], guess)
            if found is not None:
                return found + len(lead)
    return None


def _last(theirs: str, passage: str, first: int) -> int | None:
    """Where the passage ends in the original's letters; cuts inside it only move the end back."""
    for n in _ANCHORS:
        tail = passage[-n:]
        found = theirs.find(tail, first + len(passage) - len(tail))
        if found >= 0:
            return found + len(tail) - 1
    return None


def _nearest(text: str, wanted: str, guess: int) -> int | None:
    """Where `wanted` begins in `text`, nearest to `guess`."""
    after, before = text.find(wanted, guess), text.rfind(wanted, 0, guess + len(wanted))
    found = [place for place in (after, before) if place >= 0]
    return min(found, key=lambda place: abs(place - guess)) if found else None


def _letters(text: str) -> tuple[str, np.ndarray]:
    """Letters of `text`, decomposed and without case, and the place of each in `text`."""
    found, places = [], []
    for place, character in enumerate(text):
        if character.isascii():
            if character.isalpha():
                found.append(character.lower())
                places.append(place)
            continue
        for part in unicodedata.normalize("NFKD", character).casefold():
            if part.isalpha():
                found.append(part)
                places.append(place)
    return "".join(found), np.array(places, dtype=np.int64)
