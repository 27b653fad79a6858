"""Bytes to text by rule, without guessing.

In this order: a byte order mark; strict UTF-8; the charset that the file itself declares; cp1252 (which every
old "Latin-1" file of Project Gutenberg fits). Bytes that begin as UTF-8 and then break are refused with the offset:
reading them as cp1252 would turn every accent before it into two wrong letters. Line ends become `\\n`, characters are
composed (NFC), stray controls go. What was garbled before it came here is left as it is.
"""

from __future__ import annotations

import codecs
import re
import unicodedata

from ..errors import IntegrityError

__all__ = ["decode", "normalise"]

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark is the beginning of this one
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_DECLARED = re.compile(rb"charset(?: encoding)?\s*[:=]\s*[\"']?([\w.:()-]+)", re.IGNORECASE)
_BYTEWISE = re.compile(r"(?:iso8859-\d+|cp(?:125\d|437|85\d)|koi8-[ru]|mac-roman)")
_CONTROLS = re.compile(
    r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]"
)
_LINE_ENDS = re.compile("\r\n|[\r\x0b\f\x85\u2028\u2029]")


def decode(data: bytes) -> tuple[str, str]:
    """Decode a file; returns (text, encoding used).

    Raises:
        IntegrityError: no rule fits (names the offset), or the file holds NUL bytes.
    """
    for mark, name in _MARKS:
        if data.startswith(mark):
            text = _strict(data, name, len(mark))
            if "\0" in text:
                raise _undecodable("it has a NUL character", len(text[: text.index("\0")].encode(name)))
            return text, name
    nul = data.find(b"\0")
    if nul >= 0:
        raise _undecodable("it has a NUL byte", nul)
    try:
        return data.decode("utf-8"), "utf-8"
    except UnicodeDecodeError as error:
        broken = error
    name = _declared(data)
    if name == "utf-8" or (name is None and not data[: broken.start].isascii()):
        raise _undecodable(f"byte {data[broken.start]:#04x} is not utf-8, as the text before it is", broken.start)
    if name:
        try:
            return data.decode(name), name
        except UnicodeDecodeError:
            pass
    return _strict(data, "cp1252"), "cp1252"


def normalise(text: str) -> str:
    """NFC with `\\n` line ends and without byte order marks, controls and invisible direction marks."""
    return unicodedata.normalize("NFC", _CONTROLS.sub("", _LINE_ENDS.sub("\n", text))).expandtabs(8)


def _declared(data: bytes) -> str | None:
    """The charset named in the first 8 kB, if it is one that a text can be in: UTF-8 or one byte a character.

    Latin-1 is read as cp1252, its practical superset; ASCII says nothing about bytes above 127.
    """
    found = _DECLARED.search(data[:8192])
    if not found:
        return None
    word = found[1].decode("ascii", "replace").strip("().")
    try:
        name = codecs.lookup(re.sub(r"\(.*", "", word)).name
    except LookupError:
        return None
    if name == "utf-8":
        return name
    return ("cp1252" if name == "iso8859-1" else name) if _BYTEWISE.fullmatch(name) else None


def _strict(data: bytes, name: str, mark: int = 0) -> str:
    """`data` without its mark of `mark` bytes, decoded; offsets in errors count from the beginning of the file."""
    try:
        return data.decode(name)
    except UnicodeDecodeError as error:
        offset = error.start + (mark if name == "utf-8-sig" else 0)  # the others count their mark themselves
        raise _undecodable(f"byte {data[offset]:#04x} is not {name}", offset) from error


def _undecodable(why: str, offset: int) -> IntegrityError:
    return IntegrityError("the file is not text that can be read", why=f"{why}, at offset {offset:,}", code="not-text")
