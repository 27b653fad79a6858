"""Parquet tables with the same bytes for the same rows."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import IntegrityError
from .files import write_bytes

__all__ = ["read_columns", "read_rows", "write_table"]


def write_table(path: Path, columns: Mapping[str, Sequence[object]] | pa.Table) -> None:
    """Write columns (name -> values of equal length, or a `pyarrow.Table`) atomically as zstd Parquet."""
    table = columns if isinstance(columns, pa.Table) else pa.table(dict(columns))
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    write_bytes(path, sink.getvalue())


def read_columns(path: Path, names: Sequence[str] | None = None) -> dict[str, list]:
    """Read a table as name -> list of Python values.

    Raises:
        IntegrityError: the file is not a readable Parquet table.
    """
    return _read(path, names).to_pydict()


def read_rows(path: Path, names: Sequence[str] | None = None) -> list[dict]:
    """Read a table as a list of rows."""
    return _read(path, names).to_pylist()


def _read(path: Path, names: Sequence[str] | None) -> pa.Table:
    try:
        return pq.read_table(path, columns=list(names) if names else None)
    except (pa.ArrowException, OSError) as error:
        raise IntegrityError(
            f"{path} is not a readable table", why=str(error), fix="run its stage again with --force", where=str(path)
        ) from error
