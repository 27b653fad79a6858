"""Token windows: documents cut into rows of equal length, and the way back to their characters.

A row is BOS and then `window - 1` consecutive tokens of one document; rows never cross documents, and the
last row of a document is padded on the right. Character spans of a document's rows tile its text without gap
or overlap, so that every activation can be shown in its place. The tokenizer is handed in as a function; this
file knows no model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import save as save_arrays
from safetensors.torch import load_file

from ..errors import IntegrityError
from ..store.files import make_dir, sha256_bytes, write_bytes, write_json
from ..store.tables import read_columns, read_rows, write_table

__all__ = ["EXPORTS", "Rows", "TokenStore", "build", "cut", "export"]

EXPORTS = ("pt", "datasets", "parquet")
_BATCH_CHARS = 4_000_000  # texts tokenized together: enough to keep all cores busy, some hundred MB at most

Encode = Callable[[Sequence[str]], Sequence[tuple[np.ndarray, np.ndarray]]]


@dataclass(frozen=True)
class Rows:
    """The windows of one document: input_ids int32 [n, window], and per window int32 [n] the rest."""

    input_ids: np.ndarray
    length: np.ndarray
    first_token: np.ndarray
    char_start: np.ndarray
    char_end: np.ndarray


def cut(ids: np.ndarray, ends: np.ndarray, n_chars: int, *, window: int, bos: int, pad: int) -> Rows:
    """Cut one document's tokens into windows.

    Args:
        ids: token ids int32 [n], no special token among them.
        ends: int32 [n], the character at which each token ends.
        n_chars: length of the document's text.
        window: tokens a row, BOS included.
    """
    body = window - 1
    n = -(-len(ids) // body)
    rows = np.full((n, window), pad, dtype=np.int32)
    rows[:, 0] = bos
    padded = np.full(n * body, pad, dtype=np.int32)
    padded[: len(ids)] = ids
    rows[:, 1:] = padded.reshape(n, body)
    first = np.arange(n, dtype=np.int32) * body
    count = np.minimum(len(ids) - first, body).astype(np.int32)
    last = (first + count - 1).astype(np.int64)
    char_end = ends[last].astype(np.int32)
    if n:
        char_end[-1] = n_chars
    char_start = np.concatenate([np.zeros(min(n, 1), np.int32), char_end[:-1]])
    return Rows(rows, count + 1, first, char_start, char_end)


def build(
    folder: Path,
    documents: Sequence[Mapping[str, object]],
    texts: Iterable[str],
    encode: Encode,
    *,
    window: int,
    tokenizer: Mapping[str, Any],
    on_document: Callable[[int], None] = lambda done: None,
) -> dict[str, int]:
    """Tokenize `texts` and write the four files of a tokens artifact into `folder`.

    Args:
        documents: one row a text, in the same order, with what is known about it (source_id, author, work,
        …).
        encode: texts -> (ids, ends) each, without special tokens.
        tokenizer: name, path_or_id, bos_id, pad_id, special_ids, vocab_size, sha256.
        on_document: called with the number of documents done.

    Returns: n_windows and n_tokens (BOS and padding not counted).
    """
    bos, pad = int(tokenizer["bos_id"]), int(tokenizer["pad_id"])
    pieces: list[Rows] = []
    table: list[dict[str, Any]] = []
    for batch in _batches(texts):
        for text, (ids, ends) in zip(batch, encode(batch), strict=True):
            rows = cut(ids, ends, len(text), window=window, bos=bos, pad=pad)
            number = len(table)
            counts = {"n_windows": len(rows.length), "n_tokens": len(ids)}
            digest = sha256_bytes(text.encode())
            table.append({"document": number, **documents[number], **counts, "text_sha256": digest})
            pieces.append(rows)
            on_document(len(table))
    _write(folder, pieces, table, window)
    write_json(folder / "tokenizer.json", dict(tokenizer))
    return {
        "n_windows": sum(len(p.length) for p in pieces),
        "n_tokens": sum(int(r["n_tokens"]) for r in table),
    }


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        if batch and sum(map(len, batch)) + len(text) > _BATCH_CHARS:
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch


def _write(folder: Path, pieces: Sequence[Rows], table: Sequence[Mapping[str, object]], window: int) -> None:
    none = np.zeros(0, np.int32)
    ids = np.concatenate([np.zeros((0, window), np.int32), *(p.input_ids for p in pieces)])
    length = np.concatenate([none, *(p.length for p in pieces)])
    write_bytes(folder / "windows.safetensors", save_arrays({"input_ids": ids, "length": length}))
    number = [np.full(len(p.length), i, np.int32) for i, p in enumerate(pieces)]
    columns: dict[str, Any] = {"document": np.concatenate([none, *number])}
    for name in ("first_token", "char_start", "char_end"):
        columns[name] = np.concatenate([none, *(getattr(p, name) for p in pieces)])
    write_table(folder / "windows.parquet", columns)
    write_table(folder / "documents.parquet", {key: [row[key] for row in table] for key in table[0]})


class TokenStore:
    """A tokens artifact, read.

    Attributes:
        input_ids: int32 [n_windows, window]; length: int32 [n_windows], tokens including BOS.
        documents: one row a document; windows: columns document, first_token, char_start, char_end.
        tokenizer: what tokenizer.json says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            tensors = load_file(path / "windows.safetensors")
            self.tokenizer: dict = json.loads((path / "tokenizer.json").read_bytes())
        except (OSError, ValueError, SafetensorError) as error:
            fix = "run `greatctl tokenize` again: it redoes what is damaged"
            raise IntegrityError(f"{path} cannot be read", why=str(error), fix=fix, where=str(path)) from error
        self.input_ids: torch.Tensor = tensors["input_ids"]
        self.length: torch.Tensor = tensors["length"]
        self.documents = read_rows(path / "documents.parquet")
        self.windows = read_columns(path / "windows.parquet")

    @property
    def window(self) -> int:
        """Tokens a row, BOS included."""
        return self.input_ids.shape[1]

    def document_of(self, window: int) -> dict:
        """The row of documents.parquet that window number `window` belongs to."""
        return self.documents[self.windows["document"][window]]


