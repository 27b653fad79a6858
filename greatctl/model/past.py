"""Keys and values of a run, so that another run with the same beginning need not compute them again.

A causal model's keys and values at a position depend on nothing behind it. A sweep that patches position 17 can
therefore take positions 0 to 16 from the unpatched run, and resume with the rest alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import UsageError

__all__ = ["Past", "behind"]


@dataclass(frozen=True)
class Past:
    """Per block: keys after RoPE and values, [b, n_kv_heads, p, d_head] each, on the block's device.

    `rows` and `upto` copy nothing; rows are gathered block by block, when they are used.
    """

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    index: torch.Tensor | None = None

    @property
    def batch(self) -> int:
        """Rows b."""
        return len(self.keys[0] if self.index is None else self.index)

    @property
    def length(self) -> int:
        """Positions p."""
        return self.keys[0].shape[2]

    def rows(self, index: torch.Tensor) -> Past:
        """The rows `index` (long [n], repetition allowed) of this past."""
        return replace(self, index=index if self.index is None else self.index.to(index.device)[index])

    def upto(self, position: int) -> Past:
        """The positions before `position` alone."""
        return replace(
            self, keys=[k[:, :, :position] for k in self.keys], values=[v[:, :, :position] for v in self.values]
        )

    def layer(self, layer: int, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one block for the positions before `start`, [b, n_kv_heads, start, d_head] each."""
        key, value = self.keys[layer][:, :, :start], self.values[layer][:, :, :start]
        if self.index is None:
            return key, value
        index = self.index.to(key.device)
        return key[index], value[index]

    def must_serve(self, batch: int, start: int) -> None:
        """Refuse a resumed run that this past does not belong to.

        Raises:
            UsageError: another number of rows, or fewer than `start` positions.
        """
        if self.batch != batch or self.length < start:
            raise UsageError(
                "the past does not fit the run",
                why=f"it has {self.batch} rows of {self.length} positions; {batch} rows resume at position {start}",
                fix="use past.rows(…), or capture a longer past",
            )


def behind(start: int, past: Past | None, rows: int, positions: torch.Tensor | None) -> torch.Tensor | None:
    """`positions` counted from `start`, if a run of `rows` rows can begin there."""
    if not start:
        return positions
    if past is None or start < 0:
        raise UsageError(f"a run cannot resume at position {start}", why="no past of the positions before it")
    past.must_serve(rows, start)
    if positions is None:
        return None
    if bool((positions < start).any()):
        raise UsageError(f"a position before {start} has no logits", why="the run resumed behind it")
    return positions - start
