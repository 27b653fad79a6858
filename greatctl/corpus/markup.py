"""Running text out of HTML and XHTML, with every cut noted.

One lenient reader for saved pages, ebooks and Standard Ebooks: the standard library's, because it loses no word. A
content extractor was tried beside it on a whole book in HTML: it drops menus better, but it lost three times as
many of the book's own words and does not say which. Here whatever is left out goes to removed.txt under a rule's
name, and an entry's `text_from` and `text_to` cut what a page has around its text.

A block element is a paragraph, `br` a line end within it, `pre` keeps its lines, the cells of a table row stay on
one line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from html.parser import HTMLParser

from .cuts import Cleaner

__all__ = ["LINE", "furniture", "markup_text", "with_lines"]

LINE = "\ufdd0"
"""A line end that is the author's, as in verse, and must not be joined by cleaning: a character that Unicode keeps free
for a program's own use, so that no text holds it.
"""

Attributes = Mapping[str, str]
CutRule = Callable[[str, Attributes], str | None]
"""(tag, attributes) -> the rule under which an element is cut with all it holds, or None."""

_BLOCKS = re.compile(
    "address|article|blockquote|body|center|dd|div|dl|dt|figcaption|figure|h[1-6]|hr|li|main|ol|p|pre|section|table"
    "|caption|ul"
)
_VOID = re.compile("area|base|br|col|embed|hr|img|input|link|meta|source|track|wbr")
_FURNITURE = re.compile("script|style|head|nav|header|footer|aside|form|noscript|template|svg|button|select")
_ENDS_ITSELF = frozenset(("p", "li", "td", "th", "tr", "dt", "dd", "option"))
_CELL = " " * 4  # wide enough that cleaning knows a table by it
_UNSEEN = re.compile("[\u2060\u200b\u00ad\ufeff\u200a]")  # joiners, hyphenation points, hairs between two quotes


def furniture(tag: str, attributes: Attributes) -> str | None:
    """The rule for a saved web page: what surrounds a text is cut."""
    return "html" if _FURNITURE.fullmatch(tag) else None


def markup_text(
    markup: str, cleaner: Cleaner, *, cut: CutRule = furniture, line: str = "\n", menus: bool = True
) -> str:
    """The text of a page: paragraphs with a blank line between them.

    Args:
        cut: decides which elements are left out.
        line: what a `br` becomes: `\\n`, which cleaning may join, or LINE, which it keeps.
        menus: also cut paragraphs that are nothing but links (rule `links`).
    """
    page = _Page(cleaner, cut, line, menus)
    page.feed(markup)
    page.close()
    return page.text()


def with_lines(text: str) -> str:
    """Cleaned text with the protected line ends as ordinary ones."""
    return re.sub(rf" *{LINE} *", "\n", text)


class _Page(HTMLParser):
    """Gathers paragraphs. `_open` holds the elements that are open, `_cut_from` the depth at which a cut began."""

    def __init__(self, cleaner: Cleaner, cut: CutRule, line: str, menus: bool) -> None:
        super().__init__(convert_charrefs=True)
        self._cleaner, self._cut, self._line, self._menus = cleaner, cut, line, menus
        self._open: list[str] = []
        self._cut_from: int | None = None
        self._dropped: dict[str, list[str]] = {}
        self._rule = ""
        self._pieces: list[str] = []
        self._linked = 0
        self._paragraphs: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A block begins a paragraph, a cut element a cut."""
        if _VOID.fullmatch(tag):
            if self._cut_from is None:
                self._void(tag)
            return
        if self._open and self._open[-1] == tag and tag in _ENDS_ITSELF:
            self._open.pop()
        self._open.append(tag)
        if self._cut_from is not None:
            return
        rule = self._cut(tag, {name: value or "" for name, value in attrs})
        if rule:
            self._cut_from, self._rule = len(self._open) - 1, rule
            self._dropped.setdefault(rule, []).append("")
        elif tag == "tr":
            self._pieces.append("\n")
        elif tag in ("td", "th"):
            self._pieces.append(_CELL)
        elif _BLOCKS.fullmatch(tag):
            self._end_paragraph()

    def handle_endtag(self, tag: str) -> None:
        """An end tag closes what was left open inside its element; a cut ends with the element around it."""
        if tag not in self._open:
            return
        while self._open.pop() != tag:
            pass
        if self._cut_from is None:
            if _BLOCKS.fullmatch(tag):
                self._end_paragraph()
        elif len(self._open) <= self._cut_from:
            self._cut_from = None

    def handle_data(self, data: str) -> None:
        """Text: the source's own line breaks are blanks, except where they are set (`pre`)."""
        text = (data if "pre" in self._open else re.sub(r"\s+", " ", data)).replace(LINE, "")
        if self._cut_from is not None:
            self._dropped[self._rule][-1] += text
            return
        self._pieces.append(text)
        if "a" in self._open:
            self._linked += len(text.strip())

    def text(self) -> str:
        """The paragraphs, separated by blank lines; what was cut is noted."""
        self._end_paragraph()
        for rule, pieces in self._dropped.items():
            self._cleaner.cut(rule, "\n".join(" ".join(piece.split()) for piece in pieces if piece.strip()))
        return "\n\n".join(self._paragraphs)

    def _void(self, tag: str) -> None:
        if tag == "br":
            self._pieces.append(self._line)
        elif tag == "hr":
            self._end_paragraph()

    def _end_paragraph(self) -> None:
        text = _UNSEEN.sub("", "".join(self._pieces)).replace("\u00a0", " ").replace("\u202f", " ")
        lines = [re.sub(r"(?<=\S) {1,3}(?=\S)", " ", line.rstrip()) for line in text.split("\n")]
        indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
        kept = re.sub(r"\n{3,}", "\n\n", "\n".join(line[indent:] for line in lines)).strip("\n")
        linked, self._linked, self._pieces = self._linked, 0, []
        if not kept.strip(" " + LINE):
            return
        letters = len(re.sub(r"\W+", "", kept))
        if self._menus and letters and linked >= 0.9 * letters and not re.search(r"[.!?]['\")\u201d\u2019]*$", kept):
            self._cleaner.cut("links", kept)
        else:
            self._paragraphs.append(kept.strip(LINE))
