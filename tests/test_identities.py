"""The exact identities of activation patching, over random tiny models of every lean family.

Numbers as in the field's list of them: A1, A2, A3, A5, A6 and A11 are bit-equal where both sides are computed
by the same plain path; what is batched or reuses a prefix agrees to 1e-5 in float32.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from induction_circuit_oracle import HEADS, STREAM, Oracle, plain_map
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from greatctl.model.interface import Intervention
from greatctl.model.lean import LeanModel
from greatctl.model.loading import ModelInfo
from greatctl.patching.metrics import LogitDiff, Prob
from greatctl.patching.pairs import EncodedPair, Pair
from greatctl.patching.runs import CLEAN, CORRUPTED, Group, prepare
from greatctl.patching.sweep import patch, sweep_layer

FAMILIES: dict[str, tuple[type[Any], type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gpt2": (GPT2Config, GPT2LMHeadModel),
}
LAYERS, LENGTH, VOCABULARY = 3, 8, 40
NEARLY = 1e-5
WHOLE = ("resid_pre", "resid_mid", "resid_post")


def random_model(family: str, seed: int) -> PreTrainedModel:
    """Random weights, large enough that every part matters; shapes differ with the seed."""
    heads, kv = [(4, 2), (4, 1), (2, 2)][seed % 3]
    config, model = FAMILIES[family]
    torch.manual_seed(seed)
    if family == "gpt2":
        made = model(config(vocab_size=VOCABULARY, n_embd=32, n_layer=LAYERS, n_head=heads, n_positions=32))
    else:
        more = {"sliding_window": None} if family == "mistral" else {}
        made = model(
            config(
                vocab_size=VOCABULARY,
                hidden_size=32,
                intermediate_size=24 + 8 * (seed % 5),
                num_hidden_layers=LAYERS,
                num_attention_heads=heads,
                num_key_value_heads=kv,
                head_dim=8 if seed % 2 else 16,
                max_position_embeddings=32,
                **more,
            )
        )
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.12 * torch.randn_like(weight))
    return made.eval().requires_grad_(False)


def frozen(hf: Any, family: str) -> LeanModel:
    c = hf.config
    return LeanModel(hf, ModelInfo("tiny", "0", family, LAYERS, c.hidden_size, VOCABULARY, 32, "float32"), None, [])


def random_pairs(seed: int, n: int = 3) -> list[EncodedPair]:
    """Prompts that part at position 2 or later, in two places."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for i in range(n):
        clean = torch.randint(2, VOCABULARY, (LENGTH,), generator=g).tolist()
        corrupted = list(clean)
        for at in (2 + (i + seed) % 3, 6):
            corrupted[at] = (clean[at] + 1 + 5 * i) % VOCABULARY
        made.append(EncodedPair(Pair(f"p{i}", "", "", "", ""), tuple(clean), tuple(corrupted), 3 + i, 20 + i))
    return made


class Case:
    """A random model with its pairs; groups are made once a site."""

    def __init__(self, family: str, seed: int) -> None:
        self.seed, self.hf = seed, random_model(family, seed)
        self.model, self.pairs = frozen(self.hf, family), random_pairs(seed)
        self._groups: dict[str, Group] = {}

    def group(self, site: str) -> Group:
        if site not in self._groups:
            self._groups[site] = prepare(self.model, self.pairs, site)
        return self._groups[site]

    def patch(self, site: str, layer: int, direction: str, *places: int, **more: Any) -> torch.Tensor:
        """Logits [3, V] after patching all units of a site at some places of every pair (all: none given)."""
        mask = torch.zeros(3, LENGTH, dtype=torch.bool)
        mask[:, list(places) or slice(None)] = True
        return patch(self.model, self.group(site), layer, direction, torch.arange(3), mask, **more)


CASES = [
    pytest.param((family, 5 * more + seed), id=f"{family}-{5 * more + seed}", marks=[pytest.mark.slow] if more else [])
    for more in range(4)
    for seed, family in enumerate(FAMILIES)
]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*request.param)


