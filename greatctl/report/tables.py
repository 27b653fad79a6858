"""Reading the tables of other rooms tolerantly: a column or a table that is not there is None or empty, never a crash."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

__all__ = ["Row", "by_latent", "columns", "metadata", "of_latents", "rows"]

Row = Mapping[str, Any]


class _Row(dict[str, Any]):
    """A row of a table; a column that the table does not have reads as None."""

    def __missing__(self, key: str) -> None:
        return None


def rows(path: Path, names: Collection[str] | None = None, *, latents: Iterable[int] | None = None) -> list[Row]:
    """The rows of a table, of some latents alone if asked; none where there is no table.

    Args:
        names: the columns that are wanted; those that the table does not have read as None.
    """
    return [_Row(row) for row in _table(path, names, latents).to_pylist()]


def columns(path: Path, names: Collection[str]) -> dict[str, list]:
    """The wanted columns of a table as lists; those that it does not have are left out."""
    return _table(path, names, None).to_pydict()


def by_latent(found: Iterable[Row]) -> dict[int, list[Row]]:
    """Rows grouped by their latent, in order."""
    groups: dict[int, list[Row]] = {}
    for row in found:
        groups.setdefault(row["latent"], []).append(row)
    return groups


def of_latents(path: Path, latents: Iterable[int], names: Collection[str] | None = None) -> dict[int, list[Row]]:
    """The rows of some latents, grouped by them."""
    return by_latent(rows(path, names, latents=latents))


def metadata(source: Path) -> dict[str, Any]:
    """What `fetch` noted of a text in metadata.json; nothing where it noted nothing."""
    path = source / "metadata.json"
    return json.loads(path.read_bytes()) if path.is_file() else {}


def _table(path: Path, names: Collection[str] | None, latents: Iterable[int] | None) -> pa.Table:
    if not path.is_file():
        return pa.table({})
    known = pq.read_schema(path).names
    wanted = None if names is None else [name for name in names if name in known]
    chosen = None if latents is None else pc.field("latent").isin(list(latents))
    return pq.read_table(path, columns=wanted, filters=chosen)
