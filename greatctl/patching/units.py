"""The sweep's work in pieces that are finished or not: one group of pairs, one direction, one layer.

A unit is a small table of its own, written whole, until all are there; so a killed sweep loses the one unit
that it was computing. Groups depend on the pairs alone, never on what an earlier run had finished.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import IntegrityError
from ..store.tables import read_columns, write_table
from .pairs import EncodedPair

__all__ = ["TOGETHER", "Units", "groups"]

TOGETHER = 16  # pairs whose runs are held in memory at once


def groups(encoded: Sequence[EncodedPair]) -> list[list[EncodedPair]]:
    """Pairs of one length, at most `TOGETHER` in a group: shorter prompts first, then in the order given."""
    by_length: dict[int, list[EncodedPair]] = {}
    for pair in encoded:
        by_length.setdefault(pair.length, []).append(pair)
    return [
        members[start : start + TOGETHER]
        for _, members in sorted(by_length.items())
        for start in range(0, len(members), TOGETHER)
    ]


class Units:
    """The finished units below `folder`, also of an interrupted run; an unreadable one is removed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._finished: set[str] = set()
        for path in sorted(folder.glob("*.parquet")):
            try:
                read_columns(path, ["pair"])
                self._finished.add(path.name)
            except IntegrityError:
                path.unlink()

    def __len__(self) -> int:
        return len(self._finished)

    def __contains__(self, unit: tuple[int, str, int]) -> bool:
        return _name(*unit) in self._finished

    def write(self, unit: tuple[int, str, int], table: pa.Table) -> None:
        """Put the table of (group, direction, layer) durably on disk."""
        write_table(self._folder / _name(*unit), table)
        self._finished.add(_name(*unit))

    def merged(self) -> pa.Table:
        """All units in the order of group, direction and layer."""
        return pa.concat_tables([pq.read_table(self._folder / name) for name in sorted(self._finished)])


def _name(group: int, direction: str, layer: int) -> str:
    return f"{group:04d}-{direction}-{layer:03d}.parquet"
