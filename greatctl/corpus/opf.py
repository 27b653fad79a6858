"""The package document of an ebook (OPF): its title, who made it, and its texts in reading order."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from urllib.parse import unquote
from xml.etree import ElementTree

from ..errors import IntegrityError

__all__ = ["Package", "package", "xml_root"]

_OPF, _DC = "{http://www.idpf.org/2007/opf}", "{http://purl.org/dc/elements/1.1/}"
_TEXTS = ("application/xhtml+xml", "text/html", "application/x-dtbook+xml")


@dataclass(frozen=True)
class Package:
    """What a package document says.

    Attributes:
        creators: authors, in its order.
        annotated: somebody is named as annotator, so the notes are not the author's.
        documents: its texts in reading order, relative to the package document, unquoted.
    """

    title: str
    creators: tuple[str, ...]
    rights: str
    language: str
    annotated: bool
    documents: tuple[str, ...]


def package(data: bytes) -> Package:
    """Read a package document.

    Raises:
        IntegrityError: it is none, or it names no text.
    """
    root = xml_root(data)
    items = {i.get("id"): (i.get("href") or "", i.get("media-type")) for i in root.iter(f"{_OPF}item")}
    spine = [items.get(ref.get("idref")) for ref in root.iter(f"{_OPF}itemref") if ref.get("linear") != "no"]
    documents = tuple(posixpath.normpath(unquote(item[0])) for item in spine if item and item[0] and item[1] in _TEXTS)
    if root.tag != f"{_OPF}package" or not documents:
        raise IntegrityError("the book's package document names no text", why="it has no spine", code="not-a-book")
    roles = {(e.text or "").strip() for e in root.iter(f"{_OPF}meta") if (e.get("property") or "").endswith("role")}
    return Package(
        _first(root, "title"),
        tuple((e.text or "").strip() for e in root.iter(f"{_DC}creator")),
        " ".join(_first(root, "rights").split()),
        _first(root, "language"),
        "ann" in roles,
        documents,
    )


def xml_root(data: bytes) -> ElementTree.Element:
    """The root of an XML file that a stranger wrote: no entity of its own is allowed.

    Raises:
        IntegrityError: it is not well-formed, or defines entities.
    """
    if b"<!ENTITY" in data:
        raise IntegrityError("the file defines XML entities", why="a text needs none", code="not-text")
    try:
        return ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        why = f"{error}; it was cut short on the way, or is another kind of file"
        raise IntegrityError("the file is not well-formed XML", why=why, code="truncated") from error


def _first(root: ElementTree.Element, name: str) -> str:
    found = next(root.iter(f"{_DC}{name}"), None)
    return (found.text or "").strip() if found is not None else ""
