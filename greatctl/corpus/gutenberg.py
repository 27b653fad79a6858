"""Project Gutenberg: plain text, from the host that programs may use.

www.gutenberg.org is for people; its own rules send programs to the mirrors. So the canonical address is
recorded, and the bytes come from Project Gutenberg's mirror host with the same path. What arrives is trusted
only after it proves to be the right book: a page of HTML with status 200, another book or a truncated file is
refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import urlsplit

from ..errors import IntegrityError, ManifestError
from ..extend.contracts import Document, Resource
from .clean import clean
from .cuts import Cleaner
from .encoding import decode, normalise
from .span import own_span
from .wrapper import strip_wrapper

if TYPE_CHECKING:
    from ..manifest import Entry

__all__ = ["Gutenberg", "strip_wrapper"]

MIRROR = "gutenberg.pglaf.org"
_CANONICAL = ("www.gutenberg.org", "gutenberg.org", "www.gutenberg.net", MIRROR)

_END = re.compile(
    r"^[ \t]*(?:\*{3}[ \t]*|\*+[ \t]*)?(?:this is the )?END OF (?:THE |THIS )?PROJECT GUTENBERG", re.I | re.M
)
_LAST_WORDS = re.compile(
    r"(?:newsletter to hear about\s+new ebooks\.|GUTINDEX\.ALL|\*\*\* END: FULL LICENSE \*\*\*"
    r"|\*END\*?\s*THE SMALL PRINT!.*)\s*\Z",
    re.IGNORECASE,
)
_LONGEST_REMARK = 4
_NUMBER = re.compile(r"\[\s*e-?(?:book|text)\s*#?\s*(\d+)\s*\]", re.IGNORECASE)


class Gutenberg:
    """The `gutenberg` kind of source."""

    kind: ClassVar[str] = "gutenberg"
    hosts: ClassVar[frozenset[str]] = frozenset({MIRROR})

    def locate(self, entry: Entry, get: Callable[[str], bytes]) -> Sequence[Resource]:
        """One text file; `get` is not needed.

        Raises:
            ManifestError: the entry's address is not one of Project Gutenberg's.
        """
        parts = urlsplit(entry.url or "")
        if parts.scheme != "https" or (parts.hostname or "") not in _CANONICAL or not parts.path.strip("/"):
            raise ManifestError(
                f"source {entry.id!r}: {entry.url!r} is not an address of Project Gutenberg",
                why='kind = "gutenberg" takes files of www.gutenberg.org',
                fix='use url = "https://www.gutenberg.org/cache/epub/N/pgN.txt", or another kind',
            )
        return [Resource(url=f"https://{MIRROR}{parts.path}", filename="original.txt", max_bytes=32 * 2**20)]

    def read(self, entry: Entry, files: Mapping[str, bytes]) -> Document:
        """Decode, check that it is the book, keep the author's own span, clean it.

        Raises:
            IntegrityError: HTML, another book, no START or END marker (truncated), or a span marker that is
                not there.
        """
        data = next(iter(files.values()))
        text, encoding = decode(data)
        text = normalise(text)
        _check_book(entry, text)
        cleaner = Cleaner()
        body = strip_wrapper(text, cleaner)
        _check_end(text)
        body = own_span(entry, body, cleaner)
        kept = clean(body, cleaner)
        if not kept:
            raise _refused("nothing is left of the text", "every line was cut by a rule", "empty")
        return Document(kept, tuple(cleaner.removed), {"encoding": encoding})


def _check_end(text: str) -> None:
    """Raise where the licence behind the book breaks off.

    The book itself ends long before the file does, so a file that lost its last bytes on the way still has its END
    marker; only the last words of the licence tell. What follows END in the oldest files is too short to be one.
    """
    tail = text[-200_000:]
    after = [found.end() for found in _END.finditer(tail)]
    behind = tail[after[-1] :] if after else ""
    lines = [line for line in behind.split("\n") if line.strip()]
    if len(lines) > _LONGEST_REMARK and not _LAST_WORDS.search(behind):
        raise _refused("the file breaks off", "the licence at its end does not come to its last words", "truncated")


def _check_book(entry: Entry, text: str) -> None:
    """Raise unless `text` says that it is the entry's book."""
    head = text[:40_000]
    if re.match(r"\s*(?:<!doctype\s+html|<html|<\?xml)", head, re.IGNORECASE):
        title = re.search(r"<title>([^<]*)", head, re.IGNORECASE)
        raise _refused(
            "an HTML page came instead of the text", f"it is titled {title[1]!r}" if title else "", "not-text"
        )
    number = getattr(entry, "pg", None)
    found = _NUMBER.search(head)
    if number is None:
        return
    if found and int(found[1]) != number:
        raise _refused(f"this is book {found[1]}, not {number}", "the file names its own number", "wrong-book")
    if not found and _flat(entry.title)[:24] not in _flat(head):
        raise _refused(
            f"this does not say that it is book {number}", "no number and no title in its head", "wrong-book"
        )


def _flat(text: str) -> str:
    return " ".join(re.sub(r"\W+", " ", text).casefold().split())


def _refused(message: str, why: str, code: str) -> IntegrityError:
    return IntegrityError(
        message, why=why, fix="fetch it again later, or compare with the address in a browser", code=code
    )
