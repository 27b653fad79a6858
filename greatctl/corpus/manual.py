"""Texts that a person brings: letters behind a site's terms, a bought book, a transcript.

greatctl never downloads these. `greatctl fetch --import FILE --source ID` copies the person's file in; from
there it is treated as every other source is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, ClassVar

from ..errors import InputError, IntegrityError
from ..extend.contracts import Document, Resource
from .clean import Cleaner, clean
from .encoding import decode, normalise
from .span import own_span

if TYPE_CHECKING:
    from ..manifest import Entry

__all__ = ["Manual", "html_text"]

_TEXT, _HTML = (".txt", ".text"), (".html", ".htm", ".xhtml")
_LATER = {b"%PDF": "PDF", b"PK\x03\x04": "EPUB and other zip"}


class Manual:
    """The `manual` kind of source: no host, no resource; it only reads."""

    kind: ClassVar[str] = "manual"
    hosts: ClassVar[frozenset[str]] = frozenset()

    def locate(self, entry: Entry, get: Callable[[str], bytes]) -> Sequence[Resource]:
        """Nothing can be downloaded."""
        return ()

    def read(self, entry: Entry, files: Mapping[str, bytes]) -> Document:
        """Read one imported text or HTML file.

        Raises:
            InputError: another kind of file.
            IntegrityError: not decodable, empty, or without its span's markers.
        """
        name, data = next(iter(files.items()))
        suffix = PurePosixPath(name).suffix.lower()
        later = next((word for magic, word in _LATER.items() if data.startswith(magic)), None)
        if later or suffix not in _TEXT + _HTML:
            raise InputError(
                f"{later or suffix or 'this kind of'} files cannot be imported yet",
                why="this version reads plain text and HTML; PDF and EPUB come with a later one",
                fix=f"save it as plain text, then run `greatctl fetch --import FILE.txt --source {entry.id}`",
            )
        text, encoding = decode(data)
        cleaner = Cleaner()
        if suffix in _HTML or re.match(r"\s*(?:<!doctype\s+html|<html)", text, re.IGNORECASE):
            text = html_text(text, cleaner)
        kept = clean(own_span(entry, normalise(text), cleaner), cleaner)
        if not kept:
            raise IntegrityError(
                f"the imported file of {entry.id!r} holds no text", why="nothing is left after cleaning"
            )
        return Document(kept, tuple(cleaner.removed), {"encoding": encoding})


def html_text(markup: str, cleaner: Cleaner) -> str:
    """The running text of an HTML page: one paragraph a block element, scripts and navigation cut."""
    page = _Page(cleaner)
    page.feed(markup)
    page.close()
    return page.text()


class _Page(HTMLParser):
    """Gathers text by paragraphs. Elements of `_SKIP` are cut with all they hold."""

    _BLOCKS = re.compile(
        "address|article|blockquote|body|center|dd|div|dl|dt|figcaption|h[1-6]|hr|li|main|ol|p|pre|section"
        "|table|td|th|tr|ul"
    )
    _SKIP = re.compile("script|style|head|nav|header|footer|aside|form|noscript|template|svg|button|select")

    def __init__(self, cleaner: Cleaner) -> None:
        super().__init__(convert_charrefs=True)
        self._cleaner = cleaner
        self._skipping: list[str] = []
        self._cut: list[str] = []
        self._paragraph: list[str] = []
        self._paragraphs: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A block begins a paragraph; `br` is a line end."""
        if self._SKIP.fullmatch(tag):
            self._skipping.append(tag)
        elif not self._skipping and tag == "br":
            self._paragraph.append("\n")
        elif not self._skipping and self._BLOCKS.fullmatch(tag):
            self._end_paragraph()

    def handle_endtag(self, tag: str) -> None:
        """A block ends its paragraph; an unclosed skipped element ends with the one around it."""
        if tag in self._skipping:
            while self._skipping.pop() != tag:
                pass
        elif not self._skipping and self._BLOCKS.fullmatch(tag):
            self._end_paragraph()

    def handle_data(self, data: str) -> None:
        """Text, with the source's own line breaks taken as blanks."""
        (self._cut if self._skipping else self._paragraph).append(re.sub(r"\s+", " ", data))

    def text(self) -> str:
        """The paragraphs, separated by blank lines."""
        self._end_paragraph()
        self._cleaner.cut("html", " ".join(piece.strip() for piece in self._cut if piece.strip()))
        return "\n\n".join(self._paragraphs)

    def _end_paragraph(self) -> None:
        lines = [re.sub(r" +", " ", line).strip() for line in "".join(self._paragraph).split("\n")]
        if any(lines):
            self._paragraphs.append("\n".join(line for line in lines if line))
        self._paragraph = []
