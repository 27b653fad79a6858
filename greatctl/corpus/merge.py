"""The parts of a corpus become one tokens artifact, in constant memory.

    windows.safetensors   token_end, input_ids int32 [n_windows, window]; length int32 [n_windows]
    windows.parquet       document, first_token, char_start, char_end
    documents.parquet     what is known of each document, and its counts

Where a limit on tokens is given, windows are left out here, and the counts of the documents follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..store.streamed import Column, write_batches, write_tensors
from .parts import part_files, window_schema
from .windows import DOCUMENTS, WINDOW_TABLE, WINDOWS

__all__ = ["Chosen", "merge"]

_GROUP = 65_536  # rows of a Parquet row group
_TABLE = ("document", "first_token", "char_start", "char_end")

Chosen = Callable[[Sequence[str], Sequence[str], np.ndarray, np.ndarray], np.ndarray]
"""(unit of each document, work of each document, document of each window, tokens of each window) -> bool [n_windows]."""


def merge(folder: Path, parts: Path, n_parts: int, window: int, choose: Chosen | None = None) -> dict[str, int]:
    """Write the three files of `folder` from the parts 0 to `n_parts` - 1.

    Args:
        choose: which windows stay; None = all.

    Returns: n_windows, n_tokens (BOS and padding not counted) and documents.
    """
    source = _Source(parts, n_parts)
    kept = source.kept(choose)
    n = int(kept.sum())

    def pieces(name: str) -> Iterator[np.ndarray]:
        for batch, mask in source.windows(kept):
            column = batch.column(name)
            flat = (column.flatten() if pa.types.is_fixed_size_list(column.type) else column).to_numpy()
            yield flat.reshape(len(mask), -1)[mask] if len(flat) != len(mask) else flat[mask]

    shapes = {"token_end": (n, window), "input_ids": (n, window), "length": (n,)}
    write_tensors(folder / WINDOWS, {name: Column("int32", shape, pieces(name)) for name, shape in shapes.items()})
    schema = window_schema(window)
    write_batches(
        folder / WINDOW_TABLE, pa.schema([schema.field(name) for name in _TABLE]), _grouped(source.table(kept))
    )
    n_tokens = int((source.tokens * kept).sum())
    source.write_documents(folder / DOCUMENTS, kept)
    return {"n_windows": n, "n_tokens": n_tokens, "documents": source.n_documents}


class _Source:
    """The parts, mapped from the disk."""

    def __init__(self, parts: Path, n_parts: int) -> None:
        self._parts = [[pa.memory_map(str(path)) for path in part_files(parts, number)] for number in range(n_parts)]
        owner, tokens = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        self.n_documents = 0
        for windows, documents in self._parts:
            for batch in _batches(windows):
                owner.append(batch.column("document").to_numpy().astype(np.int64) + self.n_documents)
                tokens.append(batch.column("length").to_numpy().astype(np.int64) - 1)
            self.n_documents += sum(batch.num_rows for batch in _batches(documents))
        self.owner, self.tokens = np.concatenate(owner), np.concatenate(tokens)

    def kept(self, choose: Chosen | None) -> np.ndarray:
        """[n_windows] bool."""
        if choose is None:
            return np.ones(len(self.owner), dtype=bool)
        columns: dict[str, list[str]] = {"unit": [], "source_id": []}
        for _, documents in self._parts:
            for batch in _batches(documents):
                for name, values in columns.items():
                    values += batch.column(name).to_pylist()
        return choose(columns["unit"], columns["source_id"], self.owner, self.tokens)

    def windows(self, kept: np.ndarray) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
        """Batches of windows, each with the mask of those that stay."""
        at = 0
        for windows, _ in self._parts:
            for batch in _batches(windows):
                yield batch, kept[at : at + batch.num_rows]
                at += batch.num_rows

    def table(self, kept: np.ndarray) -> Iterator[pa.RecordBatch]:
        """The columns of windows.parquet; documents are numbered through."""
        at = 0
        for batch, mask in self.windows(kept):
            owner = pa.array(self.owner[at : at + batch.num_rows].astype(np.int32))
            columns = [owner, *(batch.column(name) for name in _TABLE[1:])]
            yield pa.record_batch(columns, names=list(_TABLE)).filter(pa.array(mask))
            at += batch.num_rows

    def write_documents(self, path: Path, kept: np.ndarray) -> None:
        """documents.parquet, numbered, with the counts of the windows that stay."""
        n_windows = np.bincount(self.owner[kept], minlength=self.n_documents)
        n_tokens = np.bincount(self.owner[kept], weights=self.tokens[kept], minlength=self.n_documents)

        def numbered() -> Iterator[pa.RecordBatch]:
            at = 0
            for _, documents in self._parts:
                for batch in _batches(documents):
                    here = np.arange(at, at + batch.num_rows)
                    counts = {
                        "n_windows": n_windows[here],
                        "n_tokens": n_tokens[here].astype(np.int64),
                        "tokens_capped": batch.column("n_tokens").to_numpy() - n_tokens[here].astype(np.int64),
                    }
                    columns = {"document": here, **dict(zip(batch.schema.names, batch.columns, strict=True)), **counts}
                    yield pa.record_batch({name: pa.array(values) for name, values in columns.items()})
                    at += batch.num_rows

        batches = _grouped(numbered())
        first = next(batches, None)
        write_batches(path, first.schema if first else pa.schema([]), chain([first] if first else [], batches))


def _batches(mapped: pa.MemoryMappedFile) -> Iterator[pa.RecordBatch]:
    mapped.seek(0)
    reader = pa.ipc.open_file(mapped)
    return (reader.get_batch(i) for i in range(reader.num_record_batches))


def _grouped(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of about `_GROUP`, so that many small documents do not make many small row groups."""
    waiting: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        waiting.append(batch)
        rows += batch.num_rows
        if rows >= _GROUP:
            yield pa.concat_batches(waiting)
            waiting, rows = [], 0
    if waiting:
        yield pa.concat_batches(waiting)
