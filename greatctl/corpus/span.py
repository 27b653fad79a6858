"""The author's own words within a file.

Editors, translators and indexers wrote parts of most books. The manifest names the line where the author
begins and the line where he ends; when such a line is not found, somebody edited the file, and guessing would
let strangers' words in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import IntegrityError
from .cuts import Cleaner
from .encoding import normalise

if TYPE_CHECKING:
    from ..manifest import Entry

__all__ = ["own_span"]


def own_span(entry: Entry, text: str, cleaner: Cleaner) -> str:
    """The author's own text: from the nth line that starts with `text_from` up to, not with, the nth of
    `text_to`.

    Raises:
        IntegrityError: a marker is missing; the whole file is never taken instead.
    """
    lines = text.split("\n")
    first = _marker(entry, lines, "text_from") if entry.text_from else 0
    last = _marker(entry, lines, "text_to") if entry.text_to else len(lines)
    if last <= first:
        raise _lost(
            entry,
            f"the span of {entry.id!r} is empty",
            f"text_to is at line {last + 1}, text_from at {first + 1}",
        )
    cleaner.cut("before-span", "\n".join(lines[:first]))
    cleaner.cut("after-span", "\n".join(lines[last:]))
    return "\n".join(lines[first:last])


def _marker(entry: Entry, lines: Sequence[str], which: str) -> int:
    """Line index of the entry's `text_from` or `text_to` marker."""
    wanted = normalise(getattr(entry, which)).strip()
    nth = getattr(entry, f"{which}_nth", None) or 1
    seen = 0
    for i, line in enumerate(lines):
        if line.strip().startswith(wanted):
            seen += 1
            if seen == nth:
                return i
    raise _lost(
        entry,
        f"the marker {which} = {wanted!r} of {entry.id!r} is not in the file",
        f"line {nth} that starts with it was looked for, {seen} found; the edition may have changed",
    )


def _lost(entry: Entry, message: str, why: str) -> IntegrityError:
    fix = f"look at the file, then correct text_from and text_to of {entry.id!r} in sources.toml"
    return IntegrityError(message, why=why, fix=fix, code="marker-missing")
