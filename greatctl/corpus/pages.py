"""Text that was taken off printed pages, by character recognition or out of a PDF.

Such text still has the pages in it: a running head with a page number wherever one page ends, numbers alone on a
line, the stamp of the library that scanned it, blank lines in the middle of a paragraph, words broken at line ends.
Two steps, for the author's span is found by whole lines: `without_pages` takes out lines that belong to pages,
`rejoined` then mends what they had torn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import pairwise

from .cuts import Cleaner

__all__ = ["rejoined", "without_pages"]

_STAMP = re.compile(
    r"digiti[sz]ed by|with funding from|https?://(?:www\.)?archive\.org/|internet archive|generated (?:for|on) .*google",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"[-\u2014\[(]?\s*(\d{1,4}|[ivxlc]{1,7})\s*[-\u2014\])]?\.?", re.IGNORECASE)
_HEAD = re.compile(r"(?:(?P<before>\d{1,4})[\s.]+)?(?P<words>\D.*?\D)(?:[\s.]+(?P<after>\d{1,4}))?")
_LONGEST_HEAD, _ALIKE, _TIMES = 80, 0.8, 3
_BROKEN = re.compile(r"(\w+)-[ \t]*\n[ \t]*(?=([^\W\d_]+|[.,;:!?]))")
_ENDS = re.compile(r"[.!?:;][\"')\]\u2019\u201d]*$")


def without_pages(text: str, cleaner: Cleaner) -> str:
    """Take out stamps, noise, page numbers and running heads; doubled blanks become one."""
    lines = [re.sub(r"(?<=\S) {2,}(?=\S)", " ", line.rstrip()) for line in text.split("\n")]
    lines = _stamps(lines, cleaner)
    drop = {i: "running-head" for i in _running_heads(lines)}
    drop |= {i: "page-number" for i in _numbers(lines)}
    kept: list[str] = []
    cut: dict[str, list[str]] = {}
    for i, line in enumerate(lines):
        if i in drop:
            cut.setdefault(drop[i], []).append(line.strip())
        else:
            kept.append(line)
    for rule, pieces in cut.items():
        cleaner.cut(rule, "\n".join(pieces))
    return "\n".join(kept)


def rejoined(text: str, cleaner: Cleaner) -> str:
    """Close the gaps inside paragraphs, put together the words that were broken at a line end, join lines of prose.

    A hyphen stays where the text writes that very word with one elsewhere. Printed prose fills its lines, so a block
    is prose when most of its lines are nearly as long as the page is wide.
    """
    whole = {word.casefold() for word in re.findall(r"\w+-\w+", text)}
    measure = _quantile([len(line) for line in text.split("\n") if line.strip()], 0.9)
    dropped = 0

    def mend(found: re.Match[str]) -> str:
        nonlocal dropped
        first, second = found[1], found[2]
        if f"{first}-{second}".casefold() in whole or second[0].isupper():
            return f"{first}-"
        dropped += 1
        return first

    blocks = []
    for block in _without_gaps(text):
        lines = block.split("\n")
        prose = sum(len(line) >= 0.72 * measure for line in lines[:-1]) >= 0.6 * len(lines[:-1])
        block = _BROKEN.sub(mend, block)
        blocks.append(" ".join(line.strip() for line in block.split("\n")) if prose else block)
    cleaner.cut("hyphen", "-" * dropped)
    return "\n\n".join(blocks)


def _quantile(lengths: Sequence[int], share: float) -> int:
    return sorted(lengths)[int(share * (len(lengths) - 1))] if lengths else 0


def _stamps(lines: Sequence[str], cleaner: Cleaner) -> list[str]:
    """Cut the blocks that name a scanner, and specks (`^1`, `.^`) in front of the first real line."""
    blocks: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            blocks[-1].append(line)
        elif blocks[-1] and blocks[-1][0].strip():
            blocks.append([line])
        else:
            blocks[-1].append(line)
            blocks.append([])
    kept: list[str] = []
    begun = False
    for block in blocks:
        words = " ".join(block)
        if len(block) <= 6 and _STAMP.search(words):
            cleaner.cut("stamp", "\n".join(block))
        elif not begun and block and words.strip() and not re.search(r"[^\W\d_]{2}", words):
            cleaner.cut("noise", "\n".join(block))
        else:
            begun = begun or bool(re.search(r"[^\W\d_]{2}", words))
            kept += block
    return kept


def _running_heads(lines: Sequence[str]) -> list[int]:
    """Lines with a page number at one end, whose words come back at least three times with growing numbers.

    The recognised letters of one head differ a little from page to page, so words that are nearly alike count.
    """
    found: dict[str, list[tuple[int, int]]] = {}
    for i, line in enumerate(lines):
        head = _HEAD.fullmatch(line.strip())
        if head and len(line) <= _LONGEST_HEAD and (head["before"] or head["after"]):
            key = re.sub(r"[\W_]+", " ", head["words"]).strip().casefold()
            found.setdefault(key, []).append((i, int(head["before"] or head["after"])))
    known = [key for key, rows in found.items() if len(rows) >= _TIMES and _growing(rows)]
    heads = [i for key in known for i, _ in found[key]]
    others = [(key, rows) for key, rows in found.items() if key not in known]
    return heads + [i for key, rows in others if any(_alike(key, head) for head in known) for i, _ in rows]


def _growing(rows: Sequence[tuple[int, int]]) -> bool:
    return sum(a[1] < b[1] for a, b in pairwise(rows)) >= 0.8 * (len(rows) - 1)


def _alike(a: str, b: str) -> bool:
    return abs(len(a) - len(b)) <= 3 and SequenceMatcher(None, a, b, autojunk=False).ratio() >= _ALIKE


def _numbers(lines: Sequence[str]) -> list[int]:
    """Numbers that stand alone between blank lines, if there are at least three of them."""
    alone = [
        i
        for i, line in enumerate(lines)
        if _NUMBER.fullmatch(line.strip())
        and not (i and lines[i - 1].strip())
        and not (i + 1 < len(lines) and lines[i + 1].strip())
    ]
    return alone if len(alone) >= _TIMES else []


def _without_gaps(text: str) -> list[str]:
    """The blocks, where a sentence that runs on over blank lines stays in one: the line before is not at an end, and
    is no heading.
    """
    blocks = [block.strip("\n") for block in re.split(r"\n(?:[ \t]*\n)+", text) if block.strip()]
    measure = _quantile([len(line) for block in blocks for line in block.split("\n")], 0.5)
    out: list[str] = []
    for block in blocks:
        last = out[-1].split("\n")[-1].rstrip() if out else ""
        open_end = bool(last) and not _ENDS.search(last) and not last.isupper()
        goes_on = block.lstrip()[:1].islower() or len(last) >= 0.8 * measure
        if open_end and goes_on:
            out[-1] += "\n" + block
        else:
            out.append(block)
    return out
