"""Answers as tensors: sets of right and wrong tokens, and the scores of answers of several tokens.

A prompt may have several right continuations ("ship" or "boat"), and a name is often more than one token. A
set counts as the log-sum-exp of its logits and as the sum of its probabilities. An answer of several tokens
is scored with its own tokens behind the prompt, each where it is predicted; the sum of the log-probabilities
is then the logarithm of the probability of the whole text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..extend.contracts import Answers, SequenceScores
from .pairs import EncodedPair

__all__ = ["answers_of", "either", "sequence_scores"]

PADDING = -1  # no token; in `Answers.right` and in targets


def answers_of(
    pairs: Sequence[EncodedPair],
    clean_logits: torch.Tensor,
    corrupted_logits: torch.Tensor,
    sequence: SequenceScores | None = None,
) -> Answers:
    """What metrics may look at, one row a pair.

    Args:
        pairs: n encoded pairs.
        clean_logits, corrupted_logits: [n, d_vocab] at the answer position; they set the device.
        sequence: the scores of the run that will be measured, where answers have several tokens.
    """
    device = clean_logits.device
    return Answers(
        torch.tensor([pair.answer_id for pair in pairs], device=device),
        torch.tensor([pair.wrong_answer_id for pair in pairs], device=device),
        clean_logits,
        corrupted_logits,
        _first_tokens([pair.answers for pair in pairs]).to(device),
        _first_tokens([pair.wrong_answers for pair in pairs]).to(device),
        sequence,
    )


def sequence_scores(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of a continuation's logits and log-probabilities, over its own tokens.

    Args:
        logits: [n, m, d_vocab], the logits that predict the first, second, … token of each continuation: those
            of the answer position and of the m - 1 positions behind it.
        targets: [n, m] token ids, padded with -1 behind the end of the shorter ones.

    Returns:
        (logit sums [n], log-probability sums [n]), at least float32.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    real = targets != PADDING
    index = targets.clamp_min(0)[:, :, None]
    scores = []
    for values in (wide, wide.log_softmax(-1)):
        own = values.gather(-1, index)[:, :, 0]
        scores.append(torch.where(real, own, 0.0).sum(-1))
    return scores[0], scores[1]


def either(scores: Sequence[torch.Tensor]) -> torch.Tensor:
    """The score [n] of a set from those of its alternatives, [n] each, -inf where an example has fewer."""
    return torch.stack(list(scores)).logsumexp(0)


def _first_tokens(sets: Sequence[Sequence[Sequence[int]]]) -> torch.Tensor:
    """[n, s] distinct first tokens of each example's alternatives, padded with -1."""
    rows = [list(dict.fromkeys(alternative[0] for alternative in alternatives)) for alternatives in sets]
    width = max(map(len, rows))
    return torch.tensor([row + [PADDING] * (width - len(row)) for row in rows], dtype=torch.long)
