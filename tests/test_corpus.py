"""Reading texts: encodings, wrappers of every decade, the author's own span, what cleaning keeps and cuts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from greatctl import manifest
from greatctl.corpus.clean import Cleaner, clean
from greatctl.corpus.encoding import decode, normalise
from greatctl.corpus.gutenberg import Gutenberg, strip_wrapper
from greatctl.corpus.manual import Manual
from greatctl.corpus.span import own_span
from greatctl.entries import Entry
from greatctl.errors import IntegrityError, ManifestError
from greatctl.extend.testing import check_source, sample_entry

MIRROR = Path(__file__).resolve().parents[2] / "shared" / "mirror"
needs_mirror = pytest.mark.skipif(not MIRROR.is_dir(), reason="the folder of real texts (../shared/mirror) is not here")

PROSE = (
    "It was a bright cold day when the postman came down the lane with a letter\r\n"
    "for the old carpenter, who put on his spectacles and read it twice before\r\n"
    "he said a word to anybody in the shop.\r\n"
)
BOOK = (
    "The Project Gutenberg EBook of A Shop, by Nobody\r\n\r\nTitle: A Shop\r\n\r\n"
    "Release Date: May, 2004 [EBook #77]\r\n\r\n"
    "*** START OF THE PROJECT GUTENBERG EBOOK A SHOP,\r\nWITH A LONG TITLE ***\r\n\r\n"
    "Produced by A. Volunteer\r\n\r\n"
    "CHAPTER I\r\n\r\n"
    + PROSE
    + "\r\nCHAPTER II\r\n\r\n"
    + PROSE
    + "\r\nEnd of Project Gutenberg's A Shop, by Nobody\r\n\r\n"
    "*** END OF THE PROJECT GUTENBERG EBOOK A SHOP ***\r\n\r\nLicence, which says *** START OF nothing\r\n"
)


def entry(**fields: Any) -> Entry:
    return sample_entry("gutenberg", **{"pg": 77, "title": "A Shop", **fields})


def read(text: str, **fields: Any) -> str:
    return Gutenberg().read(entry(**fields), {"original.txt": text.encode()}).text


def cleaned(text: str) -> tuple[str, dict[str, str]]:
    cleaner = Cleaner()
    kept = clean(text, cleaner)
    return kept, {piece.rule: piece.text for piece in cleaner.removed}


# encodings


@pytest.mark.parametrize(
    ("data", "text", "name"),
    [
        ("\ufeffcafé".encode(), "café", "utf-8-sig"),
        ("café".encode("utf-16"), "café", "utf-16"),
        ("café".encode(), "café", "utf-8"),
        (b"Character set encoding: ISO-8859-1\ncaf\xe9 \x93so\x94", "“so”", "cp1252"),
        (b"charset=iso8859-2 \xb3", "ł", "iso8859-2"),
        (b"caf\xe9 \x97 undeclared", "café — undeclared", "cp1252"),
    ],
)
def test_bytes_are_decoded_by_rule(data: bytes, text: str, name: str) -> None:
    decoded, used = decode(data)
    assert decoded.endswith(text) and used == name


def test_bytes_that_are_no_text_are_refused_with_the_offset() -> None:
    with pytest.raises(IntegrityError) as e:
        decode(b"abc\0def")
    assert "offset 3" in e.value.why
    with pytest.raises(IntegrityError) as e:
        decode(b"ab\xff\x81")
    assert "0x81" in e.value.why and "offset 3" in e.value.why


def test_normalising_gives_nfc_unix_lines_and_no_invisible_characters() -> None:
    assert normalise("e\u0301\r\nx\ry\u202ez\ufeff\x07") == "é\nx\nyz"


# wrapper and identity


def test_header_with_a_wrapped_marker_credits_and_footer_are_cut_and_kept_for_the_record() -> None:
    document = Gutenberg().read(entry(), {"original.txt": BOOK.encode()})
    assert document.text.startswith("CHAPTER I\n\nIt was a bright")
    assert "Gutenberg" not in document.text and "Licence" not in document.text
    cut = {piece.rule: piece.text for piece in document.removed}
    assert "WITH A LONG TITLE" in cut["header"] and "Licence" in cut["footer"] and "Volunteer" in cut["producer"]


def test_the_last_end_counts_in_a_joined_file() -> None:
    joined = BOOK.replace(
        "CHAPTER II\r\n", "End of The Project Gutenberg Etext of A Shop, part 1\r\n\r\nCHAPTER II\r\n"
    )
    assert read(joined).count("It was a bright cold day") == 2


def test_small_print_of_the_nineties_ends_the_header_only_when_it_stands_at_the_top() -> None:
    old = (
        "A Shop [Etext #77]\n***START**THE SMALL PRINT!**\nlegal\n"
        "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*\n\n"
        + PROSE
        + "\nEnd of The Project Gutenberg Etext of A Shop\n"
    )
    assert read(old).startswith("It was a bright") and "legal" not in read(old)
    at_the_end = BOOK + "\n*** START: THE SMALL PRINT!\nlegal\n*END THE SMALL PRINT! FOR PUBLIC DOMAIN EBOOKS*\n"
    assert read(at_the_end).count("It was a bright") == 2


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda b: b[: len(b) // 2], "truncated"),
        (lambda b: b.replace("#77", "#78"), "wrong-book"),
        (
            lambda b: b.replace("[EBook #77]", "").replace("Shop", "Ship").replace("SHOP", "SHIP"),
            "wrong-book",
        ),
        (lambda b: b.replace("*** START OF", "***"), "no-start"),
        (lambda b: "<!DOCTYPE html>\n<title>Are you a robot?</title>", "not-text"),
    ],
    ids=["truncated", "another number", "no number, another title", "no start", "a page of html"],
)
def test_what_is_not_the_book_is_refused(change: Any, code: str) -> None:
    with pytest.raises(IntegrityError) as e:
        read(change(BOOK))
    assert e.value.name == code


def test_bytes_come_from_the_mirror_host_with_the_canonical_path() -> None:
    (resource,) = Gutenberg().locate(entry(), lambda url: b"")
    assert resource.url == "https://gutenberg.pglaf.org/cache/epub/77/pg77.txt"
    assert Gutenberg.hosts == {"gutenberg.pglaf.org"}


def test_an_address_outside_project_gutenberg_is_a_manifest_error() -> None:
    with pytest.raises(ManifestError, match="not an address of Project Gutenberg"):
        Gutenberg().locate(entry(url="https://books.example.org/pg77.txt"), lambda url: b"")


# the author's own span


def test_the_span_runs_from_the_nth_marker_up_to_not_with_the_other() -> None:
    kept = read(BOOK, text_from="CHAPTER", text_from_nth=2)
    assert kept.startswith("CHAPTER II") and kept.count("carpenter") == 1
    kept = read(BOOK, text_from="CHAPTER I", text_to="CHAPTER II")
    assert kept.startswith("CHAPTER I\n") and "CHAPTER II" not in kept


@pytest.mark.parametrize("fields", [{"text_from": "PREFACE"}, {"text_to": "CHAPTER", "text_to_nth": 3}])
def test_a_missing_marker_is_an_error_and_never_the_whole_file(fields: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError) as e:
        read(BOOK, **fields)
    assert e.value.name == "marker-missing" and "sources.toml" in e.value.fix


# cleaning


def test_hard_wrapped_prose_becomes_one_line_a_paragraph() -> None:
    kept, _ = cleaned(PROSE + "\r\n" + PROSE)
    line = " ".join(PROSE.split())
    assert kept == f"{line}\n\n{line}\n"


def test_a_word_broken_at_a_hyphen_or_dash_is_joined_without_a_blank() -> None:
    text = PROSE + (
        "\nHe answered at last that he was a man of the old and half-forgotten self-\n"
        "sufficient kind, and that no letter from the city would ever move him--\n"
        "not even this one, which had come with a seal on it.\n"
    )
    kept, _ = cleaned(text)
    assert "self-sufficient" in kept and "move him--not even" in kept


def test_verse_tables_and_addresses_keep_their_lines() -> None:
    verse = (
        "The moving water at its task\n  Of pure ablution round the shore,\n"
        "Nor asks the sailor what we ask\n  And asks no more."
    )
    table = "Wheat      12      40\nBarley      9      35\nOats        7      22"
    address = "To JOHN SMITH,\nPhiladelphia, Pa.\nMay 3, 1787."
    kept, _ = cleaned("\n\n".join([PROSE, verse, table, address, PROSE]))
    for block in (verse, table, address):
        assert block in kept


def test_marks_are_cut_and_words_kept() -> None:
    line = "He had [1] a _very_ good year[2] in {iv} the shop of [Pg 12] 1859 [1859], =he= said.[*]"
    kept, cut = cleaned(line)
    assert kept == "He had a very good year in the shop of 1859 [1859], he said.\n"
    assert cut["footnote-mark"] == "[1] [2] [*]" and cut["page-mark"] == "{iv} [Pg 12]"


def test_illustrations_with_nested_brackets_and_rules_are_cut_and_footnotes_keep_their_words() -> None:
    text = (
        "One.\n\n[Illustration: A plan [see p. 3]\nof the shop.]\n\nTwo.[3]\n\n* * * * *\n\n"
        "[Footnote 3: He meant the old shop [of 1790].]\n\nEnd."
    )
    kept, cut = cleaned(text)
    assert kept == "One.\n\nTwo.\n\nHe meant the old shop [of 1790].\n\nEnd.\n"
    assert cut["illustration"] == "[Illustration: A plan [see p. 3]\nof the shop.]" and cut["rule"].startswith("*")


def test_an_illustration_that_never_closes_costs_its_line_only() -> None:
    kept, _ = cleaned("[Illustration: a plan\n\n" + "word " * 2000)
    assert kept.count("word") == 2000


def test_transcribers_notes_are_cut_at_both_ends() -> None:
    body = "\n\n".join(f"Paragraph {i} of the book stands here." for i in range(60))
    text = f"Transcriber's Note: spelling is kept.\n\n{body}\n\n" + "TRANSCRIBER'S NOTES:\n\nPage 3: teh became the.\n"
    kept, cut = cleaned(text)
    assert kept.startswith("Paragraph 0") and kept.endswith("Paragraph 59 of the book stands here.\n")
    assert "teh" in cut["transcriber"]


# manual imports


def manual(**fields: Any) -> Entry:
    return sample_entry("manual", where="the library", **fields)


def test_an_imported_text_is_cleaned_by_the_same_rules() -> None:
    document = Manual().read(manual(), {"original.txt": ("\ufeff" + PROSE).encode()})
    assert document.text == " ".join(PROSE.split()) + "\n"


def test_an_imported_page_keeps_its_paragraphs_and_loses_scripts_and_navigation() -> None:
    page = (
        b"<html><head><title>x</title><script>var a</script></head><body><nav>Home</nav>"
        b"<h1>To  the\nshareholders</h1>"
        b"<p>We did &amp; we learned.<p>Twice.<br>Thrice.</body></html>"
    )
    document = Manual().read(manual(), {"original.html": page})
    assert document.text == "To the shareholders\n\nWe did & we learned.\n\nTwice.\nThrice.\n"
    assert "Home" in next(p.text for p in document.removed if p.rule == "html")


# contracts and real books


def test_both_kinds_keep_the_contract_of_sources() -> None:
    check_source(Gutenberg, entry(), {"original.txt": BOOK.encode()})
    check_source(Manual, manual(), {"original.txt": PROSE.encode()})


def book(source: Entry) -> dict[str, bytes]:
    return {"original.txt": (MIRROR / f"gutenberg/cache/epub/{source.pg}/pg{source.pg}.txt").read_bytes()}


def _share_of_words(source: Entry, files: dict[str, bytes], kept: str) -> float:
    text = normalise(decode(files["original.txt"])[0])
    span = own_span(source, strip_wrapper(text, Cleaner()), Cleaner())
    return len(kept.split()) / len(span.split())


def _of_characters() -> list[Entry]:
    everything = manifest.load(manifest.packaged_path()).entries
    return [e for e in everything if e.kind == "gutenberg" and e.role == "character"]


def _keep_their_words(sources: Sequence[Entry]) -> None:
    off = {}
    for source in sources:
        files = book(source)
        document = Gutenberg().read(source, files)
        share = len(document.text.encode()) / (source.own_bytes or 1)
        words = _share_of_words(source, files, document.text)
        if not (0.93 < share < 1.01 and 0.96 < words < 1.01) or "Gutenberg" in document.text:
            off[source.id] = (round(share, 3), round(words, 3))
    assert off == {}


@needs_mirror
def test_three_works_keep_their_authors_words_within_a_few_per_cent() -> None:
    short = [
        e for e in _of_characters() if e.id in ("darwin-autobiography", "gandhi-wheel-of-fortune", "emerson-essays-1")
    ]
    assert len(short) == 3
    _keep_their_words(short)


@needs_mirror
@pytest.mark.slow
def test_every_gutenberg_work_of_the_manifest_keeps_its_authors_words_within_a_few_per_cent() -> None:
    sources = _of_characters()
    assert len(sources) == 33
    _keep_their_words(sources)


@needs_mirror
@pytest.mark.parametrize("folder", [pytest.param("cache-2021/4367", marks=pytest.mark.slow), "cache-2026/20203"])
def test_the_files_that_project_gutenberg_serves_today_are_read_as_well(folder: str) -> None:
    number = int(folder.split("/")[1])
    source = next(e for e in manifest.load(manifest.packaged_path()).entries if e.pg == number)
    today = Gutenberg().read(source, {"original.txt": (MIRROR / f"gutenberg/{folder}/pg{number}.txt").read_bytes()})
    then = Gutenberg().read(source, book(source))
    assert abs(len(today.text) - len(then.text)) < 0.01 * len(then.text)
