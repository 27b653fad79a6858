"""What training rows are, wherever they come from: shards on a disk (`data`) or the model itself (`stream`).

Both leave out the same tokens, count them the same way, and name the next batch by a cursor of three numbers.
Every random choice has a generator of its own, named by its purpose.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import StageError

__all__ = [
    "OUTLIER",
    "Batch",
    "Counts",
    "Cursor",
    "Moments",
    "Rows",
    "derive",
    "generator",
    "nothing_left",
    "outlying",
]

OUTLIER = 10.0


def derive(seed: int, *purpose: object) -> int:
    """A seed of its own for each named purpose (63 bits)."""
    text = "/".join(str(p) for p in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator for a named purpose."""
    return torch.Generator().manual_seed(derive(seed, *purpose))


@dataclass(frozen=True)
class Counts:
    """Where the rows went. `rows` = `special` + `outliers` + `held_out` + `train`."""

    rows: int
    special: int
    outliers: int
    held_out: int
    train: int

    def checked(self) -> Counts:
        """Itself.

        Raises:
            StageError: there is nothing to train on.
        """
        if not self.train:
            raise StageError(
                "every row is held out: there is nothing to train on",
                why=f"{self.held_out:,} rows are held out, {self.special:,} are special tokens",
                fix='tokenize at least one work with split = "train"',
            )
        return self


@dataclass(frozen=True)
class Cursor:
    """The next batch: epoch, block within the epoch, batch within the block."""

    epoch: int = 0
    block: int = 0
    batch: int = 0


Batch = tuple[Cursor, Tensor, Tensor | None]
"""The cursor of the batch after it, rows [n, d_in] and, for a transcoder, targets [n, d_out], as stored."""


class Rows(Protocol):
    """What the trainer reads (`ActivationRows`, `StreamRows`)."""

    counts: Counts
    median_norm: float
    mean: Tensor
    mean_norm: float
    gamma: float
    target_mean: Tensor | None
    target_mean_norm: float | None

    @property
    def d_in(self) -> int:
        """Width of a row."""
        ...

    @property
    def d_out(self) -> int:
        """Width of what is to be reconstructed."""
        ...

    def steps(self, seed: int, batch_size: int, epochs: int) -> int:
        """Batches in so many epochs."""
        ...

    def stream(self, seed: int, batch_size: int, start: Cursor) -> Iterator[Batch]:
        """Endless batches from `start` on."""
        ...

    def held_out(self) -> Tensor:
        """Held-out rows [n, d_in], float32."""
        ...

    def held_out_target(self) -> Tensor | None:
        """Their targets [n, d_out], float32."""
        ...

    def held_out_windows(self) -> Tensor:
        """Their window numbers [n], int64."""
        ...

    def state(self) -> dict[str, object]:
        """What a checkpoint must hold of this besides the cursor (JSON values)."""
        ...

    def restore(self, state: dict) -> None:
        """Go on from `state`."""
        ...

    def release(self) -> None:
        """Give back what only training needed."""
        ...


class Moments:
    """Mean, mean norm and spread of rows that come in parts, in float64."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._norms, self._squares, self._n = 0.0, 0.0, 0

    def add(self, rows: Tensor) -> None:
        """Count rows [n, d] in."""
        exact = rows.double()
        self._sum = exact.sum(dim=0) if self._sum is None else self._sum + exact.sum(dim=0)
        self._norms += float(exact.norm(dim=1).sum())
        self._squares += float(exact.square().sum())
        self._n += rows.shape[0]

    @property
    def mean(self) -> Tensor:
        """[d] float64."""
        assert self._sum is not None
        return self._sum / self._n

    @property
    def mean_norm(self) -> float:
        """Mean of the rows' norms."""
        return self._norms / self._n

    @property
    def gamma(self) -> float:
        """|mean| / standard deviation."""
        around = max(0.0, self._squares / self._n - float(self.mean.square().sum()))
        return float(self.mean.norm()) / max(around**0.5, 1e-12)


def outlying(norms: Tensor, ordinary: Tensor) -> tuple[Tensor, float]:
    """Which rows [n] have a norm of at most ten times the median of the ordinary ones, and that median."""
    median = float(norms[ordinary].median())
    return norms <= OUTLIER * median, median


def nothing_left(rows: int) -> StageError:
    """The error for activations without one ordinary token."""
    return StageError(
        "there are no activations to train on",
        why=f"{rows:,} rows, none of them an ordinary token",
        fix="harvest more text: `greatctl fetch`, `greatctl tokenize`, `greatctl harvest`",
    )
