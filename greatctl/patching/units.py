"""The sweep's work in pieces that are finished or not: one batch of one group of pairs, direction and layer.

A unit is a small table of its own, written whole, until all are there; so a killed sweep loses the one batch
that it was computing. Groups depend on the pairs alone and batches on two numbers that are written down when
the work begins, never on what an earlier run had finished or on the memory of the moment.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import IntegrityError
from ..store.files import write_json
from ..store.tables import read_columns, write_table
from .pairs import EncodedPair

__all__ = ["TOGETHER", "Units", "groups"]

TOGETHER = 16  # pairs whose runs are held in memory at once
_PLAN = "plan.json"
Values = dict[str, NDArray[np.float64]]


def groups(encoded: Sequence[EncodedPair]) -> list[list[EncodedPair]]:
    """Pairs that fit into one rectangle, at most `TOGETHER` in a group: shorter prompts first, then in the order given.

    Both lengths must agree, and the lengths of the answers where these have several tokens.
    """
    alike: dict[tuple, list[EncodedPair]] = {}
    for pair in encoded:
        answers = tuple(tuple(map(len, some)) for some in (pair.answers, pair.wrong_answers))
        several = () if max(map(max, answers)) == 1 else answers
        alike.setdefault((len(pair.clean_ids), len(pair.corrupted_ids), several), []).append(pair)
    return [
        members[start : start + TOGETHER]
        for _, members in sorted(alike.items())
        for start in range(0, len(members), TOGETHER)
    ]


class Units:
    """The finished batches below `folder`, also of an interrupted run; an unreadable one is removed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._finished: dict[str, Values] = {}
        for path in sorted(folder.glob("*.parquet")):
            try:
                self._finished[path.name] = {k: np.array(v) for k, v in read_columns(path).items()}
            except IntegrityError:
                path.unlink()

    def __len__(self) -> int:
        return len(self._finished)

    def __contains__(self, unit: Sequence[object]) -> bool:
        return _name(unit) in self._finished

    def fixed(self, **wanted: int) -> dict[str, int]:
        """Numbers that the batches depend on: those that the work began with, else `wanted`, which are kept."""
        path = self._folder / _PLAN
        if path.is_file():
            return json.loads(path.read_bytes())
        for name in self._finished:  # batches without their plan cannot be placed
            (self._folder / name).unlink()
        self._finished.clear()
        write_json(path, wanted)
        return wanted

    def tasks(self) -> int:
        """How many patched runs the finished batches hold."""
        batches = [values for name, values in self._finished.items() if name[0].isdigit()]
        return sum(len(next(iter(values.values()))) for values in batches)

    def values(self, unit: Sequence[object]) -> Values:
        """metric -> value of each task of a finished batch."""
        return self._finished[_name(unit)]

    def kept(self, name: str, make: Callable[[], Mapping[str, Sequence[float] | NDArray]]) -> Values:
        """Columns that the work began with, else those of `make`, which are on disk before anything depends on them.

        What is chosen by estimates is kept so: a device that rounds otherwise, or another memory, would rank otherwise
        after an interruption, and finished batches would be taken for others.
        """
        if (name,) not in self:
            self.write((name,), {key: np.asarray(values, dtype=np.float64) for key, values in make().items()})
        return self.values((name,))

    def write(self, unit: Sequence[object], values: Mapping[str, NDArray[np.float64]]) -> None:
        """Put the values of a batch (group, direction, layers, number) durably on disk."""
        write_table(self._folder / _name(unit), {name: column.tolist() for name, column in values.items()})
        self._finished[_name(unit)] = dict(values)


def _name(unit: Sequence[object]) -> str:
    """0003-denoising-005-012.parquet; a window of layers is 005x3, a walk of three steps 005+2."""
    return "-".join(f"{part:04d}" if isinstance(part, int) else str(part) for part in unit) + ".parquet"
