"""Token windows: documents cut into rows of equal length, and the way back to their characters.

A row is BOS and then `window - 1` consecutive tokens of one stretch of one document; rows never cross documents, nor a
place where text was left out, and the last row of a stretch is padded on the right (that is the whole tail policy:
nothing is dropped, nothing is joined). Every token knows the character at which it ends in the document's clean text,
so that any activation can be shown in its place.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import IntegrityError
from ..store.tables import read_columns, read_rows

__all__ = ["DOCUMENTS", "TOKENIZER", "WINDOWS", "WINDOW_TABLE", "Rows", "TokenStore", "cut"]

WINDOWS, WINDOW_TABLE = "windows.safetensors", "windows.parquet"
DOCUMENTS, TOKENIZER = "documents.parquet", "tokenizer.json"


@dataclass(frozen=True)
class Rows:
    """The windows of one stretch of text: input_ids and token_end int32 [n, window], and int32 [n] the rest.

    `token_end` is where a token ends: a token covers the characters from its left neighbour's end to its own, and the
    BOS stands at the window's first character with no width, as padding stands at its last.
    """

    input_ids: np.ndarray
    token_end: np.ndarray
    length: np.ndarray
    first_token: np.ndarray
    char_start: np.ndarray
    char_end: np.ndarray


def cut(
    ids: np.ndarray,
    ends: np.ndarray,
    n_chars: int,
    *,
    window: int,
    bos: int,
    pad: int,
    first_char: int = 0,
    first_token: int = 0,
) -> Rows:
    """Cut the tokens of one stretch of a document into windows.

    Args:
        ids: token ids int32 [n], no special token among them.
        ends: int32 [n], the character of the stretch at which each token ends.
        n_chars: length of the stretch.
        window: tokens a row, BOS included.
        first_char, first_token: where the stretch begins in its document.
    """
    body = window - 1
    n = -(-len(ids) // body)
    first = np.arange(n, dtype=np.int32) * body
    count = np.minimum(len(ids) - first, body).astype(np.int32)
    char_end = ends[(first + count - 1).astype(np.int64)].astype(np.int32) if n else np.zeros(0, np.int32)
    if n:
        char_end[-1] = n_chars
    char_start = np.concatenate([np.zeros(min(n, 1), np.int32), char_end[:-1]])
    rows = np.full((n, window), pad, dtype=np.int32)
    rows[:, 0] = bos
    rows[:, 1:] = _filled(ids, n * body, pad).reshape(n, body)
    places = np.empty((n, window), dtype=np.int32)
    places[:, 0] = char_start
    places[:, 1:] = _filled(ends, n * body, n_chars).reshape(n, body)
    return Rows(
        rows, places + first_char, count + 1, first + first_token, char_start + first_char, char_end + first_char
    )


def _filled(values: np.ndarray, size: int, filler: int) -> np.ndarray:
    padded = np.full(size, filler, dtype=np.int32)
    padded[: len(values)] = values
    return padded


class TokenStore:
    """A tokens artifact, read. The large tensors are mapped from the disk, not loaded.

    Attributes:
        input_ids: int32 [n_windows, window]; length: int32 [n_windows], tokens including BOS.
        token_end: int32 [n_windows, window], the character of the document at which each token ends.
        documents: one row a document; windows: columns document, first_token, char_start, char_end.
        tokenizer: what tokenizer.json says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            tensors = load_file(path / WINDOWS)
            self.tokenizer: dict = json.loads((path / TOKENIZER).read_bytes())
            self.input_ids: torch.Tensor = tensors["input_ids"]
            self.length: torch.Tensor = tensors["length"]
            self.token_end: torch.Tensor = tensors["token_end"]
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            fix = "run `greatctl tokenize` again: it redoes what is damaged"
            raise IntegrityError(f"{path} cannot be read", why=str(error), fix=fix, where=str(path)) from error

    @cached_property
    def documents(self) -> list[dict]:
        """One row a document, in order."""
        return read_rows(self.path / DOCUMENTS)

    @cached_property
    def windows(self) -> dict[str, list]:
        """Columns document, first_token, char_start, char_end; one value a window."""
        return read_columns(self.path / WINDOW_TABLE)

    @property
    def window(self) -> int:
        """Tokens a row, BOS included."""
        return self.input_ids.shape[1]

    def document_of(self, window: int) -> dict:
        """The row of documents.parquet that window number `window` belongs to."""
        return self.documents[self.windows["document"][window]]

    def span(self, window: int, position: int) -> tuple[int, int]:
        """Characters (from, to) of the document's clean text that the token at `position` of `window` covers."""
        end = int(self.token_end[window, position])
        return (int(self.token_end[window, position - 1]) if position else end), end
