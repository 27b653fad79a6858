"""What a labeler answered, read with patience and believed in nothing.

Answers come with code fences, with thoughts in front, with HTML in them, or not as JSON at all. The last JSON value of
the expected kind counts; where there is none, the answer is malformed and the caller asks again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from .inert import inert

__all__ = ["DESCRIPTION", "NAME", "read_choices", "read_label"]

NAME, DESCRIPTION = 60, 300
"""The longest name and description that are kept, in characters."""

_LONGEST = 20_000  # characters of an answer that are looked at
_THOUGHTS = re.compile(r"<think>.*?</think>", re.S)


def read_label(answer: str) -> tuple[str, str]:
    """Name and description, inert and cut to length.

    Raises:
        ValueError: there is no JSON object with a name that is text.
    """
    for value in reversed(list(_values(answer, "{"))):
        name = value.get("name") if isinstance(value, dict) else None
        if isinstance(name, str) and (short := inert(name, NAME)):
            said = value.get("description")
            return short, inert(said, DESCRIPTION) if isinstance(said, str) else ""
    raise ValueError('no JSON object with a "name"')


def read_choices(answer: str, count: int) -> list[bool]:
    """One yes or no for each of `count` passages, from a JSON list of 0 and 1 (or false and true).

    Raises:
        ValueError: there is no such list of that length.
    """
    for value in reversed(list(_values(answer, "["))):
        if (
            isinstance(value, list)
            and len(value) == count
            and all(type(v) in (int, bool) and v in (0, 1) for v in value)
        ):
            return [bool(v) for v in value]
    raise ValueError(f"no JSON list of {count} zeros and ones")


def _values(answer: str, opening: str) -> Iterator[object]:
    """The JSON values in the answer that begin with `opening`, in order, none inside another."""
    text = _THOUGHTS.sub("", answer)[-_LONGEST:]
    decoder = json.JSONDecoder(strict=False)  # a line break inside a string is no reason to ask again
    place = text.find(opening)
    while place >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            end = place + 1
        else:
            yield value
        place = text.find(opening, end)
