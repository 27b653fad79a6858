"""Cleaning held against books that a person looked at: first and last line of the author's text, and all between.

The facts were read off the files with an editor and counted with another program: the lines of the author's own text
(first, last), the words in them, and how many of those words stand in captions or in a transcriber's brackets. What
cleaning keeps must be the rest, up to one word in a thousand.
"""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from greatctl import manifest
from greatctl.corpus.audit import audit
from greatctl.corpus.clean import clean
from greatctl.corpus.cuts import Cleaner
from greatctl.corpus.encoding import normalise
from greatctl.corpus.gutenberg import Gutenberg
from greatctl.corpus.wrapper import strip_wrapper
from greatctl.entries import Entry
from greatctl.errors import IntegrityError

MIRROR = Path(__file__).resolve().parents[2] / "shared" / "mirror" / "gutenberg"
needs_mirror = pytest.mark.skipif(not MIRROR.is_dir(), reason="the folder of real texts (../shared/mirror) is not here")


@dataclass(frozen=True)
class Book:
    """Facts of one file: `lines` are pairs of first and last line, `words` in them, `apart` those not the author's."""

    path: str
    pg: int
    encoding: str
    lines: tuple[tuple[int, int], ...]
    words: int
    begins: str
    ends: str
    apart: int = 0
    whole: bool = False  # the file has other span markers than the manifest, so it is read without any


_PEPYS = ((384, 2047), (2092, 3359), (3400, 4439), (4485, 5966), (6002, 7561), (7610, 9122), (9182, 10591))
BOOKS = [
    # the small print of 2002 stands behind the book; one "[Footnote:"
    Book("cache/epub/6312/pg6312.txt", 6312, "cp1252", ((83, 5374),), 58454, "I USES OF GREAT MEN", "by use", 1),
    # two volumes in one; one heading FOOTNOTES
    Book("cache/epub/4367/pg4367.txt", 4367, "cp1252", ((39, 27575),), 284651, "PREFACE Man proposes", "Grant", 1),
    # START line wrapped over two lines: the next five
    Book("cache/epub/12544/pg12544.txt", 12544, "cp1252", ((34, 7898),), 90610, "THE LOVE LETTERS", "angels lives"),
    Book("cache/epub/13471/pg13471.txt", 13471, "cp1252", ((205, 4073),), 32600, "DEAR SISTER Your", "Population", 5),
    Book("cache/epub/26561/pg26561.txt", 26561, "ascii", ((48, 9148),), 103639, "THE STORY OF A", "of my life", 126),
    Book("cache/epub/40236/pg40236.txt", 40236, "cp1252", ((349, 9580),), 88736, "THE WAY TO", "the printer", 12),
    Book("cache/epub/65379/pg65379.txt", 65379, "utf-8-sig", ((31, 1724),), 7671, "SELECTIONS FROM", "OFFICE O", 23),
    # plain ones, and one with a publisher's list behind THE END
    Book("cache/epub/1228/pg1228.txt", 1228, "ascii", ((306, 15847),), 154556, "INTRODUCTION When on", "stripes on"),
    Book("cache/epub/38690/pg38690.txt", 38690, "cp1252", ((190, 10896),), 105636, "CHAPTER I After", "to do this"),
    Book("cache/epub/41954/pg41954.txt", 41954, "cp1252", ((219, 2114),), 17981, "NON CO OPERATION", "M K GANDHI"),
    # joined files of the nineties: an END in the middle; the first has no header at all
    Book(
        "files/4367/old/3musg10.txt", 4367, "cp1252", ((8, 13313), (13316, 30516)), 284656, "PREFACE Man", "Grant", 1
    ),
    Book(
        "files/4125/old/sp10g10.txt", 4125, "cp1252", (*_PEPYS, (10640, 12712)), 130939, "THE DIARY OF", "and to bed",
        whole=True,
    ),
]  # fmt: skip


def words(text: str) -> list[str]:
    """Words as runs of letters; a raised letter (`sh^d`) is one of its word's."""
    return re.findall(r"[^\W\d_]+", text.replace("^", ""))


def entries() -> dict[int, Entry]:
    return {e.pg: e for e in manifest.load(manifest.packaged_path()).entries if e.pg}


