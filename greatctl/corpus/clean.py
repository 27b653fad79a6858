"""From a scanned book's typing to running text.

Rules, each with a name, each keeping what it cut: notes of producers and transcribers, illustrations, sidenotes, page
and footnote marks, rules of stars, emphasis marks. Then hard-wrapped lines are joined, so that a paragraph is one
line: it saves 7 % of the tokens, and a model does not learn where a typist pressed return.

What stays, and why: a footnote's words stay as a paragraph of their own, since nothing in a file tells an author's
note from an editor's, and only its marks go. Lists of contents stay where they stand within the author's span. Indexes
and appendices by others are ended by `text_to` in the manifest, by a person who looked.
"""

from __future__ import annotations

import re

from .cuts import Cleaner
from .encoding import normalise
from .flow import join_lines
from .notes import without_notes

__all__ = ["VERSION", "Cleaner", "clean"]

VERSION = 2
"""Goes into every source's fingerprint: raised whenever a rule changes what is kept."""

_NOTE = r"transcriber(?:'|\u2019)?s?(?:'|\u2019)?\s+notes?"
_BRACKETS = (
    ("illustration", re.compile(r"\[\s*(?:illustrations?\b|picture:)", re.IGNORECASE)),
    ("sidenote", re.compile(r"\[\s*side-?note\b", re.IGNORECASE)),
    ("transcriber", re.compile(rf"\[\s*(?:{_NOTE}|tn:|note of transcriber)|\((?=transcriber:)", re.IGNORECASE)),
)
_CLOSING = {"[": re.compile(r"[\[\]]"), "(": re.compile(r"[()]")}
_FOOTNOTE = re.compile(r"\[\s*footnote\b\s*(?:\d+|[A-Z*]+)?\s*:\s*", re.IGNORECASE)
_INLINE = (
    ("page-mark", re.compile(r"\[(?:[Pp]g|[Pp]age)\.?\s*[\divxlc]+\]|\{(?:[Pp]g?\.?\s*)?[\divxlc]+\}")),
    ("footnote-mark", re.compile(r"\[(?:\d{1,3}|[A-Z]|\*+|\u2020+)\](?=[^\w(]|$)|\(\*\d{1,3}\)")),
    # a star, a dagger or a raised number that hangs on a word; and the same before the note itself
    ("footnote-mark", re.compile(r"(?<=[\w.,;:!?'\"\u2019\u201d)\]])(?:\*{1,5}|[\u2020\u2021]+)(?=\s|--|$)", re.M)),
    ("footnote-mark", re.compile(r"^(?:\*{1,5}|[\u2020\u2021]+) ?(?=[A-Z\"'\u201c\u2018])", re.MULTILINE)),
    (
        "footnote-mark",
        re.compile(
            r"(?:(?<=[^\W\d_]{3})|(?<=[.,;:!?'\"\u2019\u201d)\]]))[\u00b9\u00b2\u00b3\u2070\u2074-\u2079]+(?=\W|$)"
        ),
    ),
    ("footnote-mark", re.compile(r"^[\u00b9\u00b2\u00b3\u2070\u2074-\u2079]+ (?=\S)", re.MULTILINE)),
    ("footnote-mark", re.compile(r"^FOOTNOTES?[:.]?$", re.MULTILINE)),
)
_RULE = re.compile(r"^[ \t]*(?:[*\u00b7.#~=-][ \t]*){3,}$", re.MULTILINE)
# The mark comes first and looks back over itself: so the search skips to the next mark.
_ITALIC = re.compile(r"_(?<![^\W\d_]_)(?=\S)([^_]{1,2000}?)_(?![^\W\d_])")
_STRAY = re.compile(r"_(?:(?<!\w_)(?=\w)|(?<=[\w.,;:!?'\"\u2019\u201d]_)(?!\w))")
_BOLD = re.compile(r"=(?<![\w=]=)(?=\S)([^=]{1,2000}?)(?<=\S)=(?![\w=])")
_STRAY_BOLD = re.compile(r"^=(?=[^\W\d_])|(?<=[\w.,;:!?'\"\u2019\u201d])=$", re.MULTILINE)
_RAISED = re.compile(r"\^(?:\{([^{}\n]{1,20})\}|(?=\w))")


def clean(text: str, cleaner: Cleaner) -> str:
    """Clean a work's own span (any line ends): returns paragraphs, one a line, with a blank line between
    them.
    """
    text = without_notes(normalise(text), cleaner)
    for rule, start in _BRACKETS:
        text = _bracketed(text, rule, start, cleaner)
    text = _each(text, "rule", _RULE, cleaner)
    text = _emphasis(_footnotes(join_lines(text), cleaner), cleaner)
    for rule, mark in _INLINE:
        text = _marks(text, rule, mark, cleaner)
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip(" \t") for line in text.split("\n"))).strip("\n")
    return text + "\n" if text else ""


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
    opening, depth = text[start], 0
    for found in _CLOSING[opening].finditer(text, start, min(len(text), start + reach)):
        depth += 1 if found.group() == opening else -1
        if depth == 0:
            return found.end()
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
    """Take the marks off `_italic_`, `=bold=` and `rais^ed` letters."""
    before = {mark: text.count(mark) for mark in "_=^{}"}
    text = _BOLD.sub(r"\1", _STRAY.sub("", _ITALIC.sub(r"\1", text)))
    text = _RAISED.sub(r"\1", _STRAY_BOLD.sub("", text))
    cleaner.cut("emphasis", "".join(mark * (count - text.count(mark)) for mark, count in before.items()))
    return text
