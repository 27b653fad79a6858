"""The files that people bring: plain text, saved pages, PDF and EPUB, each turned into text to be cleaned.

What a file is, is decided by its first bytes and then by its name, for a browser saves anything under any name. PDF
needs the extra `greatctl[import]`; the rest is read with the standard library.
"""

from __future__ import annotations

import io
import re
from pathlib import PurePosixPath

from ..errors import InputError, IntegrityError
from .cuts import Cleaner
from .encoding import decode, normalise
from .epub import epub_texts
from .markup import LINE, Attributes, furniture, markup_text

__all__ = ["FORMATS", "file_format", "imported_text"]

FORMATS = {
    ".txt": "text", ".text": "text", ".md": "text", ".html": "html", ".htm": "html", ".xhtml": "html",
    ".pdf": "pdf", ".epub": "epub",
}  # fmt: skip
_HTML = re.compile(
    rb"\s*(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html)\b", re.I | re.S
)
_MOST_PAGES = 20_000


def file_format(name: str, data: bytes) -> str:
    """`text`, `html`, `pdf` or `epub`.

    Raises:
        InputError: another kind of file.
    """
    suffix = PurePosixPath(name).suffix.lower()
    if data[:1024].lstrip().startswith(b"%PDF-"):
        return "pdf"
    if data.startswith(b"PK\x03\x04"):
        if suffix == ".epub" or b"application/epub+zip" in data[:200]:
            return "epub"
        raise _unknown(f"{suffix or 'zip'} files")
    found = FORMATS.get(suffix)
    if found in ("pdf", "epub"):
        raise IntegrityError(f"the file is no {found.upper()}", why="it does not begin as one", code="truncated")
    if found is None:
        raise _unknown(f"{suffix or 'nameless'} files")
    return "html" if _HTML.match(data[:4096]) else found


def imported_text(name: str, data: bytes, cleaner: Cleaner) -> tuple[str, dict[str, object]]:
    """(text with `\\n` line ends, facts for the record) of a file.

    Raises:
        InputError: a kind of file that is not read, or one whose reader is not installed.
        IntegrityError: not decodable, damaged, protected, or without any text.
    """
    kind = file_format(name, data)
    if kind == "pdf":
        text, facts = _pdf(data)
    elif kind == "epub":
        text, facts = _epub(data, cleaner)
    else:
        text, encoding = decode(data)
        facts = {"encoding": encoding}
        text = markup_text(text, cleaner) if kind == "html" else text
    return normalise(text), {"format": kind, **facts}


def _epub(data: bytes, cleaner: Cleaner) -> tuple[str, dict[str, object]]:
    book, texts = epub_texts(data)
    pages = [markup_text(decode(t)[0], cleaner, cut=_around, line=LINE, menus=False) for t in texts]
    facts: dict[str, object] = {"title": book.title, "creators": list(book.creators)}
    facts |= {"rights": book.rights} if book.rights else {}
    return "\n\n".join(page for page in pages if page), facts


def _around(tag: str, attributes: Attributes) -> str | None:
    """What an ebook's pages hold besides text: note marks, page numbers, tables of contents."""
    types = attributes.get("epub:type", "").split()
    if tag == "a" and "noteref" in types:
        return "footnote-mark"
    if {"pagebreak", "backlink"} & set(types):
        return "page-mark"
    return None if tag in ("header", "footer", "aside") else furniture(tag, attributes)


def _pdf(data: bytes) -> tuple[str, dict[str, object]]:
    """The text of a PDF's pages, in the order in which the file has them."""
    try:
        import pypdf
    except ImportError:
        raise InputError(
            "PDF files need a package that is not installed",
            why="pypdf reads them; it belongs to the extra `import`",
            fix='pip install "greatctl[import]"   (or save the file as plain text and import that)',
            code="missing-extra",
        ) from None
    try:
        reader = pypdf.PdfReader(io.BytesIO(data), strict=False)
        locked = reader.is_encrypted and not reader.decrypt("")
        pages = [] if locked else [page.extract_text() for page in reader.pages[:_MOST_PAGES]]
    except Exception as error:  # a stranger's PDF makes its parser raise anything
        why = f"{type(error).__name__}: {error}"
        raise IntegrityError(
            "the PDF cannot be read", why=why, fix="save it as plain text", code="truncated"
        ) from error
    if locked:
        raise IntegrityError(
            "the PDF is protected", why="it wants a password", fix="import a copy without one", code="protected"
        )
    if sum(len(page.split()) for page in pages) < 3 * len(pages):
        raise IntegrityError(
            "the PDF holds next to no text",
            why=f"{len(pages)} pages; they are probably pictures of pages",
            fix="import a text version, or run a character recognition over it first",
            code="no-text",
        )
    return "\n\n".join(pages), {"pages": len(pages), "reader": f"pypdf {pypdf.__version__}"}


def _unknown(what: str) -> InputError:
    return InputError(
        f"{what} cannot be imported",
        why="plain text (.txt), saved pages (.html), .pdf and .epub can",
        fix="save the text as one of these",
    )
