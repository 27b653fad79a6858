"""Standard Ebooks: carefully made XHTML, the cleanest text there is.

A book is a folder with a package document that names its chapters in order; each chapter is one file. Everything
that others added is marked as such in the files and is cut by that mark: imprint, title page, colophon, the notes of
an annotator. Emphasis is markup there and leaves no sign; verse keeps its lines.

`url` names the package document (`…/src/epub/content.opf`), or the book's page (`/ebooks/AUTHOR/TITLE[/TRANSLATOR]`),
whose files lie in the repository of that name. A single chapter (`…/text/chapter-1.xhtml`) can be a work too.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import quote, urljoin, urlsplit

from ..errors import IntegrityError, ManifestError
from ..extend.contracts import Document, Resource
from .clean import clean
from .cuts import Cleaner
from .encoding import decode, normalise
from .markup import LINE, Attributes, markup_text, with_lines
from .opf import Package, package, xml_root
from .span import own_span

if TYPE_CHECKING:
    from ..manifest import Entry

__all__ = ["StandardEbooks"]

HOST, FILES = "standardebooks.org", "raw.githubusercontent.com"
_PACKAGE = "original.opf"
_XHTML = "{http://www.w3.org/1999/xhtml}html"
_OTHERS = frozenset(("titlepage", "halftitlepage", "imprint", "colophon", "copyright-page", "loi", "toc", "landmarks"))
_SMALL, _LARGE = 2 * 2**20, 16 * 2**20
_NOT_HIS = re.compile(
    r"\((?:translator|editor|transcriber|annotator)[\u2019']?s?[\u2019']? notes?\.?\)|\u2014(?:Ed|Tr|Trans)\.", re.I
)


class StandardEbooks:
    """The `standard-ebooks` kind of source."""

    kind: ClassVar[str] = "standard-ebooks"
    hosts: ClassVar[frozenset[str]] = frozenset({HOST, FILES})

    def locate(self, entry: Entry, get: Callable[[str], bytes]) -> Sequence[Resource]:
        """The package document and every text that it lists; one resource where `url` names a single chapter.

        Raises:
            ManifestError: `url` is no address of Standard Ebooks.
            IntegrityError: the package document is none.
        """
        address = _package_address(entry)
        if address.endswith(".xhtml"):
            return [Resource(address, "original.xhtml", _LARGE)]
        book = package(get(address))
        if len({posixpath.basename(name) for name in book.documents}) < len(book.documents):
            raise IntegrityError("the book names a chapter twice", why="two of its files are called alike")
        base = urlsplit(address)
        chapters = []
        for number, name in enumerate(book.documents):
            url = urljoin(address, quote(name))
            if urlsplit(url)[:2] != base[:2]:
                raise IntegrityError("the book names a chapter elsewhere", why=f"{name!r} is not beside it")
            chapters.append(Resource(url, _file_name(number, name), _LARGE))
        return [Resource(address, _PACKAGE, _SMALL), *chapters]

    def read(self, entry: Entry, files: Mapping[str, bytes]) -> Document:
        """The chapters in their order, the author's own span, cleaned.

        Raises:
            IntegrityError: a file that is cut short or is no XHTML, another book, or a span marker that is not there.
        """
        book = package(files[_PACKAGE]) if _PACKAGE in files else None
        names = [_file_name(i, name) for i, name in enumerate(book.documents)] if book else list(files)
        if book:
            _check_title(entry, book)
        cleaner = Cleaner()
        texts = [_chapter(name, files.get(name), book, cleaner) for name in names]
        text = own_span(entry, normalise("\n\n".join(t for t in texts if t)), cleaner)
        kept = with_lines(clean(text, cleaner))
        if not kept:
            raise IntegrityError("nothing is left of the text", why="every line was cut by a rule", code="empty")
        facts = {"creators": list(book.creators), "rights": book.rights, "language": book.language} if book else {}
        return Document(kept, tuple(cleaner.removed), {"encoding": "utf-8", **facts})


def _package_address(entry: Entry) -> str:
    """Where the package document (or the single chapter) of an entry is."""
    parts = urlsplit(entry.url or "")
    words = [word for word in parts.path.split("/") if word]
    host = parts.hostname or ""
    if parts.scheme == "https" and host in (HOST, FILES, "github.com"):
        if parts.path.endswith((".opf", ".xhtml")) and host != "github.com":
            return f"https://{host}{parts.path}"
        if words[-2:] == ["src", "epub"] and host != "github.com":
            return f"https://{host}/{'/'.join(words)}/content.opf"
        if host == HOST and words[:1] == ["ebooks"] and len(words) >= 3:
            return f"https://{FILES}/standardebooks/{'_'.join(words[1:])[:100]}/master/src/epub/content.opf"
        if host == "github.com" and words[:1] == ["standardebooks"] and len(words) == 2:
            return f"https://{FILES}/standardebooks/{words[1]}/master/src/epub/content.opf"
        if host == HOST and words[:1] == ["standardebooks"] and len(words) == 2:
            return f"https://{host}/{'/'.join(words)}/src/epub/content.opf"
    raise ManifestError(
        f"source {entry.id!r}: {entry.url!r} is no book of Standard Ebooks",
        why='kind = "standard-ebooks" takes the book\'s page or its content.opf',
        fix=f'use url = "https://{HOST}/ebooks/AUTHOR/TITLE"',
    )


def _file_name(number: int, name: str) -> str:
    """`original-03-chapter-2.xhtml`: in a folder sorted by name the chapters stand in their order."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", posixpath.basename(name))[:60]
    return f"original-{number:02d}-{plain}" if number < 100 else f"original-z{number:04d}-{plain}"


