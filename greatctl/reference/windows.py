"""What the reference model is shown at each step, as a pure function of the seed and the step number.

Nothing here keeps a position: step 4,711 of a resumed run draws the same windows as step 4,711 of an
undisturbed one. Three kinds of window make up a batch. Book windows from a random grid; book windows moved
forward to the next paragraph start, so that the model meets sentences right after the beginning-of-text
token, as in a short prompt; and *copy windows*, random tokens repeated with a random period, because prose
alone does not teach a model of this size to copy (without them its accuracy on repeated random tokens was
0.001; the induction circuit is that of Olsson et al. 2022, "In-context Learning and Induction Heads").
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IGNORED = -100  # a label that the loss skips


@dataclass(frozen=True)
class Stream:
    """All training documents end to end, each as BOS ... EOS; `paragraphs` are the positions where one
    starts.
    """

    tokens: np.ndarray
    paragraphs: np.ndarray
    bos: int

    @classmethod
    def of(cls, documents: list[np.ndarray], newlines: np.ndarray, bos: int, eos: int) -> Stream:
        """Join `documents` (token ids each); `newlines` are the ids of the tokens that end a paragraph."""
        tokens = np.concatenate([np.concatenate([[bos], document, [eos]]) for document in documents])
        starts = np.flatnonzero(np.isin(tokens, [*newlines.tolist(), bos])) + 1
        return cls(tokens.astype(np.uint16), starts[starts < len(tokens)], bos)


def steps_per_epoch(stream: Stream, batch_size: int, context: int) -> int:
    """How many batches walk once through the stream (at least one)."""
    return max(1, (len(stream.tokens) // context - 1) // batch_size)


def batch(
    stream: Stream,
    step: int,
    *,
    batch_size: int,
    context: int,
    copy_fraction: float,
    vocab_size: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Inputs and labels of one step, int64 [batch_size, context] each; every input row starts with BOS."""
    per_epoch = steps_per_epoch(stream, batch_size, context)
    epoch, index = divmod(step, per_epoch)
    grid = np.random.default_rng([seed, 1, epoch])
    n_windows = max(1, len(stream.tokens) // context - 1)
    first = int(grid.integers(context))
    order = grid.permutation(n_windows)
    chosen = order[np.arange(index * batch_size, (index + 1) * batch_size) % n_windows]
    starts = first + chosen * context
    draw = np.random.default_rng([seed, 2, step])
    starts = _to_paragraphs(stream, starts, draw.random(batch_size) < 0.5, context)
    rows = stream.tokens[starts[:, None] + np.arange(context)].astype(np.int64)
    n_copies = round(copy_fraction * batch_size)
    labels = rows.copy()
    for row in range(n_copies):
        rows[row], labels[row] = copy_window(draw, context, vocab_size)
    inputs = np.concatenate([np.full((batch_size, 1), stream.bos), rows[:, :-1]], axis=1)
    return torch.from_numpy(inputs), torch.from_numpy(labels)


def copy_window(draw: np.random.Generator, context: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens repeated with a random period, and labels that ask only for what can be known."""
    period = int(draw.integers(max(2, context // 32), context // 2 + 1))
    once = draw.integers(2, vocab_size, size=period)  # ids 0 and 1 are the special tokens
    row = np.resize(once, context)
    labels = row.copy()
    labels[:period] = IGNORED
    return row, labels


def _to_paragraphs(stream: Stream, starts: np.ndarray, move: np.ndarray, context: int) -> np.ndarray:
    """Move the marked starts forward to the next paragraph, where one begins within half a window."""
    if not len(stream.paragraphs):
        return starts
    place = np.searchsorted(stream.paragraphs, starts)
    following = stream.paragraphs[np.minimum(place, len(stream.paragraphs) - 1)]
    near = (following >= starts) & (following - starts <= context // 2)
    moved = np.where(move & near, following, starts)
    return np.minimum(moved, len(stream.tokens) - context)
