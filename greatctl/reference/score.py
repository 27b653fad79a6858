"""What the reference model can do, in numbers that its card prints: compression, copying, and the heads
that copy.

Bits per byte is the total code length of a text over its UTF-8 bytes, so models with different tokenizers
compare. Text is read in windows that each start with BOS and do not overlap: the plainest protocol and the
least flattering, since the first tokens of each window have little context.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def token_nats(model: nn.Module, tokens: np.ndarray, bos: int, context: int, rows: int = 16) -> np.ndarray:
    """Nats of each token of `tokens` [n] given those before it in its window, float64 [n]."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    pieces = [tokens[i : i + context] for i in range(0, len(tokens), context)]
    result: list[Tensor] = []
    for first in range(0, len(pieces), rows):
        group = pieces[first : first + rows]
        labels = torch.full((len(group), len(group[0])), -100)
        for row, piece in enumerate(group):
            labels[row, : len(piece)] = torch.from_numpy(piece)
        inputs = torch.cat([torch.full((len(group), 1), bos), labels[:, :-1].clamp(min=0)], dim=1)
        logits = model(input_ids=inputs.to(device), use_cache=False).logits.float()
        nats = F.cross_entropy(logits.flatten(0, 1), labels.to(device).flatten(), ignore_index=-100, reduction="none")
        result.append(nats.cpu()[labels.flatten() != -100])
    model.train(was_training)
    return torch.cat(result).double().numpy()


def bits_per_byte(model: nn.Module, tokens: np.ndarray, n_bytes: int, bos: int, context: int) -> float:
    """Code length of a text under the model, in bits per UTF-8 byte."""
    return float(token_nats(model, tokens, bos, context).sum()) / math.log(2) / n_bytes


class Trigram:
    """An interpolated Kneser-Ney trigram over tokens: what counting alone achieves on the same text.

    Kneser and Ney 1995, as interpolated by Chen and Goodman 1998, one discount for all orders.
    """

    def __init__(self, tokens: np.ndarray, vocab_size: int, discount: float = 0.8) -> None:
        """Count the training `tokens` (ids below `vocab_size`), int [n]."""
        self.v, self.d = vocab_size, discount
        t = tokens.astype(np.int64)
        self.three, self.n3 = np.unique((t[:-2] * self.v + t[1:-1]) * self.v + t[2:], return_counts=True)
        context3 = self.three // self.v
        self.context, start = np.unique(context3, return_index=True)
        self.total = np.add.reduceat(self.n3, start)
        self.types = np.diff(np.append(start, len(self.three)))
        # Lower orders count in how many contexts something was seen, not how often.
        self.two, self.n2 = np.unique(self.three % (self.v * self.v), return_counts=True)
        first = self.two // self.v
        self.total2 = np.bincount(first, weights=self.n2, minlength=self.v)
        self.types2 = np.bincount(first, minlength=self.v)
        seen = np.bincount(self.two % self.v, minlength=self.v) + 1.0  # plus one: no token is impossible
        self.one = seen / seen.sum()

    def nats(self, tokens: np.ndarray) -> np.ndarray:
        """Nats of each token from the third on, float64 [n - 2]."""
        t = tokens.astype(np.int64)
        a, b, c = t[:-2], t[1:-1], t[2:]
        one = self.one[c]
        n2 = _look_up(self.two, self.n2, b * self.v + c)
        two = _mix(n2, self.total2[b], self.types2[b], one, self.d)
        n3 = _look_up(self.three, self.n3, (a * self.v + b) * self.v + c)
        total = _look_up(self.context, self.total, a * self.v + b)
        types = _look_up(self.context, self.types, a * self.v + b)
        return -np.log(_mix(n3, total, types, two, self.d))


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """`values` at the sorted `keys` equal to `wanted`, 0 where there is none."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


def _mix(count: np.ndarray, total: np.ndarray, types: np.ndarray, lower: np.ndarray, discount: float) -> np.ndarray:
    """The discounted estimate plus the discount's mass spread by `lower`; `lower` alone for an unseen
    context.
    """
    safe = np.maximum(total, 1)
    return np.where(total > 0, (np.maximum(count - discount, 0) + discount * types * lower) / safe, lower)


def trigram_bits_per_byte(trigram: Trigram, tokens: np.ndarray, n_bytes: int, bos: int) -> float:
    """Code length of a text under the trigram, in bits per UTF-8 byte, all tokens counted."""
    return float(trigram.nats(np.concatenate([[bos, bos], tokens])).sum()) / math.log(2) / n_bytes


def copying(model: nn.Module, vocab_size: int, bos: int, *, period: int = 100, n: int = 64, seed: int = 1) -> float:
    """Share of tokens guessed right in the second half of `n` rows BOS, r, r of uniformly random tokens r
    [period].
    """
    inputs = _repeated(vocab_size, bos, period, n, seed)
    with torch.no_grad():
        guesses = model(input_ids=inputs, use_cache=False).logits.argmax(-1)
    hits = guesses[:, period + 1 : -1] == inputs[:, period + 2 :]
    return float(hits.float().mean())


def head_scores(
    model: Any, vocab_size: int, bos: int, *, period: int = 60, n: int = 16, seed: int = 2
) -> dict[str, Tensor]:
    """Mean attention of every head on repeated random tokens, float32 [n_layers, n_heads] each.

    `previous_token`: to the token before. `induction`: from the second copy to the token after the earlier
    occurrence (Olsson et al. 2022). Attention weights need the eager implementation, which is set back
    afterwards.
    """
    inputs = _repeated(vocab_size, bos, period, n, seed)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        patterns = model(input_ids=inputs, use_cache=False, output_attentions=True).attentions
    model.set_attn_implementation(before)
    previous = torch.stack([p.diagonal(-1, 2, 3).mean((0, 2)) for p in patterns])
    # Position i of the second copy was seen at i - period; the token after that is i - period + 1.
    induction = torch.stack([p.diagonal(1 - period, 2, 3)[..., 2:].mean((0, 2)) for p in patterns])
    return {"previous_token": previous, "induction": induction}


def _repeated(vocab_size: int, bos: int, period: int, n: int, seed: int) -> Tensor:
    """Rows BOS, r, r: int64 [n, 1 + 2 * period]."""
    generator = torch.Generator().manual_seed(seed)
    once = torch.randint(2, vocab_size, (n, period), generator=generator)
    return torch.cat([torch.full((n, 1), bos), once, once], dim=1)


@torch.no_grad()
def pair_differences(model: nn.Module, tokenizer: Any, pairs: list[dict[str, Any]]) -> list[float | None]:
    """For each pair, how much more the clean prompt favours the answer: the change of logit(answer) -
    logit(wrong).

    None for a pair that the tokenizer does not fit (unequal prompts, or an answer of several tokens).
    """
    result: list[float | None] = []
    for pair in pairs:
        clean, corrupted = (tokenizer(pair[side])["input_ids"] for side in ("clean", "corrupted"))
        answers = [tokenizer(pair[key], add_special_tokens=False)["input_ids"] for key in ("answer", "wrong_answer")]
        if len(clean) != len(corrupted) or any(len(ids) != 1 for ids in answers):
            result.append(None)
            continue
        logits = model(input_ids=torch.tensor([clean, corrupted]), use_cache=False).logits[:, -1].float()
        right, wrong = answers[0][0], answers[1][0]
        difference = logits[:, right] - logits[:, wrong]
        result.append(float(difference[0] - difference[1]))
    return result
