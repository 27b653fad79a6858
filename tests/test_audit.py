"""The audit counts every character of a work, and points at what should not be in it."""

from __future__ import annotations

import pytest

from greatctl.corpus.audit import audit, suspicious_lines
from greatctl.extend.contracts import Removed


def test_bytes_are_counted_by_rule() -> None:
    row = audit(b"HEAD\r\nA word. [1]\r\n", "A word.\n", [Removed("header", "HEAD"), Removed("footnote-mark", "[1]")])
    assert (row.bytes_in, row.kept) == (19, 8)
    assert row.removed_by_rule == {"header": 4, "footnote-mark": 3}
    assert (row.licence, row.unaccounted, row.suspicious) == (0, 0, [])


@pytest.mark.parametrize(("text", "count"), [("A wor.\n", 1), ("A word. More.\n", 5), ("A ward.\n", 2)])
def test_characters_that_vanish_appear_or_change_are_unaccounted(text: str, count: int) -> None:
    assert audit(b"A word.\n", text, []).unaccounted == count


@pytest.mark.parametrize("data", [b"%PDF-1.7 x", b"PK\3\4 x", b"<!DOCTYPE html><p>x</p>", b"a\0b"])
def test_what_is_no_plain_text_is_not_accounted_for(data: bytes) -> None:
    assert audit(data, "x\n", []).unaccounted is None


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("End of the Project Gutenberg EBook", "gutenberg"),
        ("This etext is free.", "etext"),
        ("Produced by Some Volunteer", "credits"),
        ("Transcriber's Note: x", "transcriber"),
        ("Digitized by the Internet Archive", "internet archive"),
        ("See http://example.org", "address"),
    ],
)
def test_lines_of_a_licence_are_told_with_their_number(line: str, kind: str) -> None:
    row = audit(b"", f"One.\n\n{line}\n\nTwo.\n", [])
    assert row.licence >= 1
    assert any(found.startswith(f"3: {kind}: ") for found in row.suspicious)


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("[Illustration: a plan]", "illustration"),
        ("ISBN 0-12", "isbn"),
        ("  37  ", "page number"),
        ("He was <i>there</i>.", "markup"),
        ("a ~~~~~~~ b", "no letters"),
        ("so _he said", "emphasis"),
        ("bro-\nken", "hyphen"),
        ("caf\u00c3\u00a9", "mojibake"),
        ("a\u202eb", "odd character"),
    ],
)
def test_hints_are_listed_and_are_no_licence(line: str, kind: str) -> None:
    row = audit(b"", f"One.\n\n{line}\n", [])
    assert row.licence == 0
    assert [found.split(": ")[1] for found in row.suspicious] == [kind]
    assert row.suspicious[0].startswith("3: ")


def test_an_authors_own_sentence_is_no_credit() -> None:
    text = "The effects produced by heat, and a letter transcribed by General Parker.\n"
    assert [kind for _, kind, _ in suspicious_lines(text)] == ["transcribed"]


def test_a_heading_that_comes_back_page_after_page_is_pointed_at() -> None:
    page = "THE WAY TO WEALTH\n\nSome words of it.\n\n"
    assert [kind for _, kind, _ in suspicious_lines(page * 5)] == ["running head"] * 5
    assert list(suspicious_lines(page * 4)) == []


def test_many_lines_of_one_kind_are_shortened_to_twenty() -> None:
    row = audit(b"", "See http://example.org\n" * 30, [])
    assert row.licence == 30 and len(row.suspicious) == 20