def export(store: TokenStore, folder: Path, forms: Sequence[str], names: Mapping[str, str]) -> list[Path]:
    """Write the windows for other programs, one file (or folder) a document.

    Args:
        forms: of `pt` ({"input_ids": long [n, window] of full windows, "meta": dict}), `parquet` (one row a
        full
            window) and `datasets` (a folder that `datasets.load_from_disk` opens).
        names: source id -> file stem.
    """
    make_dir(folder)
    written = []
    owner = np.asarray(store.windows["document"], dtype=np.int64)
    full = (store.length == store.window).numpy()
    for document in store.documents:
        rows = np.flatnonzero((owner == document["document"]) & full)
        ids = store.input_ids[torch.from_numpy(rows)].long()
        meta = {**document, "window": store.window, "tokenizer": store.tokenizer["name"]}
        for form in forms:
            path = folder / (names[document["source_id"]] + {"pt": ".pt", "parquet": ".parquet"}.get(form, ""))
            _WRITERS[form](path, ids, meta)
            written.append(path)
    return written


def _write_pt(path: Path, ids: torch.Tensor, meta: dict) -> None:
    torch.save({"input_ids": ids, "meta": meta}, path)


def _write_parquet(path: Path, ids: torch.Tensor, meta: dict) -> None:
    write_table(path, {"input_ids": ids.tolist(), **{k: [v] * len(ids) for k, v in meta.items()}})


def _write_datasets(path: Path, ids: torch.Tensor, meta: dict) -> None:
    from datasets import Dataset

    # the fingerprint is random unless given, and it is written to disk
    mark = sha256_bytes(ids.numpy().tobytes())[:16]
    rows = Dataset.from_dict({"input_ids": ids.tolist()})
    rows.info.description = json.dumps(meta, ensure_ascii=False, sort_keys=True)
    Dataset(rows.data, info=rows.info, fingerprint=mark).save_to_disk(str(path))


_WRITERS = {"pt": _write_pt, "parquet": _write_parquet, "datasets": _write_datasets}
