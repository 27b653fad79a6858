"""What Project Gutenberg put around a book, and between the parts of a joined one.

The wrapper changed over thirty years: a small print in front, a small print behind, a START line that may run over
three lines, and in the oldest files no header whatever. Two rules follow from real files. The last END line counts,
since joined files carry one a part. And a small print ends the header only where it stands in the first half, for
in files of 2002 to 2004 it follows the book.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import IntegrityError
from .cuts import Cleaner

__all__ = ["strip_wrapper"]

_START = re.compile(r"^\s*\*{3}\s*START OF (?:THIS|THE) PROJECT GUTENBERG", re.IGNORECASE)
_END = re.compile(r"^\s*\*{3}\s*END OF (?:THIS|THE) PROJECT GUTENBERG", re.IGNORECASE)
_SMALL_PRINT_END = re.compile(r"^\s*\*END\*?\s*THE SMALL PRINT", re.IGNORECASE)
_END_WORDS = re.compile(r"^\s*(?:\*+\s*)?(?:this is the )?end of (?:the |this )?project gutenberg", re.IGNORECASE)
_OURS = re.compile(r"project gutenberg|\be-?texts?\b|\bebooks?\b", re.IGNORECASE)
_BOOKMARKS = re.compile(r"^\s*(?:e-?text|ebook) editor.?s bookmarks", re.IGNORECASE)

_REMARK = 3  # lines between the END in words and the one in stars, at most
_HEAD = 100  # lines in which a file of the nineties names its project, if it does at all
_BOOKMARK_LINES = 200  # the longest list of bookmarks is shorter


def strip_wrapper(text: str, cleaner: Cleaner) -> str:
    """Cut header, footer and the seams of joined parts.

    Raises:
        IntegrityError: there is a header without a START, or no END.
    """
    lines = text.split("\n")
    end = _footer(lines)
    start = _header(lines, end)
    cleaner.cut("header", "\n".join(lines[:start]))
    cleaner.cut("footer", "\n".join(lines[end:]))
    return "\n".join(_without_seams(lines[start:end], cleaner))


def _header(lines: Sequence[str], end: int) -> int:
    """Index of the first line after the header; a START line may wrap over up to three lines."""
    for i, line in enumerate(lines[:end]):
        if _START.match(line):
            for j in range(i, min(i + 3, end)):
                if lines[j].rstrip().endswith("***") and (j > i or line.count("***") > 1):
                    return j + 1
            return i + 1
    for i, line in enumerate(lines[: end // 2]):
        if _SMALL_PRINT_END.match(line):
            return i + 1
    if not any(_OURS.search(line) for line in _head(lines)):
        return 0  # some files of the nineties begin with the book itself
    raise _refused("the file has no START marker", "a Project Gutenberg text has one before the book", "no-start")


def _head(lines: Sequence[str]) -> Sequence[str]:
    """The first lines, up to the first END."""
    return lines[: next((i for i, line in enumerate(lines[:_HEAD]) if _END_WORDS.match(line)), _HEAD)]


def _footer(lines: Sequence[str]) -> int:
    """Index of the last END line, or of the "End of Project Gutenberg's …" line shortly before it.

    The last part of a joined file may say END for itself and once more for the whole.
    """
    ends = [i for i, line in enumerate(lines) if _END.match(line)]
    words = [i for i, line in enumerate(lines) if _END_WORDS.match(line)]
    if not ends and not words:
        raise _refused(
            "the file has no END marker", "it was cut short on the way, or is another kind of file", "truncated"
        )
    last = ends[-1] if ends else words[-1]
    while near := [i for i in words if 0 < last - i <= 8 and _lines_between(lines, i, last) <= _REMARK]:
        last = near[0]
    return last


def _lines_between(lines: Sequence[str], first: int, last: int) -> int:
    """Lines with words between two lines: what stands between two ENDs is a remark or a part of the book."""
    return sum(bool(line.strip()) for line in lines[first + 1 : last])


def _without_seams(lines: list[str], cleaner: Cleaner) -> list[str]:
    """The book without what stands between joined parts: the END of the one, its bookmarks, the head of the next."""
    title = {line.strip() for line in _head(lines) if line.strip()}
    kept: list[str] = []
    at = 0
    for i, line in enumerate(lines):
        if i < at or not _END_WORDS.match(line):
            continue
        first = next((j for j in range(max(at, i - _BOOKMARK_LINES), i) if _BOOKMARKS.match(lines[j])), i)
        after = _seam_end(lines, i, title)
        kept += lines[at:first]
        cleaner.cut("part-seam", "\n".join(lines[first:after]))
        at = after
    return kept + lines[at:]


def _seam_end(lines: Sequence[str], i: int, title: set[str]) -> int:
    """Index after the seam whose END line is line `i`: its paragraph, an inner header, a repeated title page."""
    while i < len(lines) and lines[i].strip():
        i += 1
    for j in range(i, min(i + 400, len(lines))):
        if _START.match(lines[j]) or _SMALL_PRINT_END.match(lines[j]):
            i = j + 1
            break
    after = i
    while i < len(lines) and (not lines[i].strip() or lines[i].strip() in title):
        i += 1
        after = i if lines[i - 1].strip() else after
    return after


def _refused(message: str, why: str, code: str) -> IntegrityError:
    return IntegrityError(
        message, why=why, fix="fetch it again later, or compare with the address in a browser", code=code
    )
