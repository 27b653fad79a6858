"""Texts into windows, part by part: what lets a corpus of any size be tokenized, by any number of workers.

A *part* is one source, or one file of a folder of texts. Its windows and its documents go to two Arrow files as they
come; both are renamed into place when the part is whole, so that a killed run goes on with the next part, and a part
has the same bytes whoever makes it. While one batch of texts is being cut and written, the next is already in the
tokenizer. `merge` (greatctl.corpus.merge) then makes one artifact of the parts.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa

from ..store.files import PARTIAL, disk_errors, fsync_dir, make_dir, sha256_bytes
from .windows import Rows, cut

__all__ = ["FACTS", "Cutter", "Part", "Text", "done", "part_files", "tokenize", "window_schema"]

FACTS = pa.schema(
    [
        *(
            (name, pa.string())
            for name in ("source_id", "work", "character", "author", "role", "era", "genre", "topic")
        ),
        ("translated", pa.bool_()),
        ("split", pa.string()),
        ("year", pa.int64()),
        ("unit", pa.string()),
        ("confound", pa.string()),
        ("matches", pa.string()),
        ("hard", pa.bool_()),
    ]
)
"""What is known of every document, as far as it is known."""

_COUNTS = [("n_chars", pa.int64()), ("overlap_chars", pa.int64()), ("n_windows", pa.int64()), ("n_tokens", pa.int64())]
_DOCUMENTS = pa.schema([*FACTS, *_COUNTS, ("text_sha256", pa.string())])
_COLUMNS = ("document", "first_token", "char_start", "char_end", "length")

_BATCH_CHARS = 2_000_000  # texts tokenized together: enough for all cores, some hundred MB at most
_TOGETHER = 256  # documents written at once
_LONGEST = 1_000_000  # a longer stretch is cut at a blank line, since one text occupies one core and its memory

Encode = Callable[[Sequence[str]], Sequence[tuple[np.ndarray, np.ndarray]]]


@dataclass(frozen=True)
class Text:
    """One document: what is known of it (keys of `FACTS`), its text, and the spans of characters to leave out."""

    facts: Mapping[str, object]
    text: str
    without: Sequence[tuple[int, int]] = ()

    @cached_property
    def stretches(self) -> list[tuple[int, int]]:
        """The stretches (from, to) that are tokenized, each by itself: what is kept, cut where it is very long."""
        found, at = [], 0
        for start, end in [*sorted(self.without), (len(self.text), len(self.text))]:
            found += _pieces(self.text, at, start)
            at = max(at, end)
        return [(a, b) for a, b in found if not self.text[a:b].isspace()]


@dataclass(frozen=True)
class Part:
    """Part `number`, and its documents in order."""

    number: int
    texts: Iterable[Text]


@dataclass(frozen=True)
class Cutter:
    """How texts become windows."""

    encode: Encode
    window: int
    bos: int
    pad: int

    def rows(self, text: Text, encoded: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Rows]:
        """The windows of a document, from the tokens of its stretches."""
        rows, first = [], 0
        for (start, end), (ids, ends) in zip(text.stretches, encoded, strict=True):
            shape = {"window": self.window, "bos": self.bos, "pad": self.pad}
            rows.append(cut(ids, ends, end - start, first_char=start, first_token=first, **shape))
            first += len(ids)
        return rows


def part_files(folder: Path, number: int) -> tuple[Path, Path]:
    """The windows and the documents of a part."""
    return folder / f"part-{number:06d}.windows.arrow", folder / f"part-{number:06d}.documents.arrow"


def done(folder: Path, number: int) -> bool:
    """Whether a part is whole; its documents are renamed last."""
    return part_files(folder, number)[1].exists()


def window_schema(window: int) -> pa.Schema:
    """Columns of a part's windows."""
    row = pa.list_(pa.int32(), window)
    return pa.schema([("input_ids", row), ("token_end", row), *((name, pa.int32()) for name in _COLUMNS)])


def tokenize(folder: Path, parts: Iterable[Part], cutter: Cutter, said: Callable[[int], None]) -> None:
    """Make every part of `parts` in `folder`.

    Args:
        said: called with the characters of a batch once it is written; may raise to stop.
    """
    make_dir(folder)
    writer: _PartWriter | None = None
    try:
        for batch, encoded in _encoded(_batches(parts), cutter.encode):
            at = 0
            for number, text in batch:
                writer = writer or _PartWriter(folder, number, cutter.window)
                if text is None:
                    writer.close()
                    writer = None
                    continue
                n = len(text.stretches)
                writer.add(text, cutter.rows(text, encoded[at : at + n]))
                at += n
            said(sum(len(text.text) for _, text in batch if text))
    finally:
        if writer is not None:
            writer.abandon()