@needs_mirror
@pytest.mark.parametrize("book", BOOKS, ids=lambda b: b.path.split("/")[-1])
def test_what_is_kept_is_the_authors_own_span_word_for_word(book: Book) -> None:
    data = (MIRROR / book.path).read_bytes()
    lines = data.decode(book.encoding).replace("\r\n", "\n").split("\n")
    own = words("\n".join("\n".join(lines[a - 1 : b]) for a, b in book.lines))
    assert len(own) == book.words
    assert own[: len(words(book.begins))] == words(book.begins) and own[-len(words(book.ends)) :] == words(book.ends)
    entry = entries()[book.pg]
    if book.whole:
        entry = entry.model_copy(update={"text_from": None, "text_to": None})
    document = Gutenberg().read(entry, {"original.txt": data})
    kept = words(document.text)
    lost, gained = Counter(own) - Counter(kept), Counter(kept) - Counter(own)
    assert gained.total() <= len(own) / 1000, gained.most_common(9)
    assert abs(lost.total() - book.apart) <= len(own) / 1000, lost.most_common(9)
    row = audit(data, document.text, document.removed)
    assert (row.licence, row.unaccounted) == (0, 0), row.suspicious


@needs_mirror
@pytest.mark.parametrize(
    ("name", "pg"),
    [
        ("files/2010/old/adrwn10.txt", 2010),
        ("files/2445/old/lteng10.txt", 2445),
        ("files/2944/old/1srwe10.txt", 2944),
        ("files/5028/old/suart10.txt", 5028),
        ("files/16781/16781-8.txt", 16781),
        ("files/39827/39827.txt", 39827),
        ("files/17976/17976.txt", 17976),
    ],
)
def test_other_files_of_a_book_give_the_same_words(name: str, pg: int) -> None:
    entry = entries()[pg]
    now = Gutenberg().read(entry, {"original.txt": (MIRROR / f"cache/epub/{pg}/pg{pg}.txt").read_bytes()})
    if pg == 2010:  # the old file has no heading to find the span by; it holds nothing but the span
        entry = entry.model_copy(update={"text_from": None})
    data = (MIRROR / name).read_bytes()
    then = Gutenberg().read(entry, {"original.txt": data})
    a, b = Counter(words(now.text)), Counter(words(then.text))
    assert max((a - b).total(), (b - a).total()) <= a.total() / 1000
    row = audit(data, then.text, then.removed)
    assert (row.licence, row.unaccounted) == (0, 0), row.suspicious


@needs_mirror
@pytest.mark.slow
def test_no_work_of_the_mirror_keeps_a_line_of_licence_and_every_character_is_accounted_for() -> None:
    known = entries()
    off = {}
    paths = sorted(MIRROR.glob("cache/epub/*/pg*.txt"))
    for path in paths:
        number = int(path.parent.name)
        entry = known.get(number) or known[1228].model_copy(
            update={"id": f"book-{number}", "pg": number, "text_from": None, "text_to": None}
        )
        data = path.read_bytes()
        document = Gutenberg().read(entry, {"original.txt": data})
        row = audit(data, document.text, document.removed)
        if row.licence or row.unaccounted:
            off[number] = (row.licence, row.unaccounted, row.suspicious)
    assert len(paths) == 57
    assert off == {}


# rules


def cleaned(text: str) -> tuple[str, dict[str, str]]:
    cleaner = Cleaner()
    kept = clean(text, cleaner)
    return kept, {piece.rule: piece.text for piece in cleaner.removed}


def test_a_file_without_any_header_begins_with_the_book_and_one_with_a_broken_header_is_refused() -> None:
    body = "A SHOP\n\nHe opened it.\n"
    end = "\nEnd of The Project Gutenberg Etext of A Shop\n"
    assert strip_wrapper(body + end, Cleaner()).strip() == body.strip()
    with pytest.raises(IntegrityError, match="no START"):
        strip_wrapper("The Project Gutenberg Etext of A Shop\n\n" + body + end, Cleaner())


def test_between_joined_parts_the_end_its_bookmarks_and_the_repeated_title_page_go() -> None:
    title = "THE SHOP\n\nby Nobody\n\n"
    one, two = "The first part of it.\n\n", "The second part of it.\n\n"
    marks = "ETEXT EDITOR'S BOOKMARKS:\n\nThe first part\n\n"
    end = "End of this Project Gutenberg Etext of The Shop, v{}\nby Nobody\n\n"
    cleaner = Cleaner()
    head = "*** START OF THE PROJECT GUTENBERG EBOOK THE SHOP ***\n"
    text = strip_wrapper(head + title + one + marks + end.format(1) + title + two + end.format(2), cleaner)
    assert text.split() == (title + one + two).split()
    seam = next(piece.text for piece in cleaner.removed if piece.rule == "part-seam")
    assert "BOOKMARKS" in seam and "v1" in seam and seam.count("by Nobody") == 2


