"""Standard Ebooks: which files, whose words, and what is left of markup."""

from __future__ import annotations

from pathlib import Path

import pytest

from greatctl.corpus.standard_ebooks import StandardEbooks
from greatctl.errors import IntegrityError, ManifestError
from greatctl.extend.testing import check_source, sample_entry

MIRROR = Path(__file__).resolve().parents[2] / "shared" / "mirror"
BOOK = "leo-tolstoy_a-confession_aylmer-maude_louise-maude"
needs_mirror = pytest.mark.skipif(not MIRROR.is_dir(), reason="the folder of real texts (../shared/mirror) is not here")
URL = "https://standardebooks.org/standardebooks/a_sample/src/epub/content.opf"

OPF = """<?xml version="1.0" encoding="utf-8"?>
<package xmlns="http://www.idpf.org/2007/opf" version="3.0"><metadata xmlns:dc="http://purl.org/dc/elements/1.1/">
<dc:title>A Sample</dc:title><dc:creator>Nobody</dc:creator><dc:rights>CC0</dc:rights>{more}</metadata>
<manifest><item id="i" href="text/imprint.xhtml" media-type="application/xhtml+xml"/>
<item id="c" href="text/chapter-1.xhtml" media-type="application/xhtml+xml"/>
<item id="n" href="text/endnotes.xhtml" media-type="application/xhtml+xml"/></manifest>
<spine><itemref idref="i"/><itemref idref="c"/><itemref idref="n"/></spine></package>"""
PAGE = """<?xml version="1.0" encoding="utf-8"?>
<html xmlns="http://www.w3.org/1999/xhtml" xmlns:epub="http://www.idpf.org/2007/ops"><head><title>T</title></head>
<body epub:type="bodymatter">{body}</body></html>"""
CHAPTER = """<section epub:type="chapter"><h2 epub:type="ordinal z3998:roman">I</h2>
<p>He <i>rose</i>\u2060\u2014<em>early</em>,<a href="endnotes.xhtml#note-1" epub:type="noteref">1</a> as <abbr>Mr.</abbr>
Day did.</p><blockquote epub:type="z3998:verse"><p><span>The sun was up,</span><br/><span class="i1">the man was up,</span><br/>
<span>the day was long before him.</span></p></blockquote></section>"""
NOTES = """<section epub:type="endnotes"><h2>Endnotes</h2><ol><li id="note-1" epub:type="endnote"><p>At five.
<a href="chapter-1.xhtml#noteref-1" epub:type="backlink">\u21a9</a></p></li><li epub:type="endnote"><p>By the clock.
(Translator\u2019s note.)</p></li></ol></section>"""
IMPRINT = '<section epub:type="imprint"><p>Made by volunteers.</p></section>'


def files(more: str = "", chapter: str = CHAPTER) -> dict[str, bytes]:
    return {
        "original.opf": OPF.format(more=more).encode(),
        "original-00-imprint.xhtml": PAGE.format(body=IMPRINT).encode(),
        "original-01-chapter-1.xhtml": PAGE.format(body=chapter).encode(),
        "original-02-endnotes.xhtml": PAGE.format(body=NOTES).encode(),
    }


def entry(url: str = URL, **fields: str):
    return sample_entry("standard-ebooks", url, **{"title": "A Sample", **fields})


def test_the_package_names_every_text_in_its_order() -> None:
    resources = StandardEbooks().locate(entry(), lambda url: files()["original.opf"])
    assert [r.filename for r in resources] == list(files())
    assert resources[2].url == URL.replace("content.opf", "text/chapter-1.xhtml")


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("https://standardebooks.org/ebooks/a/b/c", "raw.githubusercontent.com/standardebooks/a_b_c/master/src/epub/"),
        ("https://github.com/standardebooks/a_b", "raw.githubusercontent.com/standardebooks/a_b/master/src/epub/"),
        ("https://standardebooks.org/standardebooks/a_b", "standardebooks.org/standardebooks/a_b/src/epub/"),
        (URL, "standardebooks.org/standardebooks/a_sample/src/epub/"),
    ],
)
def test_the_books_page_and_its_repository_lead_to_its_package(url: str, asked: str) -> None:
    seen: list[str] = []
    StandardEbooks().locate(entry(url), lambda u: seen.append(u) or files()["original.opf"])
    assert seen == [f"https://{asked}content.opf"]


def test_another_address_is_a_manifest_error() -> None:
    for url in (
        "https://example.org/content.opf",
        "https://standardebooks.org/",
        "http://standardebooks.org/ebooks/a/b",
    ):
        with pytest.raises(ManifestError):
            StandardEbooks().locate(entry(url), lambda u: b"")


def test_emphasis_leaves_no_sign_verse_keeps_its_lines_and_others_words_are_cut() -> None:
    document = StandardEbooks().read(entry(), files())
    assert document.text == (
        "I\n\nHe rose\u2014early, as Mr. Day did.\n\nThe sun was up,\nthe man was up,\nthe day was long before him.\n\n"
        "Endnotes\n\nAt five.\n"
    )
    cut = {piece.rule: piece.text for piece in document.removed}
    assert cut["publisher"] == "Made by volunteers." and cut["footnote-mark"] == "1"
    assert "By the clock." in cut["annotation"]
    assert document.metadata["rights"] == "CC0" and document.metadata["creators"] == ["Nobody"]


def test_where_an_annotator_is_named_no_note_is_the_authors() -> None:
    annotated = files(more='<meta property="se:role" refines="#t">ann</meta>')
    document = StandardEbooks().read(entry(), annotated)
    assert "At five." not in document.text
    assert "At five." in next(p.text for p in document.removed if p.rule == "annotation")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"original-01-chapter-1.xhtml": PAGE.format(body=CHAPTER).encode()[:-9]}, "truncated"),
        ({"original-01-chapter-1.xhtml": b"<!DOCTYPE html>\n<html><body><p>A robot?</p></body></html>"}, "not-text"),
        ({"original.opf": OPF.format(more="").replace("A Sample", "War and Peace").encode()}, "wrong-book"),
        ({"original.opf": b"<html/>"}, "not-a-book"),
        ({"original.opf": b'<!DOCTYPE x [<!ENTITY a "b">]><x>&a;</x>'}, "not-text"),
    ],
)
def test_what_is_cut_short_or_another_book_is_refused(change: dict[str, bytes], code: str) -> None:
    with pytest.raises(IntegrityError) as e:
        StandardEbooks().read(entry(), {**files(), **change})
    assert e.value.name == code


def test_standard_ebooks_keeps_the_contract_of_sources() -> None:
    check_source(StandardEbooks, entry(), files(), records={URL: files()["original.opf"]})


@needs_mirror
def test_a_real_book_is_read_whole_with_none_of_its_makers_words() -> None:
    base = MIRROR / "standardebooks" / BOOK / "src" / "epub"
    source = entry(f"https://standardebooks.org/standardebooks/{BOOK}/src/epub/content.opf", title="A Confession")
    resources = StandardEbooks().locate(source, lambda url: (base / "content.opf").read_bytes())
    bytes_of = {r.filename: (base / r.url.split("/src/epub/")[1]).read_bytes() for r in resources}
    text = StandardEbooks().read(source, bytes_of).text
    assert text.startswith("I\n\nI was baptized and brought up in the Orthodox Christian faith.")
    assert text.endswith("And I awoke.\n\n1882.\n")
    assert 25_000 < len(text.split()) < 26_500  # the package counts 25,992
    assert not any(word in text for word in ("Standard Ebooks", "Uncopyright", "\u21a9", "note.)", "\u2060", "<"))
