"""What a labeler answered, read with patience and believed in nothing.

Answers come with code fences, with thoughts in front, with HTML in them, or not as JSON at all. The last JSON value of
the expected kind counts; where there is none, the answer is malformed and the caller asks again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from .inert import inert

__all__ = ["DESCRIPTION", "LONGEST", "NAME", "read_choices", "read_label"]

NAME, DESCRIPTION = 60, 300
"""The longest name and description that are kept, in characters."""

LONGEST = 20_000
"""Characters of an answer, its last ones, that are looked at and kept."""

_OPENINGS = 500  # brackets that are tried
_THOUGHTS = re.compile(r"<think>.*?</think>", re.S)


def read_label(answer: str) -> tuple[str, str]:
    """Name and description, inert and cut to length.

    Raises:
        ValueError: there is no JSON object with a name that is text.
    """
    for value in _values(answer, "{"):
        if not isinstance(value, dict):
            continue
        name, said = value.get("name"), value.get("description")
        if isinstance(name, str) and (short := inert(name, NAME)):
            return short, inert(said, DESCRIPTION) if isinstance(said, str) else ""
    raise ValueError('no JSON object with a "name"')


def read_choices(answer: str, count: int) -> list[bool]:
    """One yes or no for each of `count` passages, from a JSON list of 0 and 1 (or false and true).

    Raises:
        ValueError: there is no such list of that length.
    """
    for value in _values(answer, "["):
        if (
            isinstance(value, list)
            and len(value) == count
            and all(type(v) in (int, bool) and v in (0, 1) for v in value)
        ):
            return [bool(v) for v in value]
    raise ValueError(f"no JSON list of {count} zeros and ones")


def _values(answer: str, opening: str) -> Iterator[object]:
    """The JSON values in the answer that begin with `opening`, the last first."""
    text = _THOUGHTS.sub("", answer)[-LONGEST:]
    decoder = json.JSONDecoder(strict=False)  # a line break inside a string is no reason to ask again
    place = len(text)
    for _ in range(_OPENINGS):
        place = text.rfind(opening, 0, place)
        if place < 0:
            return
        try:
            yield decoder.raw_decode(text, place)[0]
        except (ValueError, RecursionError):
            continue
