"""A small Llama trained to copy repeated random tokens, in two ways that look alike from outside.

With a random period between repeats the model has to find the earlier occurrence by what stands there: it learns
induction in two steps. With a fixed period it learns to look a fixed distance back, which copies just as well and is
no induction at all: a trap for whoever claims a circuit.
"""

from __future__ import annotations

import random

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from greatctl.patching.copying import swapped
from greatctl.patching.pairs import EncodedPair, Pair

VOCABULARY, LENGTH = 64, 48
FIRST = 3  # ids below are no text


def batch(generator: torch.Generator, periods: tuple[int, int], n: int) -> torch.Tensor:
    """[n, LENGTH] tokens of which each row repeats itself after a period drawn between `periods`."""
    period = torch.randint(periods[0], periods[1] + 1, (n, 1), generator=generator)
    once = torch.randint(FIRST, VOCABULARY, (n, periods[1]), generator=generator)
    return once.gather(1, torch.arange(LENGTH).expand(n, -1) % period)


def train(periods: tuple[int, int], steps: int, *, seed: int = 0, n: int = 64) -> tuple[LlamaForCausalLM, float]:
    """The trained model, and its accuracy on tokens that were to be copied."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.1)
    known = periods[1]  # every token from here on was seen a period earlier
    for _ in range(steps):
        tokens = batch(generator, periods, n)
        logits = model(input_ids=tokens, use_cache=False).logits[:, known:-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, known + 1 :].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval().requires_grad_(False)
    with torch.no_grad():
        tokens = batch(generator, periods, 256)
        hits = model(input_ids=tokens, use_cache=False).logits[:, known:-1].argmax(-1) == tokens[:, known + 1 :]
    return model, float(hits.float().mean())


def swapped_pairs(n: int, periods: tuple[int, ...], length: int, seed: int = 0) -> list[EncodedPair]:
    """Pairs of token ids as `copying_pairs` makes them of words; every second one is held out."""
    rng = random.Random(seed)
    made = []
    for number in range(n):
        period = periods[number // 2 % len(periods)]
        clean, corrupted, right, wrong = swapped(range(FIRST, VOCABULARY), period, length, rng)
        texts = Pair(f"swap{number}", "clean", "corrupted", "right", "wrong", heldout=bool(number % 2))
        made.append(EncodedPair(texts, tuple(clean), tuple(corrupted), right, wrong))
    return made
