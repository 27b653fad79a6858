"""Archive.org: the recognised text of a scanned book.

An item's record names its files with their sizes and hashes; the text is the one of format DjVuTXT, and every
download is held against size, md5 and sha1. Page images, hundreds of megabytes a book, are never asked for. Books
that the library only lends, and items that were taken away, are a person's affair: they end as `manual`, with the
reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import quote

from ..errors import IntegrityError, ManifestError
from ..extend.contracts import Document, Resource
from .clean import clean
from .cuts import Cleaner
from .encoding import decode, normalise
from .manual import ByHand
from .pages import rejoined, without_pages
from .span import own_span

if TYPE_CHECKING:
    from ..manifest import Entry

__all__ = ["Archive"]

HOST = "archive.org"
_ITEM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}")
_HASHES = {"md5": re.compile("[0-9a-f]{32}"), "sha1": re.compile("[0-9a-f]{40}")}
_LENT = ("inlibrary", "printdisabled")
_LARGEST = 64 * 2**20


class Archive:
    """The `archive` kind of source."""

    kind: ClassVar[str] = "archive"
    hosts: ClassVar[frozenset[str]] = frozenset({HOST, "*.us.archive.org"})  # a download is sent on to a data node

    def locate(self, entry: Entry, get: Callable[[str], bytes]) -> Sequence[Resource]:
        """The item's text, with the facts of its record.

        Raises:
            ManifestError: `ia` is no identifier.
            IntegrityError: there is no such item, or its record or text is not what it should be.
            ByHand: the item is lent out or taken away.
        """
        item = entry.ia or ""
        if not _ITEM.fullmatch(item):
            raise ManifestError(
                f"source {entry.id!r}: ia = {item!r} is no identifier of archive.org",
                why="letters, digits, dots, hyphens and underscores are allowed",
                fix="take the last part of the address https://archive.org/details/…",
            )
        record = _record(item, get(f"https://{HOST}/metadata/{item}"))
        row = _text_row(entry, record)
        hashes = {name: str(row[name]).lower() for name in _HASHES if row.get(name)}
        if not hashes or any(not _HASHES[name].fullmatch(value) for name, value in hashes.items()):
            raise _odd(item, f"the record gives no usable hash of {row['name']!r}")
        address = f"https://{HOST}/download/{item}/{quote(str(row['name']))}"
        return [Resource(address, "original.txt", _LARGEST, size=_size(item, row), **hashes)]

    def read(self, entry: Entry, files: Mapping[str, bytes]) -> Document:
        """Decode, take the pages out of the text, keep the author's own span, mend and clean it.

        Raises:
            IntegrityError: a page of HTML, no text, or a span marker that is not there.
        """
        text, encoding = decode(next(iter(files.values())))
        if re.match(r"\s*(?:<!doctype\s+html|<html|<\?xml)", text[:2000], re.IGNORECASE):
            raise _odd(entry.ia or entry.id, "an HTML page came instead of the text")
        cleaner = Cleaner()
        text = own_span(entry, without_pages(normalise(text), cleaner), cleaner)
        kept = clean(rejoined(text, cleaner), cleaner)
        if not kept:
            raise _odd(entry.ia or entry.id, "nothing is left of the text")
        return Document(kept, tuple(cleaner.removed), {"encoding": encoding})


def _record(item: str, data: bytes) -> Mapping[str, Any]:
    """The item's record, if it is one. An unknown item is `{}` with status 200, an overloaded server a page of HTML."""
    try:
        record = json.loads(data)
    except ValueError as error:
        raise _odd(item, f"the answer is no record ({error})", "not-a-record") from None
    if record == {}:
        raise _odd(item, "archive.org knows no such item", "unknown-item")
    if not isinstance(record, dict) or not isinstance(record.get("metadata"), dict):
        raise _odd(item, "the answer is no record of an item", "not-a-record")
    if record.get("is_dark"):
        raise ByHand(f"the item {item!r} of archive.org is dark", why="it was taken away from the public")
    if record["metadata"].get("identifier") != item or not isinstance(record.get("files"), list):
        raise _odd(item, "the record is another item's, or names no files", "not-a-record")
    return record


def _text_row(entry: Entry, record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row of the text among the item's files."""
    item, meta = str(entry.ia), record["metadata"]
    rows = [r for r in record["files"] if isinstance(r, dict) and isinstance(r.get("name"), str)]
    texts = [r for r in rows if r.get("format") == "DjVuTXT"]
    wanted = entry.file or f"{item}_djvu.txt"
    row = next((r for r in rows if r["name"] == wanted), None)
    if row is None and entry.file is None and len(texts) == 1:
        row = texts[0]
    if row is None:
        known = ", ".join(r["name"] for r in texts) or "none"
        raise _odd(item, f"it has no file {wanted!r}; its texts: {known}", "no-text")
    kept = meta.get("collection") or []
    collections = [kept] if isinstance(kept, str) else list(kept)
    lent = [name for name in collections if name in _LENT]
    if _true(row.get("private")) or _true(meta.get("access-restricted-item")) or lent:
        why = f"it is in the collection {lent[0]!r}" if lent else "its text is private"
        raise ByHand(f"the item {item!r} of archive.org is only lent out", why=why)
    return row


def _size(item: str, row: Mapping[str, Any]) -> int:
    """The text's size; the record writes numbers as strings."""
    written = str(row.get("size", ""))
    if not written.isdigit() or not 0 < int(written) <= _LARGEST:
        raise _odd(item, f"the record gives {row['name']!r} the size {written!r}")
    return int(written)


def _true(value: object) -> bool:
    return str(value).casefold() == "true"


def _odd(item: str, why: str, code: str = "not-text") -> IntegrityError:
    return IntegrityError(
        f"the item {item!r} of archive.org cannot be used",
        why=why,
        fix=f"look at https://{HOST}/details/{item}; correct ia and file in sources.toml, or fetch it again later",
        code=code,
    )
