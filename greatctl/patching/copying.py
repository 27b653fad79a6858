"""Copying as a behaviour to take apart: pairs for any tokenizer, and the criterion for the two-step circuit.

A prompt is a list of random words and the beginning of the same list once more; what comes next is known from the
list alone. The corrupted prompt has two words of the first list swapped: the one that was just repeated, and
another. So both prompts hold the same words, the last one is the same, and each right answer is the other's wrong
one. A model that looks for the earlier occurrence of the last word changes its mind; one that counts positions
back does not, since nothing at that position changed. Lists of several lengths end at the same place, so that the
distance to be copied over differs from pair to pair.

Induction takes two steps (Olsson et al. 2022): a head tells every position which word stood before it, and a later
head finds the position whose keys say "after this word". `two_step` asks for just that: edges from heads that attend
to the previous position into the keys of a later layer carry the behaviour.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import InputError
from .graph import parse_edge
from .pair_files import Pair
from .pairs import EncodedPair

__all__ = ["ATTENDS", "TwoStep", "copying_pairs", "previous_token_scores", "swapped", "two_step"]

LENGTH = 16  # tokens of a prompt, without BOS
PERIODS = (9, 10, 11, 12)  # words of the list
ATTENDS = 0.3  # of its attention, a previous-token head gives to the position before
CARRIES = 0.25  # of the effect, the key edges from such heads must carry together
TURNS = 0.5  # of a complete change of mind, the swap must bring about
_WORD = re.compile(r" [a-z]{3,9}")
_WORDS = 400


def swapped(
    words: Sequence[Any], period: int, length: int, rng: random.Random
) -> tuple[list[Any], list[Any], Any, Any]:
    """One prompt, its counterpart, the right and the wrong next word.

    Args:
        words: at least `period` different words (or token ids).
        period: words of the list; `length` - `period` of them are repeated.
        length: words of the prompt, period + 1 to 2 * period - 1.
        rng: the draws.
    """
    once = rng.sample(list(words), period)
    last = length - period - 1  # the place in the list of the last word of the prompt
    other = rng.choice([at for at in range(period - 1) if abs(at - last) > 1])
    changed = list(once)
    changed[last], changed[other] = once[other], once[last]
    again = once[: last + 1]
    return [*once, *again], [*changed, *again], once[last + 1], once[other + 1]


def copying_pairs(tokenizer: Any, encode: Callable[[str], Sequence[int]], *, n: int = 48, seed: int = 0) -> list[Pair]:
    """`n` pairs of random words that are one token each; every second one is held out.

    Args:
        tokenizer: a Hugging Face tokenizer, for its vocabulary.
        encode: text -> token ids with BOS in front.
        n: how many.
        seed: seed of the words and of the swaps.

    Raises:
        InputError: the tokenizer has too few words that are one token.
    """
    rng = random.Random(seed)
    words = _words(tokenizer, encode, rng)
    made: list[Pair] = []
    for number in range(n):
        clean, corrupted, right, wrong = swapped(words, PERIODS[number // 2 % len(PERIODS)], LENGTH, rng)
        made.append(
            Pair(
                f"copying-{number + 1:02d}",
                "".join(clean),
                "".join(corrupted),
                right,
                wrong,
                heldout=bool(number % 2),
                why="what followed the last word before",
                concept="copying",
            )
        )
    return made


def _words(tokenizer: Any, encode: Callable[[str], Sequence[int]], rng: random.Random) -> list[str]:
    """Words with their leading space that are one token, wherever they stand in a text."""
    ids = list(range(len(tokenizer)))
    rng.shuffle(ids)
    found: list[str] = []
    for token in ids:
        text = tokenizer.decode([token])
        if _WORD.fullmatch(text) and list(encode(text + text))[1:] == [token, token]:
            found.append(text)
        if len(found) == _WORDS:
            break
    if len(found) < 2 * max(PERIODS):
        raise InputError(
            "there are no copying pairs for this model",
            why=f"its tokenizer has only {len(found)} common words that are one token",
            fix="write pairs for it, and name the file with --pairs",
        )
    return found


@torch.no_grad()
def previous_token_scores(model: Any, pairs: Sequence[EncodedPair]) -> dict[str, float]:
    """Head name -> mean attention from each position to the one before, over the clean prompts (of one length)."""
    tokens = torch.tensor([pair.clean_ids for pair in pairs], device=model.device)
    sites = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.n_layers)]
    found = model.capture(tokens, sites)
    scores = {}
    for layer, site in enumerate(sites):
        each = found[site].float().diagonal(-1, 2, 3)[..., 1:].mean((0, 2))
        scores |= {f"a{layer}.h{head}": float(value) for head, value in enumerate(each)}
    return scores


@dataclass(frozen=True)
class TwoStep:
    """Whether copying is done by induction in two steps.

    Attributes:
        found: it is.
        carried: share of the effect of all key edges from previous-token heads, summed.
        edges: these edges, the strongest first.
        turns: how far the swap turns the model's preference: 1 into its opposite, 0 not at all.
        why: what decided, in words.
    """

    found: bool
    carried: float
    edges: tuple[str, ...]
    turns: float
    why: str


def two_step(
    effects: Mapping[str, float],
    attention: Mapping[str, float],
    clean: NDArray[np.float64],
    corrupted: NDArray[np.float64],
) -> TwoStep:
    """Judge by the exact effects of edges.

    Two things are asked, in this order. The swap must turn the preference at least `TURNS` of the way; of a model that
    copies from a fixed distance it does not, because nothing changes there. And edges from heads with a previous-token
    score of `ATTENDS` into keys of a later layer must carry `CARRIES` of the effect.

    Args:
        effects: edge -> normalised denoising effect (of the keys' edges at least).
        attention: head -> previous-token score.
        clean, corrupted: [n] logit differences of the unpatched runs.
    """
    turns = float((clean - corrupted).sum() / max(2 * np.abs(clean).sum(), 1e-9))
    keys = {name: value for name, value in effects.items() if _into_keys(name)}
    ours = {name: value for name, value in keys.items() if attention.get(name.partition("->")[0], 0.0) >= ATTENDS}
    carried = float(sum(ours.values()))
    edges = tuple(name for name, value in sorted(ours.items(), key=lambda item: -item[1]) if value > 0.02)
    if turns < TURNS:
        why = f"the swap turns the preference only {turns:.2f} of the way, so it does not copy by what it reads"
    elif carried < CARRIES:
        why = f"the key edges from previous-token heads carry {carried:.2f} of the effect, less than {CARRIES}"
    else:
        some = edges or sorted(ours, key=lambda name: -ours[name])  # in a large model none of them need be large
        why = (
            f"{some[0]} and {len(some) - 1} more key edges from previous-token heads carry {carried:.2f} of the effect"
        )
    return TwoStep(turns >= TURNS and carried >= CARRIES, carried, edges, turns, why)


def _into_keys(name: str) -> bool:
    edge = parse_edge(name)
    return edge.sender.kind == "head" and edge.receiver.slot == "k"
