"""Texts that people bring: every kind of file, unsafe archives, and the record of where a text is from."""

from __future__ import annotations

import io
import sys
import zipfile
from pathlib import Path

import pytest

from greatctl.corpus.cuts import Cleaner
from greatctl.corpus.epub import epub_texts
from greatctl.corpus.importing import file_format, imported_text
from greatctl.corpus.manual import Manual
from greatctl.corpus.markup import furniture, markup_text
from greatctl.errors import GreatctlError, InputError, IntegrityError
from greatctl.extend.testing import sample_entry

CONTAINER = (
    '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
    '<rootfile full-path="OEBPS/book.opf"/></rootfiles></container>'
)
OPF = (
    '<package xmlns="http://www.idpf.org/2007/opf"><metadata xmlns:dc="http://purl.org/dc/elements/1.1/">'
    "<dc:title>A Book</dc:title><dc:creator>Nobody</dc:creator></metadata><manifest>"
    '<item id="b" href="two.xhtml" media-type="application/xhtml+xml"/>'
    '<item id="a" href="one%20.xhtml" media-type="application/xhtml+xml"/>'
    '<item id="n" href="nav.xhtml" media-type="application/xhtml+xml"/></manifest>'
    '<spine><itemref idref="a"/><itemref idref="b"/><itemref idref="n" linear="no"/></spine></package>'
)
BOOK = {
    "mimetype": "application/epub+zip",
    "META-INF/container.xml": CONTAINER,
    "OEBPS/book.opf": OPF,
    "OEBPS/two.xhtml": "<html><body><p>He slept.&nbsp;</p></body></html>",
    "OEBPS/one .xhtml": "<html><head><title>x</title></head><body><h1>One</h1><p>He rose,<br/>and wrote"
    '<a epub:type="noteref">1</a>.</p></body></html>',
    "OEBPS/nav.xhtml": "<html><body><p>Contents</p></body></html>",
}


