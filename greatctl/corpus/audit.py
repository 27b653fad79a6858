"""What became of a work's bytes: how many were kept, which rule cut the rest, and what still looks strange.

Pure: it sees the original bytes, the clean text and what cleaning cut, and gives numbers and lines to look at. Two
things are told apart. `licence` counts lines that no book of the author can hold (Project Gutenberg's name, a
scanner's stamp): there must be none. The other suspicious lines are hints: a page number alone on a line, a heading
that comes back page after page, left-over markup.

`unaccounted` proves the cleaning: every visible character of the original is in the text or in a removed piece.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..errors import IntegrityError
from ..extend.contracts import Removed
from .encoding import decode, normalise

__all__ = ["LICENCE", "AuditRow", "audit", "suspicious_lines"]

LICENCE: Mapping[str, re.Pattern[str]] = {
    "gutenberg": re.compile(r"project\s+gutenberg|gutenberg[- ]tm|gutenberg\.(?:net|org)", re.IGNORECASE),
    "etext": re.compile(r"\be-?texts?\b", re.IGNORECASE),
    "small print": re.compile(r"\bsmall print\s*!", re.IGNORECASE),
    "transcriber": re.compile(r"\btranscriber\W{0,2}s?\W{0,2}\s+notes?\b|[(\[]transcriber\b", re.IGNORECASE),
    "credits": re.compile(
        r"^[^\w\n]*(?:(?:Produced|Proofread|Digitized|Scanned) by [A-Z]|(?i:e-?text) (?i:prepared|produced) by\b)",
        re.MULTILINE,
    ),
    "internet archive": re.compile(r"internet archive|archive\.org", re.IGNORECASE),
    "address": re.compile(r"https?:|www\.\w|ftp://", re.IGNORECASE),
}
"""Marks of a licence, a header, a footer or a credit, by name; none may be left in a clean text."""

_HINTS: Mapping[str, re.Pattern[str]] = {
    "transcribed": re.compile(r"\btranscribed (?:from|by)\b", re.IGNORECASE),
    "isbn": re.compile(r"\bISBN\b"),
    "illustration": re.compile(r"\[\s*illustration", re.IGNORECASE),
    "sidenote": re.compile(r"\[\s*side-?note", re.IGNORECASE),
    "footnote": re.compile(r"\[\s*footnote|\[\d{1,3}\](?!\w)", re.IGNORECASE),
    "page mark": re.compile(r"\[(?:pg|page)\.? ?[\divxlc]+\]|\{\d+\}", re.IGNORECASE),
    "page number": re.compile(r"^[^\S\n]*(?:\d{1,4}|[ivxlc]{2,7})\.?[^\S\n]*$", re.MULTILINE),
    "markup": re.compile(r"</?[a-z][a-z0-9]*(?:\s[^<>\n]*)?>|&(?:[a-z]{2,6}|#\d+);|\ufffd"),
    "emphasis": re.compile(r"(?<!\w)_\w|\w_(?!\w)|(?<!\S)=\w[^=\n]*=(?!\S)"),
    "no letters": re.compile(r"[^\sA-Za-z0-9\u00c0-\uffff]{6,}"),
    "hyphen": re.compile(r"[a-z]-\n[a-z]"),
    "odd character": re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\ue000-\uf8ff]"),
    "mojibake": re.compile("\u00c3[\u0080-\u00bf]|\u00e2\u20ac"),
}
_HEADING = re.compile(r"[A-Z][A-Z0-9 .,'&:;-]{7,60}")
_HEAD_TIMES = 5  # a heading that stands this often is a running head
_EACH = 20  # lines listed of one kind, at most


@dataclass(frozen=True)
class AuditRow:
    """One work, audited.

    Attributes:
        bytes_in: bytes of the original.
        kept: bytes of the clean text (UTF-8).
        removed_by_rule: rule -> bytes (UTF-8) that it cut.
        licence: lines of licence, header, footer or credit left in the text; to be 0.
        suspicious: `line: kind: excerpt`, a line number counting from 1 (at most 20 of a kind).
        unaccounted: visible characters of the original that are neither kept nor removed, and those that are one of
            them without having been in the original; None where the original is no plain text (HTML, PDF, EPUB).
    """

    bytes_in: int
    kept: int
    removed_by_rule: Mapping[str, int]
    licence: int
    suspicious: list[str]
    unaccounted: int | None


def audit(original: bytes, text: str, removed: Sequence[Removed]) -> AuditRow:
    """Account for one work.

    Args:
        original: the file as it came.
        text: what cleaning kept of it.
        removed: what cleaning cut, with the rules.
    """
    by_rule: dict[str, int] = {}
    for piece in removed:
        by_rule[piece.rule] = by_rule.get(piece.rule, 0) + len(piece.text.encode("utf-8"))
    found = list(suspicious_lines(text))
    return AuditRow(
        len(original),
        len(text.encode("utf-8")),
        by_rule,
        sum(kind in LICENCE for _, kind, _ in found),
        _listed(found),
        _unaccounted(original, text, removed),
    )


def suspicious_lines(text: str) -> Iterator[tuple[int, str, str]]:
    """(line number, kind, excerpt) of everything in a clean text that one should look at, each kind once a line."""
    starts = [0, *(found.end() for found in re.finditer("\n", text))]
    places: list[tuple[int, str, str]] = []
    for kinds in (LICENCE, _HINTS):
        for kind, pattern in kinds.items():
            for found in pattern.finditer(text):
                around = text[max(0, found.start() - 30) : found.end() + 30]
                places.append((found.start(), kind, " ".join(around.split())))
    lines = text.split("\n")
    often = Counter(line.strip() for line in lines if _HEADING.fullmatch(line.strip()))
    for start, line in zip(starts, lines, strict=True):
        if often[line.strip()] >= _HEAD_TIMES:
            places.append((start, "running head", line.strip()))
    places.sort()
    number, told = 0, set()
    for at, kind, excerpt in places:
        while number < len(starts) and starts[number] <= at:
            number += 1
        if (number, kind) not in told:
            told.add((number, kind))
            yield number, kind, excerpt


def _listed(found: Sequence[tuple[int, str, str]]) -> list[str]:
    """The lines in words, a few of each kind."""
    seen: Counter[str] = Counter()
    listed = []
    for number, kind, excerpt in found:
        seen[kind] += 1
        if seen[kind] <= _EACH:
            listed.append(f"{number}: {kind}: {excerpt[:100]}")
    return listed


def _unaccounted(original: bytes, text: str, removed: Sequence[Removed]) -> int | None:
    """Visible characters that appeared or disappeared between the original and its pieces."""
    if original.startswith((b"%PDF", b"PK\x03\x04")):
        return None
    try:
        decoded = normalise(decode(original)[0])
    except IntegrityError:
        return None
    if re.match(r"\s*<(?:!doctype|html|\?xml)", decoded[:1000], re.IGNORECASE):
        return None
    before = _visible(decoded)
    after = _visible(text)
    for piece in removed:
        after.update(_visible(piece.text))
    return sum(((before - after) + (after - before)).values())


def _visible(text: str) -> Counter[str]:
    """How often each character stands in `text`, white space left out."""
    count = Counter(text)
    for character in [c for c in count if c.isspace()]:
        del count[character]
    return count
