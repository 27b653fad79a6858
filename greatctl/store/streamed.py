"""Large files written piece by piece, still whole or not there: safetensors and Parquet in constant memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .files import PARTIAL, disk_errors, fsync_dir, make_dir

__all__ = ["Column", "write_batches", "write_tensors"]

_NAMES = {"int32": "I32", "int64": "I64", "float32": "F32", "float64": "F64"}


@dataclass(frozen=True)
class Column:
    """A tensor that comes in pieces along its first axis: numpy dtype, whole shape, pieces in order."""

    dtype: str
    shape: Sequence[int]
    pieces: Iterable[np.ndarray]


def write_tensors(path: Path, tensors: Mapping[str, Column]) -> None:
    """Write a safetensors file; only one piece of one tensor is in memory at a time.

    Raises:
        ValueError: the pieces of a tensor do not add up to its shape.
    """
    header: dict[str, object] = {}
    at = 0
    for name, column in tensors.items():
        size = int(np.prod(column.shape)) * np.dtype(column.dtype).itemsize
        header[name] = {
            "dtype": _NAMES[column.dtype],
            "shape": list(column.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with _whole(path) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, column in tensors.items():
            rows = 0
            for piece in column.pieces:
                rows += len(piece)
                stream.write(np.ascontiguousarray(piece, dtype=np.dtype(column.dtype).newbyteorder("<")).tobytes())
            if rows != column.shape[0]:
                raise ValueError(f"{name}: {rows} rows came instead of {column.shape[0]}")


def write_batches(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write a zstd Parquet table from batches, a row group each."""
    with _whole(path) as stream, pq.ParquetWriter(stream, schema, compression="zstd") as writer:
        for batch in batches:
            if batch.num_rows:
                writer.write_batch(batch)


@contextmanager
def _whole(path: Path) -> Iterator[IO[bytes]]:
    """A stream under a partial name, renamed to `path` once it is complete and on the disk."""
    make_dir(path.parent)
    partial = path.with_name(path.name + PARTIAL)
    with disk_errors(path):
        try:
            with partial.open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        fsync_dir(path.parent)
