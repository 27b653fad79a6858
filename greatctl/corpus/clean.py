"""From a scanned book's typing to running text.

Rules, each with a name, each keeping what it cut: notes of producers and transcribers, illustrations,
sidenotes, page and footnote marks, rules of stars, emphasis marks. Then hard-wrapped lines are joined, so
that a paragraph is one line: it saves 7 % of the tokens, and a model does not learn where a typist pressed
return. Verse, tables, headings and addresses keep their lines, because a line there is not broken for want of
room.

The joining test: in typed prose a line ends where the next word would not have fitted any more. Where that
holds for most lines of a block it is prose.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ..extend.contracts import Removed
from .encoding import normalise

__all__ = ["VERSION", "Cleaner", "clean"]

VERSION = 1
"""Goes into every source's fingerprint: raised whenever a rule changes what is kept."""

_NOTE = r"transcriber(?:'|\u2019)?s?(?:'|\u2019)?\s+notes?"
_BRACKETS = (
    ("illustration", re.compile(r"\[\s*illustrations?\b", re.IGNORECASE)),
    ("sidenote", re.compile(r"\[\s*side-?note\b", re.IGNORECASE)),
    ("transcriber", re.compile(rf"\[\s*(?:{_NOTE}|tn:|note of transcriber)", re.IGNORECASE)),
)
_PRODUCED = re.compile(
    r"\s*(?:produced by|e-?text prepared by|transcribed (?:from|by)"
    r"|this e-?(?:text|book) was (?:produced|prepared|converted)|credits:"
    r"|note: project gutenberg|this project gutenberg e-?text|the cover of this ebook was|.*https?://www\.gutenberg\.(?:net|org))",
    re.IGNORECASE,
)
_NOTE_START = re.compile(rf"\s*\W*{_NOTE}\b", re.IGNORECASE)
_NOTE_HEAD = re.compile(rf"\s*\W*{_NOTE}\W*$", re.IGNORECASE)
_FOOTNOTE = re.compile(r"\[\s*footnote\b\s*(?:\d+|[A-Z*]+)?\s*:\s*", re.IGNORECASE)
_INLINE = (
    ("page-mark", re.compile(r"\[(?:[Pp]g|[Pp]age)\.?\s*[\divxlc]+\]|\{(?:[Pp]g?\.?\s*)?[\divxlc]+\}")),
    ("footnote-mark", re.compile(r"\[(?:\d{1,3}|[A-Z]|\*+|\u2020+)\](?=[^\w(]|$)")),
)
_RULE = re.compile(r"^[ \t]*(?:[*\u00b7.#~=-][ \t]*){3,}$", re.MULTILINE)
# The mark comes first and looks back over itself: so the search skips to the next mark.
_ITALIC = re.compile(r"_(?<![^\W\d_]_)(?=\S)([^_]{1,2000}?)_(?![^\W\d_])")
_STRAY = re.compile(r"_(?:(?<!\w_)(?=\w)|(?<=[\w.,;:!?'\"\u2019\u201d]_)(?!\w))")
_BOLD = re.compile(r"=(?<![\w=]=)(?=\S)([^=]{1,200}?)(?<=\S)=(?![\w=])")
_GAP = re.compile(r"\S {3,}\S|\|.*\|")


@dataclass
class Cleaner:
    """Collects what the rules cut. `cut(rule, text)` ignores blank pieces."""

    removed: list[Removed] = field(default_factory=list)

    def cut(self, rule: str, text: str) -> None:
        """Note that `rule` cut `text`."""
        if text.strip():
            self.removed.append(Removed(rule, text.strip("\n")))


def clean(text: str, cleaner: Cleaner) -> str:
    """Clean a work's own span (any line ends): returns paragraphs, one a line, with a blank line between
    them.
    """
    text = _notes(normalise(text), cleaner)
    for rule, start in _BRACKETS:
        text = _bracketed(text, rule, start, cleaner)
    text = _each(text, "rule", _RULE, cleaner)
    text = _emphasis(_footnotes(_join(text), cleaner), cleaner)
    for rule, mark in _INLINE:
        text = _marks(text, rule, mark, cleaner)
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)).strip("\n")
    return text + "\n" if text else ""


