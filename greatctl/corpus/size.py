"""How large the corpus is, in text, tokens and activations, before anything is downloaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from .raw import text_bytes

if TYPE_CHECKING:
    from ..manifest import Entry

__all__ = ["BYTES_PER_TOKEN", "activation_bytes", "file_bytes", "one_line", "text_size", "tokens_of"]

BYTES_PER_TOKEN = 4.5
"""Bytes of paragraph-joined English prose per Llama-3 token (20.3 MB of it gave 4.45 M tokens)."""

_TEXT_SHARE = 0.95  # of a Gutenberg file: the rest is licence
_LICENCE, _CRLF = 19_500, 1.02  # bytes of licence in a Gutenberg file, and what its line ends add


def file_bytes(entry: Entry) -> int | None:
    """Size of the file to be fetched, as far as the manifest lets one guess."""
    known = entry.bytes if entry.bytes is not None else entry.bytes_estimate
    if known is None and entry.tokens_llama3 is not None:
        known = round(entry.tokens_llama3 * BYTES_PER_TOKEN * _CRLF) + _LICENCE
    return known if known is not None else entry.own_bytes


def text_size(entry: Entry, final: Path) -> tuple[int, bool]:
    """(bytes of clean text, whether that was measured on disk); else by the manifest's facts."""
    measured = text_bytes(final)
    if measured is not None:
        return measured, True
    return entry.own_bytes or round((file_bytes(entry) or 0) * _TEXT_SHARE), False


def tokens_of(texts: Iterable[int]) -> int:
    """Estimated Llama-3 tokens of texts of these sizes (bytes)."""
    return round(sum(texts) / BYTES_PER_TOKEN)


def activation_bytes(tokens: int, d_model: int) -> int:
    """Bytes of 16-bit activations of one layer."""
    return tokens * d_model * 2


def one_line(text: int, tokens: int, d_model: int) -> str:
    """The sentence that sets the usual expectation right."""
    gigabytes = activation_bytes(tokens, d_model) / 1e9
    return (
        f"{text / 1e6:,.1f} MB of text, about {tokens / 1e6:,.2f} M tokens; the ~50 GB that people expect is "
        "not text: it is one layer of 16-bit activations of all of it "
        f"(here {gigabytes:,.1f} GB at d_model {d_model})"
    )