def epub(files: dict[str, str], **more: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in {**files, **more}.items():
            how = zipfile.ZIP_STORED if name == "mimetype" else zipfile.ZIP_DEFLATED
            archive.writestr(zipfile.ZipInfo(name), text, how)
    return out.getvalue()


def pdf(*pages: str) -> bytes:
    """A PDF by hand: one line of text per line of each page."""
    objects = [b"<</Type/Catalog/Pages 2 0 R>>", b"", b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"]
    kids = []
    for page in pages:
        lines = "".join(f"({line}) Tj 0 -14 Td " for line in page.split("\n"))
        stream = f"BT /F1 12 Tf 72 720 Td {lines}ET".encode()
        objects.append(b"<</Length %d>>stream\n%s\nendstream" % (len(stream), stream))
        kids.append(len(objects) + 1)
        objects.append(
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents %d 0 R/Resources<</Font<</F1 3 0 R>>>>>>"
            % len(objects)
        )
    objects[1] = b"<</Type/Pages/Count %d/Kids[%s]>>" % (len(kids), b" ".join(b"%d 0 R" % k for k in kids))
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj%s endobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    head = b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    return out + head + table + b"trailer<</Size %d/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % (len(objects) + 1, len(out))


def read(name: str, data: bytes) -> str:
    return Manual().read(sample_entry("manual", where="a shelf"), {name: data}).text


def test_an_epub_is_read_in_the_order_of_its_spine() -> None:
    entry = sample_entry("manual", where="a shelf")
    document = Manual().read(entry, {"original.epub": epub(BOOK)})
    assert document.text == "One\n\nHe rose,\nand wrote.\n\nHe slept.\n"
    assert (document.metadata["title"], document.metadata["creators"]) == ("A Book", ["Nobody"])


@pytest.mark.parametrize("name", ["../evil.xhtml", "/etc/evil", "a/../../evil", "C:evil", "a\\..\\..\\evil", "a//b"])
def test_an_epub_that_reaches_outside_is_refused_whole(name: str, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError) as e:
        epub_texts(epub(BOOK, **{name: "x"}))
    assert e.value.name == "unsafe-archive" and list(tmp_path.iterdir()) == []


def test_links_twins_and_bombs_in_an_epub_are_refused() -> None:
    link = zipfile.ZipInfo("OEBPS/link")
    link.external_attr = 0o120777 << 16
    for row in (link, zipfile.ZipInfo("oebps/TWO.xhtml")):
        out = io.BytesIO(epub(BOOK))
        with zipfile.ZipFile(out, "a") as archive:
            archive.writestr(row, "/etc/passwd")
        with pytest.raises(IntegrityError) as e:
            epub_texts(out.getvalue())
        assert e.value.name == "unsafe-archive"
    bomb = epub(BOOK, **{"OEBPS/two.xhtml": "\0" * (65 << 20)})
    assert len(bomb) < 200_000
    with pytest.raises(IntegrityError) as e:
        epub_texts(bomb)
    assert e.value.name == "unsafe-archive"


def test_a_protected_a_torn_and_an_empty_epub_are_refused() -> None:
    lock = '<e xmlns:x="y"><x:CipherReference URI="OEBPS/two.xhtml"/></e>'
    with pytest.raises(IntegrityError, match="protected"):
        epub_texts(epub(BOOK, **{"META-INF/encryption.xml": lock}))
    assert epub_texts(epub(BOOK, **{"META-INF/encryption.xml": lock.replace("two.xhtml", "font.otf")}))
    for data in (epub(BOOK)[:-40], epub({"mimetype": "application/epub+zip"}), epub({**BOOK, "OEBPS/book.opf": "<x"})):
        with pytest.raises(IntegrityError):
            epub_texts(data)


def test_a_pdf_becomes_paragraphs_without_its_pages() -> None:
    pytest.importorskip("pypdf", reason="the extra `import` is not installed")
    pages = [
        f"A SHOP {n}\nThe carpenter put on his spectacles and read the\nletter twice be-\nfore he said a word, and {w}"
        for n, w in ((1, "then"), (2, "again"), (3, "so"))
    ]
    text = read("original.pdf", pdf(*pages))
    assert "SHOP" not in text and text.count("twice before he said") == 3 and text.count("\n") == 1
    for broken in (pdf(*pages)[:200], pdf(" ")):
        with pytest.raises(IntegrityError):
            read("original.pdf", broken)


def test_without_its_reader_a_pdf_is_answered_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pypdf", None)
    with pytest.raises(InputError) as e:
        read("original.pdf", b"%PDF-1.7\n")
    assert e.value.name == "missing-extra" and 'pip install "greatctl[import]"' in e.value.fix


def test_what_a_file_is_its_first_bytes_say() -> None:
    assert file_format("letter.txt", b"<!DOCTYPE html><html>") == "html"
    assert file_format("letter.html", b"%PDF-1.4") == "pdf"
    assert file_format("book.zip", epub(BOOK)) == "epub"
    assert file_format("a.txt", b"plain") == "text"
    for name, data in (("a.docx", b"PK\3\4"), ("a", b"x"), ("a.exe", b"MZ")):
        with pytest.raises(InputError, match="cannot be imported"):
            file_format(name, data)
    for name in ("a.pdf", "a.epub"):
        with pytest.raises(IntegrityError):
            file_format(name, b"no such thing")


def test_hostile_bytes_of_any_name_end_in_an_error_of_ours() -> None:
    pytest.importorskip("pypdf", reason="the extra `import` is not installed")
    for name in ("x.txt", "x.html", "x.pdf", "x.epub"):
        for data in (b"", b"\0" * 100, b"%PDF-1.4\n" + b"\xff" * 50, b"PK\3\4" + b"\0" * 60, b"<html>"):
            with pytest.raises(GreatctlError):
                read(name, data)


def test_a_saved_page_loses_menus_and_keeps_tables_verse_and_set_lines() -> None:
    page = (
        "<html><body><div><a href=1>Home</a> <a href=2>About us</a></div><p>He rose. <a href=3>And wrote.</a></p>"
        "<table><tr><td>Wheat</td><td>12</td></tr><tr><td>Oats</td><td>7</td></tr></table>"
        "<pre>set as\n  it is</pre><p>a\u00adb<br>c</p><footer>(c)</footer></body></html>"
    )
    cleaner = Cleaner()
    text = markup_text(page, cleaner, cut=furniture)
    assert text == "He rose. And wrote.\n\nWheat    12\nOats    7\n\nset as\n  it is\n\nab\nc"
    assert {piece.rule: piece.text for piece in cleaner.removed} == {"links": "Home About us", "html": "(c)"}


def test_an_unclosed_menu_ends_with_the_element_around_it() -> None:
    text, _ = imported_text("a.html", b"<html><body><div><nav>Menu<p>x</div><p>Words.</body></html>", Cleaner())
    assert text == "Words."
