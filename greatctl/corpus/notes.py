"""Whole paragraphs that are nobody's book: credits, transcribers' notes, lists of bookmarks, a printer's line.

They stand at the two ends of a text, so only the ends are searched. A rule that looked everywhere would take the
sentence in which an author says that something was "produced by" something.
"""

from __future__ import annotations

import re

from .cuts import Cleaner

__all__ = ["without_notes"]

_NOTE = r"transcriber(?:'|\u2019)?s?(?:'|\u2019)?\s+notes?"
_NOTE_START = re.compile(rf"[\s\W_]*{_NOTE}\b", re.IGNORECASE)
_NOTE_HEAD = re.compile(rf"[\s\W_]*{_NOTE}[\W_]*$", re.IGNORECASE)
_CORRECTIONS = re.compile(r"[\s\W_]*typographical (?:errors|corrections)\b.*", re.IGNORECASE)
_PRODUCED = re.compile(
    r"\s*(?:produced by|e-?text prepared by|(?-i:Transcribed) (?:from|by)"
    r"|this e-?(?:text|book) was (?:produced|prepared|converted)|credits:"
    r"|note: (?:project gutenberg|images of the original|the original)|this project gutenberg e-?text"
    r"|\[note: there is a short list of bookmarks|the cover of this ebook was)",
    re.IGNORECASE,
)
_MADE_AT = re.compile(
    r"(?:https?://)?\b(?:www\.)?(?:gutenberg\.(?:net|org)|archive\.org|pgdp\.net)\b|internet archive", re.IGNORECASE
)
_BOOKMARKS = re.compile(r"\s*(?:e-?text|ebook) editor.?s bookmarks", re.IGNORECASE)
_END_LINE = re.compile(r"\W*(?:the end|finis|end of (?:the )?(?:\w+ )?volume(?: \w+)?)\W*", re.IGNORECASE)
_PRINTER = re.compile(r"[\W_]*printed (?:by|in|at)\b.{0,120}|.{0,80}\bprinters?, .{0,80}", re.IGNORECASE | re.DOTALL)

_FRONT = 20  # blocks that may hold credits
_FRONT_NOTE = 40  # blocks over which a note that begins there may go on


def without_notes(text: str, cleaner: Cleaner) -> str:
    """Cut credits and transcribers' notes near the start; notes, bookmarks and a printer's line at the end.

    Blocks are what blank lines separate; a gap of more than one blank line ends a note with a heading of its own.
    """
    blocks = re.split(r"\n[ \t]*\n", text)
    kept = _front(blocks, cleaner)
    for i in range(len(kept) - 1, int(len(kept) * 0.9), -1):
        rule = _back_rule(kept[i])
        if rule:
            cleaner.cut(rule, "\n\n".join(kept[i:]))
            kept = kept[:i]
            break
    return "\n\n".join(_last_lines(kept, cleaner))


def _front(blocks: list[str], cleaner: Cleaner) -> list[str]:
    kept: list[str] = []
    heading_cut = False
    for i, block in enumerate(blocks):
        heading_cut = heading_cut and i < _FRONT_NOTE and not block.startswith("\n")
        if i < _FRONT and _NOTE_START.match(block):
            heading_cut = bool(_NOTE_HEAD.match(block))
            cleaner.cut("transcriber", block)
        elif heading_cut:
            cleaner.cut("transcriber", block)
        elif i < _FRONT and (_PRODUCED.match(block) or (len(block) < 1000 and _MADE_AT.search(block))):
            cleaner.cut("producer", block)
        else:
            kept.append(block)
    return kept


def _back_rule(block: str) -> str | None:
    """The rule by which everything from this block on goes."""
    head = next((line for line in block.split("\n") if re.search(r"\w", line)), "")
    if _BOOKMARKS.match(head):
        return "bookmarks"
    return "transcriber" if _NOTE_HEAD.match(head) or _CORRECTIONS.fullmatch(head) else None


def _last_lines(kept: list[str], cleaner: Cleaner) -> list[str]:
    """`kept` without a closing THE END, the printer's line behind it and the rules around them."""
    last = len(kept)
    for i in range(len(kept) - 1, max(len(kept) - 6, 0), -1):
        block = kept[i].strip()
        if not re.search(r"\w", block):
            continue
        rule = "end-line" if _END_LINE.fullmatch(block) else "printer" if _PRINTER.fullmatch(block) else None
        if rule is None:
            break
        cleaner.cut(rule, "\n\n".join(kept[i:last]))
        last = i
    return kept[:last]
