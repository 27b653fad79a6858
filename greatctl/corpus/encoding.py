"""Bytes to text by rule, without guessing.

In this order: a byte order mark; strict UTF-8; the charset that the file itself declares; cp1252 (which every
old "Latin-1" file of Project Gutenberg fits). Line ends become `\\n`, characters are composed (NFC), stray
controls go.
"""

from __future__ import annotations

import codecs
import re
import unicodedata

from ..errors import IntegrityError

__all__ = ["decode", "normalise"]

_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_DECLARED = re.compile(rb"charset(?: encoding)?\s*[:=]\s*[\"']?([\w.:()-]+)", re.IGNORECASE)
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069]")


def decode(data: bytes) -> tuple[str, str]:
    """Decode a file; returns (text, encoding used).

    Raises:
        IntegrityError: no rule fits (names the offset), or the file holds NUL bytes.
    """
    for mark, name in _MARKS:
        if data.startswith(mark):
            return _strict(data, name), name
    nul = data.find(b"\0")
    if nul >= 0:
        raise _undecodable("it has a NUL byte", nul)
    try:
        return data.decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        name = _declared(data)
    if name:
        try:
            return data.decode(name), name
        except UnicodeDecodeError:
            pass
    return _strict(data, "cp1252"), "cp1252"


def normalise(text: str) -> str:
    """NFC with `\\n` line ends and without byte order marks, controls and invisible direction marks."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n").replace("\ufeff", "")
    return unicodedata.normalize("NFC", _CONTROLS.sub("", text.replace("\x85", "\n"))).expandtabs(8)


def _declared(data: bytes) -> str | None:
    """The charset named in the first 8 kB, if Python knows it. Latin-1 is read as cp1252, its practical
    superset.
    """
    found = _DECLARED.search(data[:8192])
    if not found:
        return None
    word = found[1].decode("ascii", "replace").strip("().")
    try:
        name = codecs.lookup(re.sub(r"\(.*", "", word)).name
    except LookupError:
        return None
    return "cp1252" if name == "iso8859-1" else name


def _strict(data: bytes, name: str) -> str:
    try:
        return data.decode(name)
    except UnicodeDecodeError as error:
        raise _undecodable(f"byte {data[error.start]:#04x} is not {name}", error.start) from error


def _undecodable(why: str, offset: int) -> IntegrityError:
    return IntegrityError("the file is not text that can be read", why=f"{why}, at offset {offset:,}", code="not-text")