def _notes(text: str, cleaner: Cleaner) -> str:
    """Cut credits and transcribers' notes near the start, and a transcriber's note in the last tenth (to the
    end).
    """
    blocks = re.split(r"\n[ \t]*\n", text)
    kept: list[str] = []
    heading_cut = False
    for i, block in enumerate(blocks):
        heading_cut = heading_cut and i < 40 and not block.startswith("\n")  # a wider gap ends the note
        if i < 20 and _NOTE_START.match(block):
            heading_cut = bool(_NOTE_HEAD.match(block))
            cleaner.cut("transcriber", block)
        elif heading_cut:
            cleaner.cut("transcriber", block)
        elif i < 20 and _PRODUCED.match(block):
            cleaner.cut("producer", block)
        else:
            kept.append(block)
    for i in range(len(kept) - 1, int(len(kept) * 0.9), -1):
        if _NOTE_HEAD.match(kept[i].strip().split("\n")[0]):
            cleaner.cut("transcriber", "\n\n".join(kept[i:]))
            return "\n\n".join(kept[:i])
    return "\n\n".join(kept)


def _footnotes(text: str, cleaner: Cleaner) -> str:
    """Keep what a footnote says, as a paragraph of its own; cut the `[Footnote 3: ` and `]` around it."""
    out, at = [], 0
    marks: list[str] = []
    for found in _FOOTNOTE.finditer(text):
        if found.start() < at:
            continue
        end = _closing(text, found.start(), 20_000)
        closed = text[end - 1] == "]"
        out += [text[at : found.start()], text[found.end() : end - closed]]
        marks.append(found.group().strip() + "]" * closed)
        at = end
    cleaner.cut("footnote-mark", " ".join(marks))
    return "".join(out) + text[at:]


def _bracketed(text: str, rule: str, start: re.Pattern[str], cleaner: Cleaner) -> str:
    """Cut `[Word … ]` with its nested brackets; one that does not close nearby loses its line only."""
    out, at = [], 0
    for found in start.finditer(text):
        if found.start() < at:
            continue
        end = _closing(text, found.start())
        out.append(text[at : found.start()])
        cleaner.cut(rule, text[found.start() : end])
        at = end
    return "".join(out) + text[at:]


def _closing(text: str, start: int, reach: int = 4_000) -> int:
    """Index after the bracket that closes the one at `start`; the end of its line if none does within
    `reach`.
    """
    depth = 0
    for i in range(start, min(len(text), start + reach)):
        depth += (text[i] == "[") - (text[i] == "]")
        if depth == 0:
            return i + 1
    line_end = text.find("\n", start)
    return len(text) if line_end < 0 else line_end


def _each(text: str, rule: str, pattern: re.Pattern[str], cleaner: Cleaner) -> str:
    """Cut every match of `pattern`; the pieces are noted together."""
    pieces = [m.group().strip() for m in pattern.finditer(text)]
    cleaner.cut(rule, " ".join(pieces))
    return pattern.sub("", text)


def _marks(text: str, rule: str, pattern: re.Pattern[str], cleaner: Cleaner) -> str:
    """Cut marks that stand within a line, each with one blank beside it."""
    out, at = [], 0
    pieces: list[str] = []
    for found in pattern.finditer(text):
        start, end = found.span()
        if start and text[start - 1] == " ":
            start -= 1
        elif not start or text[start - 1] == "\n":
            end += len(text[end : end + 8]) - len(text[end : end + 8].lstrip(" "))
        out.append(text[at:start])
        pieces.append(found.group())
        at = max(at, end)
    cleaner.cut(rule, " ".join(pieces))
    return "".join(out) + text[at:]


def _emphasis(text: str, cleaner: Cleaner) -> str:
    """Take the marks off `_italic_` and `=bold=` words."""
    marks = text.count("_") + text.count("=")
    text = _BOLD.sub(r"\1", _STRAY.sub("", _ITALIC.sub(r"\1", text)))
    gone = marks - text.count("_") - text.count("=")
    cleaner.cut("emphasis", "_" * gone)
    return text


def _join(text: str) -> str:
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
        joined = lines[0].strip()
        for line in lines[1:]:
            word = line.strip()
            joined += word if joined.endswith("-") and not joined.endswith(" -") else " " + word
        return re.sub(r"[ \t]{2,}", " ", joined)
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
