"""A Llama whose circuit is known because its weights were written by hand: nothing is trained.

Two blocks, two query heads on one key-value head, no MLP. The stream is three copies of the vocabulary and
a constant: TOKEN (what stands here), BEFORE (what stood one position earlier), OUT (what is predicted), and
ONE. Block 0 head 0 always attends one position back and copies TOKEN there into BEFORE. Block 1 head 1
looks for a position whose BEFORE is the present TOKEN and copies its TOKEN into OUT. So after "… A B … A"
the model says B, by induction and by nothing else.
"""

from __future__ import annotations

import math
import random

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from greatctl.patching.pairs import EncodedPair, Pair

VOCABULARY, HEAD = 32, 128
WIDTH = 3 * VOCABULARY + 8
TOKEN, BEFORE, OUT, ONE = 0, VOCABULARY, 2 * VOCABULARY, 3 * VOCABULARY
SIZE_OF_ONE, STEP_SHARPNESS, MATCH_SHARPNESS, LOUDNESS = 10.0, 20.0, 12.0, 10.0
THETA, STEP_PLANES, SLOW_PLANES = 1e12, 6, 32


def induction_llama() -> LlamaForCausalLM:
    """The model, in float32 and evaluation mode."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=HEAD,
        max_position_embeddings=64,
        rms_norm_eps=1e-9,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        weight.fill_(1.0 if "norm" in name else 0.0)
    rms = math.sqrt((1 + SIZE_OF_ONE**2) / WIDTH)
    root = rms * HEAD**0.25  # undoes the norm, and half of the 1/sqrt(d_head) of the scores
    each = torch.arange(VOCABULARY)

    model.model.embed_tokens.weight[each, TOKEN + each] = 1.0
    model.model.embed_tokens.weight[:, ONE] = SIZE_OF_ONE
    model.lm_head.weight[each, OUT + each] = LOUDNESS * rms

    back = model.model.layers[0].self_attn
    plane = torch.arange(STEP_PLANES)
    speed = THETA ** (-plane.double() / (HEAD // 2))
    gain = STEP_SHARPNESS / SIZE_OF_ONE * root
    back.k_proj.weight[plane, ONE] = gain
    back.q_proj.weight[plane, ONE] = (gain * speed.cos()).float()
    back.q_proj.weight[plane + HEAD // 2, ONE] = (-gain * speed.sin()).float()
    back.v_proj.weight[each, TOKEN + each] = rms
    back.o_proj.weight[BEFORE + each, each] = 1.0

    match = model.model.layers[1].self_attn
    slow = HEAD // 2 - SLOW_PLANES + each
    match.q_proj.weight[HEAD + slow, TOKEN + each] = MATCH_SHARPNESS * root
    match.k_proj.weight[slow, BEFORE + each] = MATCH_SHARPNESS * root
    match.v_proj.weight[each, TOKEN + each] = rms
    match.o_proj.weight[OUT + each, HEAD + each] = 1.0
    return model


def induction_pair(seed: int, corruption: str) -> tuple[EncodedPair, int]:
    """A prompt of 12 distinct tokens and one of them again, and the index k of that one.

    Corruption `A` replaces the token at k by one that is not in the prompt, `B` the token at k + 1 (the
    answer).
    """
    rng = random.Random(seed)
    *prompt, other = rng.sample(range(3, VOCABULARY), 13)
    k = rng.randint(2, 8)
    clean = [*prompt, prompt[k]]
    corrupted = list(clean)
    corrupted[k if corruption == "A" else k + 1] = other
    texts = Pair(f"{corruption}{seed}", "clean", "corrupted", "answer", "other")
    return EncodedPair(texts, tuple(clean), tuple(corrupted), prompt[k + 1], other), k