def _chapter(name: str, data: bytes | None, book: Package | None, cleaner: Cleaner) -> str:
    """One file's text; it must be whole, which well-formed XML shows."""
    if data is None:
        raise IntegrityError(f"the file {name} is not here", why="the package document names it", code="truncated")
    root = xml_root(data)
    if root.tag != _XHTML:
        raise IntegrityError(f"{name} is no chapter of an ebook", why="it is not XHTML", code="not-text")
    kept = Cleaner()
    text = markup_text(decode(data)[0], kept, cut=_Cuts(book), line=LINE, menus=False)
    cleaner.removed += kept.removed
    return _without_notes_of_others(text, cleaner) if "endnotes" in name else text


class _Cuts:
    """Which elements are not the author's, by the marks that Standard Ebooks gives them."""

    def __init__(self, book: Package | None) -> None:
        self._annotated = bool(book and book.annotated)

    def __call__(self, tag: str, attributes: Attributes) -> str | None:
        """The rule for one element."""
        types = set(attributes.get("epub:type", "").split())
        if tag in ("head", "script", "style", "svg"):
            return "html"
        if types & _OTHERS and tag in ("body", "section", "nav"):
            return "publisher"
        if "noteref" in types:
            return "footnote-mark"
        if "backlink" in types:
            return "page-mark"
        return "annotation" if "endnotes" in types and self._annotated else None


def _without_notes_of_others(text: str, cleaner: Cleaner) -> str:
    """Endnotes without those that sign as a translator's or an editor's."""
    kept = []
    for paragraph in text.split("\n\n"):
        if _NOT_HIS.search(paragraph):
            cleaner.cut("annotation", paragraph)
        else:
            kept.append(paragraph)
    return "\n\n".join(kept)


def _check_title(entry: Entry, book: Package) -> None:
    here, wanted = (" ".join(re.sub(r"\W+", " ", t).casefold().split()) for t in (book.title, entry.title))
    if not here or (here not in wanted and wanted not in here):
        raise IntegrityError(
            f"this is {book.title!r}, not {entry.title!r}", why="the book names its own title", code="wrong-book"
        )
