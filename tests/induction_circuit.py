"""A Llama whose circuit is known because its weights were written by hand: nothing is trained.

The stream is three copies of the vocabulary and a constant: TOKEN (what stands here), BEFORE (what stood one
position earlier), OUT (what is predicted), and ONE. The `back` head always attends one position back and
copies TOKEN there into BEFORE. The `match` head, in a later block, looks for a position whose BEFORE is the
present TOKEN and copies its TOKEN into OUT. So after "… A B … A" the model says B, by induction and by
nothing else. All other weights are zero, or small random numbers where decoys are asked for.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from greatctl.model.lean import LeanModel
from greatctl.model.loading import ModelInfo
from greatctl.patching.pairs import EncodedPair, Pair

VOCABULARY = 32
SIZE_OF_ONE, STEP_SHARPNESS, MATCH_SHARPNESS, LOUDNESS = 10.0, 20.0, 12.0, 10.0
THETA, STEP_PLANES = 1e12, 6


@dataclass(frozen=True)
class Plan:
    """Where the circuit lies, and in what.

    Attributes:
        vocabulary: at most d_head / 4, so that tokens are matched on planes that hardly turn.
        back, match: (layer, query head) of the two heads.
        backup: a head that does the same as `back`, beside it or in another layer before `match`.
        decoys: standard deviation of the weights of all other heads and of the MLPs.
    """

    vocabulary: int = VOCABULARY
    d_head: int = 128
    n_layers: int = 2
    n_heads: int = 2
    n_kv_heads: int = 1
    back: tuple[int, int] = (0, 0)
    match: tuple[int, int] = (1, 1)
    backup: tuple[int, int] | None = None
    decoys: float = 0.0

    def kv(self, head: int) -> int:
        """The key-value head that serves a query head."""
        return head // (self.n_heads // self.n_kv_heads)


VARIANTS = {
    "as in the facts": Plan(),
    "smaller vocabulary and heads": Plan(vocabulary=16, d_head=64, n_heads=4, n_kv_heads=2, back=(0, 3), match=(1, 0)),
    "third layer, five on one": Plan(vocabulary=24, n_layers=3, n_heads=5, back=(0, 1), match=(2, 4)),
    "decoys, no grouping": Plan(
        vocabulary=16, d_head=64, n_layers=3, n_kv_heads=2, back=(1, 1), match=(2, 0), decoys=0.01
    ),
    "decoys, four on two": Plan(n_heads=4, n_kv_heads=2, back=(0, 2), match=(1, 1), decoys=0.005),
}


def induction_llama(plan: Plan = VARIANTS["as in the facts"]) -> LlamaForCausalLM:
    """The model, in float32 and evaluation mode."""
    v, d, width = plan.vocabulary, plan.d_head, 3 * plan.vocabulary + 8
    token, before, out, one = 0, v, 2 * v, 3 * v
    config = LlamaConfig(
        vocab_size=v,
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=plan.n_layers,
        num_attention_heads=plan.n_heads,
        num_key_value_heads=plan.n_kv_heads,
        head_dim=d,
        max_position_embeddings=64,
        rms_norm_eps=1e-9,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    noise = torch.Generator().manual_seed(v)
    for name, weight in model.named_parameters():
        random_part = plan.decoys * torch.randn(weight.shape, generator=noise) if "layers" in name else 0.0
        weight.copy_(torch.ones_like(weight) if "norm" in name else torch.zeros_like(weight) + random_part)
    rms = math.sqrt((1 + SIZE_OF_ONE**2) / width)
    root = rms * d**0.25  # undoes the norm, and half of the 1/sqrt(d_head) of the scores
    each = torch.arange(v)

    model.model.embed_tokens.weight[each, token + each] = 1.0
    model.model.embed_tokens.weight[:, one] = SIZE_OF_ONE
    model.lm_head.weight[each, out + each] = LOUDNESS * rms

    def empty(layer: int, head: int) -> tuple[torch.nn.Module, int, int]:
        """The attention with this head's weights, and its key-value head's, set to 0; offsets of both."""
        attention, q, kv = model.model.layers[layer].self_attn, head * d, plan.kv(head) * d
        for projection, start in ((attention.q_proj, q), (attention.k_proj, kv), (attention.v_proj, kv)):
            projection.weight[start : start + d] = 0.0
        attention.o_proj.weight[:, q : q + d] = 0.0
        return attention, q, kv

    plane = torch.arange(STEP_PLANES)
    speed = THETA ** (-plane.double() / (d // 2))
    gain = STEP_SHARPNESS / SIZE_OF_ONE * root
    for place in (plan.back, *([plan.backup] if plan.backup else [])):
        back, q, kv = empty(*place)
        back.k_proj.weight[kv + plane, one] = gain
        back.q_proj.weight[q + plane, one] = (gain * speed.cos()).float()
        back.q_proj.weight[q + plane + d // 2, one] = (-gain * speed.sin()).float()
        back.v_proj.weight[kv + each, token + each] = rms
        back.o_proj.weight[before + each, q + each] = 1.0

    match, q, kv = empty(*plan.match)
    slow = d // 2 - v + each
    match.q_proj.weight[q + slow, token + each] = MATCH_SHARPNESS * root
    match.k_proj.weight[kv + slow, before + each] = MATCH_SHARPNESS * root
    match.v_proj.weight[kv + each, token + each] = rms
    match.o_proj.weight[out + each, q + each] = 1.0
    return model


def induction_pair(seed: int, corruption: str, vocabulary: int = VOCABULARY) -> tuple[EncodedPair, int]:
    """A prompt of 12 distinct tokens and one of them again, and the index k of that one.

    Corruption `A` replaces the token at k by one that is not in the prompt, `B` the token at k + 1 (the
    answer).
    """
    rng = random.Random(seed)
    *prompt, other = rng.sample(range(3, vocabulary), 13)
    k = rng.randint(2, 8)
    clean = [*prompt, prompt[k]]
    corrupted = list(clean)
    corrupted[k if corruption == "A" else k + 1] = other
    texts = Pair(f"{corruption}{seed}", "clean", "corrupted", "answer", "other")
    return EncodedPair(texts, tuple(clean), tuple(corrupted), prompt[k + 1], other), k


def lean(hf: LlamaForCausalLM) -> LeanModel:
    """The frozen model of a Hugging Face one."""
    c = hf.config
    info = ModelInfo("tiny", "0", "llama", c.num_hidden_layers, c.hidden_size, c.vocab_size, 64, "float32")
    return LeanModel(hf, info, None, [])
