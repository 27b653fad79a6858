"""Texts that a person brings: letters behind a site's terms, a bought book, a transcript.

greatctl never downloads these. `greatctl fetch --import FILE --source ID` copies the person's file in, with where it
came from and under which rights; from there it is treated as every other source is. Any source can be brought this
way, also one that could not be downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from ..errors import InputError, IntegrityError
from ..extend.contracts import Document, Resource
from .clean import clean
from .cuts import Cleaner
from .importing import imported_text
from .markup import with_lines
from .pages import rejoined, without_pages
from .span import own_span

if TYPE_CHECKING:
    from ..manifest import Entry

__all__ = ["ByHand", "Manual", "bring_command", "what_to_bring"]


class ByHand(InputError):
    """A source that greatctl may not download: `why` says the reason; a person has to bring it (exit 5)."""

    code = "by-hand"


class Manual:
    """The `manual` kind of source: no host, no resource; it only reads."""

    kind: ClassVar[str] = "manual"
    hosts: ClassVar[frozenset[str]] = frozenset()

    def locate(self, entry: Entry, get: Callable[[str], bytes]) -> Sequence[Resource]:
        """Nothing can be downloaded."""
        return ()

    def read(self, entry: Entry, files: Mapping[str, bytes]) -> Document:
        """Read one imported file: text, HTML, PDF or EPUB.

        Raises:
            InputError: another kind of file, or one whose reader is not installed.
            IntegrityError: not decodable, damaged, empty, or without its span's markers.
        """
        name, data = next(iter(files.items()))
        cleaner = Cleaner()
        text, facts = imported_text(name, data, cleaner)
        if facts["format"] == "pdf":
            text = rejoined(own_span(entry, without_pages(text, cleaner), cleaner), cleaner)
        else:
            text = own_span(entry, text, cleaner)
        kept = with_lines(clean(text, cleaner))
        if not kept:
            raise IntegrityError(
                f"the imported file of {entry.id!r} holds no text", why="nothing is left after cleaning"
            )
        return Document(kept, tuple(cleaner.removed), facts)


def what_to_bring(entry: Entry, reason: str = "") -> str:
    """What a person has to get, and from where; `reason` says why greatctl could not."""
    what = entry.where or f"Get the text of {entry.title} by {entry.author}"
    return (f"{reason.rstrip('. ')}. " if reason else "") + what.rstrip(". ") + "."


def bring_command(id: str) -> str:
    """The command that brings a person's file in."""
    return f'greatctl fetch --import FILE --source {id} --origin "where you got it" --rights "under which terms"'
