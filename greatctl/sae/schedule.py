"""How long and how fast a coder is trained, and the rules for what nobody chose.

The learning rate warms up, stays, and falls to 0 over the last fifth. The defaults follow the published rules for
long runs and bend them for short ones: a small corpus is the ordinary case here, and the long-run rules would end
before anything is learnt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Settings", "default_batch_size", "default_dead_window", "default_lr"]

LARGEST_BATCH = 4096
_LONG_RUN = 10_000
_SMALLEST_BATCH, _ENOUGH_STEPS = 256, 2000


@dataclass(frozen=True)
class Settings:
    """How long and how fast.

    Attributes:
        steps: optimiser steps.
        batch_size: rows a step (to one row; see `ActivationRows.stream`).
        lr: peak learning rate.
        warmup_steps: steps of linear warm-up.
        dead_window: tokens without firing after which a latent counts as dead.
        checkpoint_every, log_every: steps.
        seed: of the initialisation, the shuffle and whatever an architecture draws.
        shuffle_seed: of the shuffle alone; None = `seed`.
    """

    steps: int
    batch_size: int
    lr: float
    warmup_steps: int
    dead_window: int
    checkpoint_every: int
    log_every: int
    seed: int
    shuffle_seed: int | None = None

    @property
    def order(self) -> int:
        """The seed of the shuffle."""
        return self.seed if self.shuffle_seed is None else self.shuffle_seed

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        decay = max(1, self.steps // 5)
        up = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        down = min(1.0, (self.steps - step) / decay)
        return self.lr * up * down


def default_lr(d_sae: int, steps: int, *, reads_target: bool = False) -> float:
    """4e-4 / sqrt(d_sae / 2^14) for long runs, twice the most cautious published rule; raised by 10,000 / steps for
    shorter ones, which otherwise end before they have learnt. At most 1e-2, or 2e-3 for a coder of another activation's
    values, most of whose latents die at the higher one.
    """
    most = 2e-3 if reads_target else 1e-2
    return min(most, 4e-4 * math.sqrt(2**14 / d_sae) * max(1.0, _LONG_RUN / steps))


def default_dead_window(run_tokens: int, batch_size: int) -> int:
    """Ten million tokens, or 5 % of a shorter run; at least eight batches."""
    return max(min(10_000_000, run_tokens // 20), 8 * batch_size)


def default_batch_size(rows: int, run_tokens: int | None) -> int:
    """4096, halved (to 256 at least) while a run has under 2000 steps or an epoch under 16 batches."""
    size = LARGEST_BATCH
    while size > _SMALLEST_BATCH and (
        rows < 16 * size or (run_tokens is not None and run_tokens < _ENOUGH_STEPS * size)
    ):
        size //= 2
    return size