def test_a1_every_position_of_a_residual_gives_the_other_run_to_the_bit(case):
    for site in WHOLE:
        for layer in range(LAYERS):
            for direction, run in (("denoising", CLEAN), ("noising", CORRUPTED)):
                assert torch.equal(case.patch(site, layer, direction), case.group(site).logits[run]), (site, layer)


def test_a2_a_run_patched_with_itself_is_the_run_to_the_bit(case):
    for site in (*STREAM, "z", "q", "k", "v", "mlp_post"):
        for layer in range(LAYERS):
            group = case.group(site)
            donor = group.values[layer][CORRUPTED]
            assert torch.equal(case.patch(site, layer, "denoising", donor=donor), group.logits[CORRUPTED]), site


def test_a2_for_patterns_which_are_computed_in_the_open(case):
    group = case.group("pattern")
    for layer in range(LAYERS):
        found = case.patch("pattern", layer, "denoising", donor=group.values[layer][CORRUPTED])
        assert torch.allclose(found, group.logits[CORRUPTED], atol=NEARLY)


def test_a3_the_last_residual_at_the_answer_position_is_all_that_is_read(case):
    found = case.patch("resid_post", LAYERS - 1, "denoising", LENGTH - 1)
    assert torch.equal(found, case.group("resid_post").logits[CLEAN])


def test_a4_heads_add_up_to_the_attention_and_parts_to_the_stream(case):
    tokens = torch.tensor([pair.clean_ids for pair in case.pairs])
    blocks = range(LAYERS)
    names = [f"blocks.{i}.{kind}" for i in blocks for kind in ("attn.hook_z", "hook_attn_out", "hook_mlp_out")]
    found = case.model.capture(tokens, [*names, "blocks.0.hook_resid_pre", f"blocks.{LAYERS - 1}.hook_resid_post"])
    stream = found["blocks.0.hook_resid_pre"].clone()
    for layer in blocks:
        z, out = found[f"blocks.{layer}.attn.hook_z"], found[f"blocks.{layer}.hook_attn_out"]
        gpt2 = hasattr(case.hf, "transformer")
        project = case.hf.transformer.h[layer].attn.c_proj if gpt2 else case.hf.model.layers[layer].self_attn.o_proj
        weight = project.weight if gpt2 else project.weight.T
        by_head = weight.reshape(*z.shape[-2:], -1)
        total = torch.einsum("bphd,hdm->bpm", z, by_head) + (project.bias if project.bias is not None else 0)
        assert torch.allclose(total, out, atol=NEARLY)
        stream += out + found[f"blocks.{layer}.hook_mlp_out"]
    assert torch.allclose(stream, found[f"blocks.{LAYERS - 1}.hook_resid_post"], atol=NEARLY)


def test_a5_a_patch_leaves_what_precedes_it_alone(case):
    for site in (*STREAM, *HEADS):
        nothing = torch.zeros(3, LENGTH, dtype=torch.bool)
        group, rows = case.group(site), torch.arange(3)
        before, here = (patch(case.model, group, 1, "denoising", rows, nothing, at=at) for at in (5, 6))
        assert torch.equal(case.patch(site, 1, "denoising", 6, at=5), before), site
        assert not torch.equal(case.patch(site, 1, "denoising", 6, at=6), here), site


def test_a6_before_the_first_differing_token_there_is_no_effect(case):
    for site in (*STREAM, "z", "k"):
        group = case.group(site)
        for layer in range(LAYERS):
            found = case.patch(site, layer, "denoising", 0, 1)
            assert torch.allclose(found, group.logits[CORRUPTED], atol=NEARLY)
        table = sweep_layer(case.model, group, 1, "denoising", {"d": LogitDiff()})["d"]
        table = table if site in STREAM else table.transpose(1, 2).flatten(2)
        base = LogitDiff()(group.logits[CORRUPTED], group.answers).double()
        for row, pair in enumerate(case.pairs):
            assert (table[row, : pair.first_difference] == base[row]).all()
            assert (table[row, pair.first_difference :] != base[row]).any()


