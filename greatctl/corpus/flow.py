"""Hard-wrapped lines become paragraphs; verse, tables, headings and addresses keep their lines.

The test: in typed prose a line ends where the next word would not have fitted any more. Where that holds for most
lines of a block it is prose; elsewhere a line was ended on purpose.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

__all__ = ["join_lines"]

_GAP = re.compile(r"\S {3,}\S|\|.*\|")
_ATTACHED_DASH = re.compile(r"[^\s-]-{1,4}$")


def join_lines(text: str) -> str:
    """Join hard-wrapped lines; blocks that are not prose keep their lines and their relative indent."""
    blocks = [b for b in (block.strip("\n") for block in re.split(r"\n(?:[ \t]*\n)+", text)) if b.strip()]
    width = _width(blocks)
    return "\n\n".join(_flow(block.split("\n"), width) for block in blocks) + "\n" if blocks else ""


def _width(blocks: Sequence[str]) -> int:
    """The measure the file was typed to: nine in ten lines of its longer blocks fit."""
    lengths = sorted(len(line.rstrip()) for block in blocks for line in block.split("\n")[:-1] if block.count("\n") > 1)
    return lengths[int(0.9 * (len(lengths) - 1))] if lengths else 70


def _flow(lines: Sequence[str], width: int) -> str:
    lines = [line.rstrip() for line in lines if line.strip()]
    if len(lines) > 1 and not _is_table(lines) and _is_prose(lines, width):
        # a dash that hangs on a word goes on in the next line; one that stands alone is a name left blank
        pieces = [lines[0].strip()]
        for before, line in pairwise(lines):
            pieces.append("" if _ATTACHED_DASH.search(before) else " ")
            pieces.append(line.strip())
        return re.sub(r"[ \t]{2,}", " ", "".join(pieces))
    if len(lines) == 1:
        return lines[0].strip() if _is_table(lines) else re.sub(r"[ \t]{2,}", " ", lines[0].strip())
    indent = min(len(line) - len(line.lstrip()) for line in lines)
    return "\n".join(line[indent:] for line in lines)


def _is_table(lines: Sequence[str]) -> bool:
    return sum(bool(_GAP.search(line.strip())) for line in lines) * 2 >= len(lines)


def _is_prose(lines: Sequence[str], width: int) -> bool:
    """Whether a block was wrapped: most lines are full, or they are long and go on in small letters.

    A line is full when the first word of the next one would have gone past the measure of the file (or of the
    block, where a quotation was typed a little narrower).
    """
    longest = max(len(line) for line in lines)
    measure = min(longest, width) if longest >= 0.72 * width else width
    pairs = list(pairwise(lines))
    full = sum(len(a) + 1 + len(b.split()[0]) > measure - 2 for a, b in pairs)
    if full >= 0.6 * len(pairs):
        return True
    going_on = sum(not b.strip()[0].isupper() for _, b in pairs)
    typical = sorted(len(a) for a, _ in pairs)[len(pairs) // 2]
    return typical >= 0.72 * width and going_on >= 0.5 * len(pairs)