Item = tuple[int, Text | None]  # a document of a part, or its end


def _batches(parts: Iterable[Part]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    size = 0
    for part in parts:
        for text in part.texts:
            if batch and size + len(text.text) > _BATCH_CHARS:
                yield batch
                batch, size = [], 0
            batch.append((part.number, text))
            size += len(text.text)
        batch.append((part.number, None))
    if batch:
        yield batch


def _encoded(
    batches: Iterator[list[Item]], encode: Encode
) -> Iterator[tuple[list[Item], Sequence[tuple[np.ndarray, np.ndarray]]]]:
    """Each batch with the tokens of its stretches; one batch ahead is being tokenized."""
    waiting: deque[tuple[list[Item], Future]] = deque()
    with ThreadPoolExecutor(1) as pool:
        try:
            for batch in batches:
                pieces = [text.text[a:b] for _, text in batch if text for a, b in text.stretches]
                waiting.append((batch, pool.submit(encode, pieces)))
                if len(waiting) > 1:
                    ready, future = waiting.popleft()
                    yield ready, future.result()
            while waiting:
                ready, future = waiting.popleft()
                yield ready, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def _pieces(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """(start, end), in pieces of at most `_LONGEST` characters that end after a blank line where there is one."""
    found = []
    while end - start > _LONGEST:
        blank = text.rfind("\n\n", start + 1, start + _LONGEST)
        middle = blank + 2 if blank > 0 else start + _LONGEST
        found.append((start, middle))
        start = middle
    return [*found, (start, end)] if end > start else found


class _PartWriter:
    """Two Arrow files of one part, under partial names until `close`."""

    def __init__(self, folder: Path, number: int, window: int) -> None:
        self._final = part_files(folder, number)
        self._schemas = window_schema(window), _DOCUMENTS
        self._files: list[IO[bytes]] = []
        self._count = 0
        self._waiting: list[tuple[Text, Sequence[Rows]]] = []
        with disk_errors(folder):
            self._files = [path.with_name(path.name + PARTIAL).open("wb") for path in self._final]
            self._writers = [pa.ipc.new_file(f, s) for f, s in zip(self._files, self._schemas, strict=True)]

    def add(self, text: Text, rows: Sequence[Rows]) -> None:
        """Take a document and its windows; many small ones are written together, since each batch has its price."""
        self._waiting.append((text, rows))
        if len(self._waiting) >= _TOGETHER:
            self._flush()

    def _flush(self) -> None:
        with disk_errors(self._final[0]):
            pieces = [(piece, self._count + i) for i, (_, rows) in enumerate(self._waiting) for piece in rows]
            if pieces:
                self._writers[0].write_batch(_window_batch(pieces, self._schemas[0]))
            if self._waiting:
                found = [_document(text, rows) for text, rows in self._waiting]
                self._writers[1].write_batch(pa.RecordBatch.from_pylist(found, schema=_DOCUMENTS))
        self._count += len(self._waiting)
        self._waiting.clear()

    def close(self) -> None:
        """Make the part whole and durable."""
        self._flush()
        with disk_errors(self._final[0]):
            for writer, stream, path in zip(self._writers, self._files, self._final, strict=True):
                writer.close()
                stream.flush()
                os.fsync(stream.fileno())
                stream.close()
                Path(stream.name).replace(path)
            fsync_dir(self._final[0].parent)

    def abandon(self) -> None:
        """Leave nothing of the part."""
        for stream in self._files:
            stream.close()
            Path(stream.name).unlink(missing_ok=True)


def _window_batch(pieces: Sequence[tuple[Rows, int]], schema: pa.Schema) -> pa.RecordBatch:
    """The windows of some stretches, each with the number of its document."""

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(piece, name) for piece, _ in pieces])

    owner = np.concatenate([np.full(len(piece.length), number, np.int32) for piece, number in pieces])
    ids = joined("input_ids")
    wide = [
        pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), ids.shape[1])
        for values in (ids, joined("token_end"))
    ]
    narrow = [pa.array(owner if name == "document" else joined(name)) for name in _COLUMNS]
    return pa.record_batch([*wide, *narrow], schema=schema)


def _document(text: Text, rows: Sequence[Rows]) -> dict[str, object]:
    """The row of a document."""
    return {
        **text.facts,
        "n_chars": len(text.text),
        "overlap_chars": sum(end - start for start, end in text.without),
        "n_windows": sum(len(r.length) for r in rows),
        "n_tokens": int(sum((r.length - 1).sum() for r in rows)),
        "text_sha256": sha256_bytes(text.text.encode()),
    }