def test_a7_the_middle_of_the_stream_reaches_the_mlp_and_what_follows(case):
    """In place, as a new tensor, or added to what the attention gave: the same logits."""
    middle, attention = case.group("resid_mid"), case.group("attn_out")
    for layer in range(LAYERS):
        site, residual = f"blocks.{layer}.hook_resid_mid", middle.residuals[layer][CORRUPTED]
        clean = middle.values[layer][CLEAN]

        def anew(value: torch.Tensor, clean: torch.Tensor = clean) -> torch.Tensor:
            return torch.cat([value[:, :-1], clean[:, -1:]], 1)

        def in_place(value: torch.Tensor, clean: torch.Tensor = clean) -> torch.Tensor:
            value[:, -1] = clean[:, -1]
            return value

        last = torch.full((3,), LENGTH - 1)
        found = [
            case.model.resume(layer, residual.clone(), [Intervention(site, edit)], positions=last)
            for edit in (anew, in_place)
        ]
        change = clean - middle.values[layer][CORRUPTED]
        donor = attention.values[layer][CORRUPTED] + change
        added = case.patch("attn_out", layer, "denoising", LENGTH - 1, donor=donor)
        assert torch.equal(*found) and torch.allclose(found[0], added, atol=NEARLY)
        assert (found[0] - middle.logits[CORRUPTED]).abs().max() > 1e-3


def test_a8_what_leaves_a_block_enters_the_next(case):
    for layer in range(LAYERS - 1):
        for at in range(LENGTH):
            ours = case.patch("resid_post", layer, "denoising", at)
            theirs = case.patch("resid_pre", layer + 1, "denoising", at)
            assert torch.allclose(ours, theirs, atol=1e-6)


def test_a9_gradients_on_or_off_change_nothing(case):
    for site in (*STREAM, *HEADS):
        group = case.group(site)
        name = group.site.at(1)
        last, residual = torch.full((3,), LENGTH - 1), group.residuals[1][CORRUPTED]

        def run(
            grad: bool,
            name: str = name,
            residual: torch.Tensor = residual,
            last: torch.Tensor = last,
            new: torch.Tensor = group.values[1][CLEAN],
        ) -> torch.Tensor:
            with torch.set_grad_enabled(grad):
                new = new.clone().requires_grad_(grad)
                logits = case.model.resume(1, residual, [Intervention(name, lambda value: new)], positions=last)
            assert logits.requires_grad == grad
            return logits.detach()

        assert torch.equal(run(True), run(False)), site


def test_a10_the_batched_sweep_with_prefix_reuse_is_one_plain_forward_a_cell(case):
    oracle, layer, direction = Oracle(case.hf), 1, ("denoising", "noising")[case.seed % 2]
    for site in (*STREAM, *HEADS):
        for cells in (5, 64):
            table = sweep_layer(case.model, case.group(site), layer, direction, {"p": Prob()}, cells)["p"][0]
            if cells == 5:
                pair = case.pairs[0]
                both = (pair.corrupted_ids, pair.clean_ids)
                base, source = both if direction == "denoising" else both[::-1]
                plain = plain_map(oracle, base, source, site, layer).softmax(-1)[..., pair.answer_id]
            ours = table[None] if site in STREAM else table
            assert (ours - plain).abs().max() < NEARLY, (site, cells)


def test_a11_denoising_one_position_is_noising_all_the_others(case):
    for site in WHOLE:
        for at in range(LENGTH):
            others = [place for place in range(LENGTH) if place != at]
            ours, theirs = case.patch(site, 1, "denoising", at), case.patch(site, 1, "noising", *others)
            assert torch.equal(ours, theirs), (site, at)


