"""Example plugin: a kind of source, `wikisource`, one page of en.wikisource.org.

In sources.toml:

    [[control]]
    id = "lincoln-gettysburg"
    kind = "wikisource"
    title = "Gettysburg Address"
    author = "Abraham Lincoln"
    url = "https://en.wikisource.org/wiki/Gettysburg_Address_(Bliss_copy)"
    options = { revision = 10012345 }    # optional: this very revision, for ever the same bytes

What to notice:
* A source does not download. `locate` says which file is needed, and the host fetches it: politely paced,
  resumed, within the size limit, from the hosts named here and no other.
* `read` is pure: bytes in, document out. No clock, no disk, no network, so the same bytes give the same text
  anywhere.
* Bytes from outside are never trusted. What is not a Wikisource page raises `IntegrityError`, and the run
  says so for this source and goes on with the others.
* Whatever is cut is handed back as `Removed`, and ends up in removed.txt, where a reader can check it.
* Keys of your own go into the entry's `options` table and arrive as `entry.extra`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import quote, unquote, urlsplit

from greatctl import hookimpl
from greatctl.errors import IntegrityError, ManifestError
from greatctl.extend.contracts import Document, Removed, Resource

if TYPE_CHECKING:
    from greatctl.extend.hookspecs import Register
    from greatctl.manifest import Entry

__version__ = "1.0"
HOST = "en.wikisource.org"


class Wikisource:
    """The `wikisource` kind of source."""

    kind: ClassVar[str] = "wikisource"
    hosts: ClassVar[frozenset[str]] = frozenset({HOST})

    def locate(self, entry: Entry, get: Callable[[str], bytes]) -> Sequence[Resource]:
        """The page's body as HTML (`action=render`); `get`, for catalogue records, is not needed.

        Raises:
            ManifestError: the entry's address is no page of en.wikisource.org.
        """
        parts = urlsplit(entry.url or "")
        if parts.hostname != HOST or not parts.path.startswith("/wiki/"):
            raise ManifestError(
                f"source {entry.id!r}: {entry.url!r} is no page of Wikisource",
                why='kind = "wikisource" reads one page',
                fix=f'write  url = "https://{HOST}/wiki/TITLE"',
            )
        title = quote(unquote(parts.path.removeprefix("/wiki/")), safe="/():,_")
        revision = entry.extra.get("revision")
        query = f"title={title}&action=render" + (f"&oldid={revision}" if revision else "")
        return [Resource(f"https://{HOST}/w/index.php?{query}", "original.html", max_bytes=8 * 2**20)]

    def read(self, entry: Entry, files: Mapping[str, bytes]) -> Document:
        """The page's paragraphs.

        Raises:
            IntegrityError: the bytes are not UTF-8, not a Wikisource page, or a page without text.
        """
        try:
            markup = next(iter(files.values())).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _refused(entry, f"byte {error.start} is not UTF-8") from error
        if "mw-parser-output" not in markup:  # the class of every rendered page's outermost element
            raise _refused(entry, "it is not the body of a wiki page")
        page = _Page()
        page.feed(markup)
        page.close()
        page.end_paragraph()
        if not page.paragraphs:
            raise _refused(entry, "it holds no text")
        removed = [Removed(rule, text) for rule, pieces in page.cut if (text := _tidy(" ".join(pieces)))]
        return Document("\n\n".join(page.paragraphs) + "\n", removed)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


class _Page(HTMLParser):
    """Paragraphs of a page. What Wikisource keeps out of its own exports is cut, with all that it holds."""

    BLOCKS = _words("p div h1 h2 h3 h4 h5 h6 li dd dt blockquote td th tr table ul ol dl hr")
    VOID = _words("area base br col embed hr img input link meta source track wbr")
    CUT_TAGS = _words("script style")
    CUT_CLASSES = _words("ws-noexport mw-editsection pagenum reference references noprint")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self.cut: list[tuple[str, list[str]]] = []
        self._words: list[str] = []
        self._cutting: list[str] = []  # the open elements from the one that is cut inwards

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A block ends the paragraph before it; a cut element starts a cut."""
        if self._cutting:
            if tag not in self.VOID:
                self._cutting.append(tag)
            return
        classes = set((dict(attrs).get("class") or "").split()) & self.CUT_CLASSES
        if (classes or tag in self.CUT_TAGS) and tag not in self.VOID:
            self._cutting = [tag]
            self.cut.append((min(classes, default=tag), []))
        elif tag in self.BLOCKS:
            self.end_paragraph()
        elif tag == "br":
            self._words.append("\n")  # a line end that somebody meant: verse

    def handle_endtag(self, tag: str) -> None:
        """An end tag closes every element that was left open inside it."""
        if tag in self._cutting:
            while self._cutting.pop() != tag:
                pass
        elif not self._cutting and tag in self.BLOCKS:
            self.end_paragraph()

    def handle_data(self, data: str) -> None:
        """Text: kept, or added to what is being cut."""
        if self._cutting:
            self.cut[-1][1].append(data)
        else:
            self._words.append(re.sub(r"\s+", " ", data))  # line ends of the page's source mean nothing

    def end_paragraph(self) -> None:
        """Close the paragraph, if it has any words."""
        lines = (_tidy(line) for line in "".join(self._words).split("\n"))
        text = "\n".join(line for line in lines if line)
        self._words = []
        if text:
            self.paragraphs.append(text)


def _tidy(text: str) -> str:
    """NFC, one blank between words, no control characters."""
    kept = "".join(c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", kept)).strip()


def _refused(entry: Entry, why: str) -> IntegrityError:
    return IntegrityError(
        f"what came for source {entry.id!r} is not its text",
        why=why,
        fix="open its address in a browser, or fetch it again",
    )


@hookimpl
def register_sources(register: Register) -> None:
    """The name is the value of `kind` in the manifest."""
    register("wikisource", Wikisource)
