"""Hostile bytes: read by a rule, or refused with the offset of what breaks the rule; never guessed."""

from __future__ import annotations

import pytest

from greatctl.corpus.encoding import decode, normalise
from greatctl.errors import IntegrityError


@pytest.mark.parametrize(
    ("data", "offset"),
    [
        (b"\xef\xbb\xbfcaf\xe9", 6),  # the mark says UTF-8
        (b"charset: utf-8\ncaf\xe9 now", 18),  # the file says UTF-8
        ("caf\u00e9 and then ".encode() + b"\xe9", 15),  # it is UTF-8 until it breaks
        (b"\xff\xfea\x00b", 4),  # half a character of UTF-16
        ("a\0b".encode("utf-16"), 4),
        ("abc".encode("utf-16-le"), 1),  # UTF-16 without a mark
        (b"ab\x81", 2),  # no letter of cp1252
    ],
    ids=["mark", "declared", "mixed", "odd utf-16", "NUL in utf-16", "unmarked utf-16", "cp1252 hole"],
)
def test_broken_text_is_refused_with_its_offset(data: bytes, offset: int) -> None:
    with pytest.raises(IntegrityError) as error:
        decode(data)
    assert error.value.name == "not-text"
    assert error.value.why.endswith(f"offset {offset}")


@pytest.mark.parametrize(
    "name", ["rot13", "hex", "unicode_escape", "utf-7", "utf-16", "idna", "no-such-charset", "base64"]
)
def test_a_declared_name_that_is_no_charset_of_bytes_is_not_followed(name: str) -> None:
    text, used = decode(f"charset={name}\ncaf".encode() + b"\xe9 \\u0041")
    assert text.endswith("caf\u00e9 \\u0041") and used == "cp1252"


def test_latin_1_read_as_utf_8_somewhere_else_is_left_as_it_is() -> None:
    garbled = "caf\u00c3\u00a9"
    assert normalise(decode(garbled.encode())[0]) == garbled


def test_old_line_ends_direction_marks_and_invisible_characters_do_not_survive() -> None:
    assert normalise("a\r\nb\rc\x0bd\fe\x85f\u2028g") == "a\nb\nc\nd\ne\nf\ng"
    assert normalise("a\u202eb\u2067c\u200bd\u200fe\u2060f\ufeff\x07") == "abcdef"


def test_a_line_of_five_million_characters_is_a_line() -> None:
    text, used = decode(b"word " * 1_000_000)
    assert used == "utf-8" and normalise(text).count("\n") == 0 and len(text) == 5_000_000