def test_a12_all_latents_with_the_error_are_the_residual_and_no_latent_is_nothing(case):
    """The delta form x + decode(a') - decode(a), with a random autoencoder that reconstructs badly."""
    g = torch.Generator().manual_seed(9)
    encoder, decoder = (0.3 * torch.randn(shape, generator=g) for shape in ((32, 64), (64, 32)))
    group = case.group("resid_post")
    clean, corrupted = group.values[1]

    def latents(x: torch.Tensor) -> torch.Tensor:
        return (x @ encoder).relu()

    error = clean - latents(clean) @ decoder - (corrupted - latents(corrupted) @ decoder)
    moved = corrupted + (latents(clean) @ decoder - latents(corrupted) @ decoder) + error
    assert torch.allclose(case.patch("resid_post", 1, "denoising", donor=moved), group.logits[CLEAN], atol=1e-4)
    same = latents(corrupted) @ decoder
    still = corrupted + (same - same)
    assert torch.equal(case.patch("resid_post", 1, "denoising", donor=still), group.logits[CORRUPTED])


def test_a14_an_intervention_of_strength_nothing_is_nothing(case):
    tokens = torch.tensor([pair.clean_ids for pair in case.pairs])
    direction = torch.randn(32, generator=torch.Generator().manual_seed(2))
    for kind in ("hook_resid_pre", "hook_resid_mid", "hook_resid_post"):
        edit = Intervention(f"blocks.1.{kind}", lambda value: value + 0.0 * direction)
        assert torch.equal(case.model.run(tokens, [edit]), case.model.run(tokens))
        steered = Intervention(f"blocks.1.{kind}", lambda value: value + 4.0 * direction)
        assert not torch.equal(case.model.run(tokens, [steered]), case.model.run(tokens))


def test_a15_a_key_value_head_serves_its_whole_query_group(case):
    """Cells that do not exist are absent; a value head moves the z of its group's heads and of no other."""
    n_kv, group_size = case.model.n_kv_heads, case.model.n_heads // case.model.n_kv_heads
    for site in ("k", "v"):
        group = case.group(site)
        table = sweep_layer(case.model, group, 1, "denoising", {"d": LogitDiff()})["d"]
        assert table.shape == (3, n_kv, LENGTH) and torch.isfinite(table).all()
        everywhere = sweep_layer(case.model, group, 1, "denoising", {"d": LogitDiff()}, positions="all")["d"]
        for head in range(n_kv):
            seen: list[torch.Tensor] = []

            def watch(value: torch.Tensor, seen: list[torch.Tensor] = seen) -> torch.Tensor:
                seen.append(value.clone())
                return value

            def write(value: torch.Tensor, head: int = head, new: torch.Tensor = group.values[1][CLEAN]) -> Any:
                value = value.clone()
                value[:, :, head] = new[:, :, head]
                return value

            last, residual = torch.full((3,), LENGTH - 1), group.residuals[1][CORRUPTED]
            look = Intervention("blocks.1.attn.hook_z", watch)
            case.model.resume(1, residual, [look], positions=last)
            case.model.resume(1, residual, [Intervention(f"blocks.1.attn.hook_{site}", write), look], positions=last)
            moved = (seen[0] != seen[1]).any(-1).any(0).any(0)
            assert moved.tolist() == [h // group_size == head for h in range(case.model.n_heads)]
            whole = seen[1]

            def replace(value: torch.Tensor, whole: torch.Tensor = whole, head: int = head) -> torch.Tensor:
                value = value.clone()
                mine = slice(head * group_size, (head + 1) * group_size)
                value[:, :, mine] = whole[:, :, mine]
                return value

            edit = Intervention("blocks.1.attn.hook_z", replace)
            by_group = case.model.resume(1, residual, [edit], positions=last)
            difference = LogitDiff()(by_group, group.answers).double()
            assert torch.allclose(difference, everywhere[:, head], atol=NEARLY)