def test_footnotes_lose_their_marks_and_keep_their_words() -> None:
    body = "He went.[1] She stayed.* They met,\u2020 it is said.\u00b2 All of it.(*3)\n\n"
    text = body + "FOOTNOTES:\n\n[1] To town.\n\n* At home.\n"
    kept, cut = cleaned(text)
    assert kept == "He went. She stayed. They met, it is said. All of it.\n\nTo town.\n\nAt home.\n"
    assert "FOOTNOTES" in cut["footnote-mark"]


def test_bold_over_paragraphs_raised_letters_pictures_and_a_transcribers_aside_are_plain_text() -> None:
    text = "=The portrait\n\nOF A MAN.=\n\n[Picture: a man] If you sh^d write (Transcriber: sic) to M^{rs} Gray.\n"
    kept, cut = cleaned(text)
    assert kept == "The portrait\n\nOF A MAN.\n\nIf you shd write to Mrs Gray.\n"
    assert cut["transcriber"] == "(Transcriber: sic)" and cut["illustration"] == "[Picture: a man]"


def test_what_stands_behind_the_last_word_goes() -> None:
    body = "\n\n".join(f"Paragraph {i} of the shop." for i in range(40))
    box = "+------+\n| Typographical errors corrected in text: |\n| teh |\n+------+"
    for tail, rule in (
        ("THE END.", "end-line"),
        ("_Printed by A. Press, London._", "printer"),
        (box, "transcriber"),
        ("ETEXT EDITOR\u2019S BOOKMARKS\n\nParagraph 3", "bookmarks"),
    ):
        kept, cut = cleaned(f"{body}\n\n{tail}\n")
        assert kept.strip() == body and rule in cut, tail


def test_a_name_left_blank_stays_apart_and_a_dash_stays_on_its_word() -> None:
    line = "The secretary of that embassy wrote at last to his friend Mr. ------\n"
    kept, _ = cleaned(
        line + "of the Board, who had asked for it in the spring of that year, that he--\nand he alone--had sent it.\n"
    )
    assert "Mr. ------ of the Board" in kept and "he--and he alone" in kept


FRAGMENTS = (
    "[Illustration: a [plan]", "]", "[Sidenote: x]", "[Footnote 3: ", "_", "__", "=", "=a=", "^", "{iv}", "[Pg 12]",
    "[12]", "* * *", "*", "\u2020", "\u00b2", "THE END", "FINIS", "Transcriber's Note:", "Produced by X",
    "http://www.pgdp.net",
    "Printed by Y", "\n", "\n\n", "\n\n\n", "  ", "\t", "word", "Word,", "self-", "--", "------", "12", "| a   b |",
    "+---+", "(Transcriber: z)", "\r\n", "\ufeff", "\u202e", "e\u0301", "FOOTNOTES:", "a" * 70,
    "End of Project Gutenberg's",
)  # fmt: skip


def test_no_character_gets_lost_whatever_the_text() -> None:
    chance = random.Random(7)
    for _ in range(400):
        text = "".join(chance.choice(FRAGMENTS) + chance.choice(("", " ", "\n")) for _ in range(chance.randint(0, 80)))
        cleaner = Cleaner()
        kept = clean(text, cleaner)
        assert audit(text.encode(), kept, cleaner.removed).unaccounted == 0, text
        assert kept == "" or (kept.endswith("\n") and "\n\n\n" not in kept)


@pytest.mark.parametrize("unit", [" ", "[", "[Illustration ", "_a ", "=", "* ", "word "])
def test_a_line_of_a_million_characters_takes_time_in_proportion(unit: str) -> None:
    text = "x" + unit * (1_000_000 // len(unit)) + "x"
    began = time.process_time()
    cleaner = Cleaner()
    clean(text, cleaner)
    assert time.process_time() - began < 10  # a rule that looks back over the line again and again takes hours


def test_cleaning_twice_changes_nothing_more() -> None:
    text = "CHAPTER I\n\n" + "He had _a very_ good [1] year in the shop of that town, and more of them\nto come.\n" * 3
    once, _ = cleaned(text)
    assert cleaned(once)[0] == once
    assert normalise(once) == once
