"""The sweep keeps the exact identities of activation patching, and finds a known circuit."""

from __future__ import annotations

import json
import re

import pytest
import torch
from induction_circuit import induction_llama, induction_pair
from transformers import LlamaConfig, LlamaForCausalLM

from greatctl.errors import InputError, ManifestError, PluginError, StageError
from greatctl.model.lean import LeanModel
from greatctl.model.loading import ModelInfo
from greatctl.patching import SITES
from greatctl.patching.metrics import KL, LogitDiff, Prob, ProbDiff, measure
from greatctl.patching.pairs import EncodedPair, Pair, encode_pairs, read_pairs
from greatctl.patching.runs import CLEAN, CORRUPTED, prepare
from greatctl.patching.sweep import patch, sweep_layer

LENGTH, LAYERS, VOCABULARY = 9, 3, 40


def lean(hf: LlamaForCausalLM) -> LeanModel:
    c = hf.config
    info = ModelInfo("tiny", "0", "llama", c.num_hidden_layers, c.hidden_size, c.vocab_size, 64, "float32")
    return LeanModel(hf, info, None, [])


@pytest.fixture(scope="module")
def hf() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.15,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model(hf) -> LeanModel:
    return lean(hf)


@pytest.fixture(scope="module")
def pairs() -> list[EncodedPair]:
    """Three pairs whose prompts differ from position 3, 4 and 5 on, in two places."""
    g = torch.Generator().manual_seed(1)
    made = []
    for i in range(3):
        clean = torch.randint(2, VOCABULARY, (LENGTH,), generator=g).tolist()
        corrupted = list(clean)
        for at in (3 + i, 6 + i % 2):
            corrupted[at] = (clean[at] + 7) % VOCABULARY
        made.append(EncodedPair(Pair(f"p{i}", "", "", "", ""), tuple(clean), tuple(corrupted), 5 + i, 15 + i))
    return made


def everything(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(n), torch.ones(n, LENGTH, dtype=torch.bool)


def only(n: int, *places: int) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.zeros(n, LENGTH, dtype=torch.bool)
    mask[:, list(places)] = True
    return torch.arange(n), mask


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "resid_post"])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a1_patching_every_position_of_a_residual_is_bit_equal_to_the_source_run(model, pairs, site, layer):
    group = prepare(model, pairs, site)
    found = patch(model, group, layer, "denoising", *everything(3))
    assert torch.equal(found, group.logits[CLEAN])
    found = patch(model, group, layer, "noising", *everything(3))
    assert torch.equal(found, group.logits[CORRUPTED])


@pytest.mark.parametrize("site", SITES)
def test_a2_patching_a_run_with_itself_is_bit_equal_to_the_run(model, pairs, site):
    group = prepare(model, pairs, site)
    for layer in range(LAYERS):
        donor = group.values[layer][CORRUPTED]
        found = patch(model, group, layer, "denoising", *everything(3), donor=donor)
        if site == "pattern":  # the unpatched run was looked into at every layer, this one at a single layer
            assert torch.allclose(found, group.logits[CORRUPTED], atol=1e-5)
        else:
            assert torch.equal(found, group.logits[CORRUPTED])


def test_a3_the_last_residual_at_the_answer_position_is_all_that_the_logits_read(model, pairs):
    group = prepare(model, pairs, "resid_post")
    found = patch(model, group, LAYERS - 1, "denoising", *only(3, LENGTH - 1))
    assert torch.equal(found, group.logits[CLEAN])


@pytest.mark.parametrize("site", SITES)
def test_a5_a_patch_leaves_the_logits_before_it_alone_and_changes_those_at_it(model, pairs, site):
    group = prepare(model, pairs, site)
    for at in (6, 7):
        rows, mask = only(3, at)
        base = patch(model, group, 1, "denoising", rows, torch.zeros_like(mask), at=at - 1)
        assert torch.equal(patch(model, group, 1, "denoising", rows, mask, at=at - 1), base)
        here = patch(model, group, 1, "denoising", rows, torch.zeros_like(mask), at=at)
        assert not torch.equal(patch(model, group, 1, "denoising", rows, mask, at=at), here)


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_a6_before_the_first_differing_token_effects_are_exactly_zero_and_truly_so(model, pairs, direction):
    group = prepare(model, pairs, "resid_pre")
    base = CORRUPTED if direction == "denoising" else CLEAN
    unpatched = measure("logit-diff", LogitDiff(), group.logits[base], group.answers)
    for layer in range(LAYERS):
        table = sweep_layer(model, group, layer, direction, {"logit-diff": LogitDiff()})["logit-diff"]
        for row, pair in enumerate(pairs):
            before = pair.first_difference
            assert (table[row, :before] == unpatched[row]).all()
            assert (table[row, before:] != unpatched[row]).any()
        really = patch(model, group, layer, direction, *only(3, 0, 1, 2))
        assert torch.allclose(really, group.logits[base], atol=1e-6)


def test_a7_patching_resid_mid_equals_adding_its_change_to_attn_out(model, pairs):
    middle, attention = prepare(model, pairs, "resid_mid"), prepare(model, pairs, "attn_out")
    for layer in range(LAYERS):
        change = middle.values[layer][CLEAN] - middle.values[layer][CORRUPTED]
        donor = attention.values[layer][CORRUPTED] + change
        cells = only(3, 6)
        ours = patch(model, middle, layer, "denoising", *cells)
        theirs = patch(model, attention, layer, "denoising", *cells, donor=donor)
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_a8_resid_post_is_the_next_layers_resid_pre(model, pairs):
    after, before = prepare(model, pairs, "resid_post"), prepare(model, pairs, "resid_pre")
    for layer in range(LAYERS - 1):
        metrics = {"logit-diff": LogitDiff()}
        ours = sweep_layer(model, after, layer, "denoising", metrics)["logit-diff"]
        theirs = sweep_layer(model, before, layer + 1, "denoising", metrics)["logit-diff"]
        assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("batch_cells", [1, 4, 64])
def test_a10_the_batched_resumed_sweep_equals_one_plain_forward_a_cell(hf, model, pairs, batch_cells):
    group = prepare(model, pairs, "resid_pre")
    for direction, base_ids, source in (
        ("denoising", "corrupted_ids", CLEAN),
        ("noising", "clean_ids", CORRUPTED),
    ):
        for layer in range(LAYERS):
            table = sweep_layer(model, group, layer, direction, {"prob": Prob()}, batch_cells)["prob"]
            for row, pair in enumerate(pairs):
                for at in range(LENGTH):
                    value = group.values[layer][source][row, at]
                    logits = plain_forward(hf, getattr(pair, base_ids), layer, at, value)
                    assert abs(table[row, at] - logits.softmax(-1)[pair.answer_id]) < 1e-5


def plain_forward(hf, ids, layer: int, at: int, value: torch.Tensor) -> torch.Tensor:
    """Last-position logits of the Hugging Face model with one activation entering `layer` overwritten."""

    def write(module, args, kwargs):
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        hidden[0, at] = value
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    handle = hf.model.layers[layer].register_forward_pre_hook(write, with_kwargs=True)
    try:
        return hf(torch.tensor([ids]), use_cache=False).logits[0, -1]
    finally:
        handle.remove()


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "resid_post"])
def test_a11_denoising_one_position_is_noising_all_the_others(model, pairs, site):
    group = prepare(model, pairs, site)
    for at in range(LENGTH):
        rows, mask = only(3, at)
        ours = patch(model, group, 1, "denoising", rows, mask)
        theirs = patch(model, group, 1, "noising", rows, ~mask)
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_denoising_moves_towards_the_clean_run_and_noising_away_from_it(model, pairs):
    """At layer 0 the whole difference is in the differing tokens: these cells settle the signs."""
    one = [EncodedPair(p.pair, p.clean_ids, swap(p, 4), p.answer_id, p.wrong_answer_id) for p in pairs]
    group = prepare(model, one, "resid_pre")
    clean = measure("kl", KL(), group.logits[CLEAN], group.answers)
    corrupted = measure("kl", KL(), group.logits[CORRUPTED], group.answers)
    assert torch.allclose(clean, torch.zeros(3, dtype=torch.float64), atol=1e-6) and (corrupted > 1e-3).all()
    assert torch.allclose(sweep_layer(model, group, 0, "denoising", {"kl": KL()})["kl"][:, 4], clean, atol=1e-6)
    assert torch.allclose(sweep_layer(model, group, 0, "noising", {"kl": KL()})["kl"][:, 4], corrupted, atol=1e-6)


def swap(pair: EncodedPair, at: int) -> tuple[int, ...]:
    ids = list(pair.clean_ids)
    ids[at] = (ids[at] + 11) % VOCABULARY
    return tuple(ids)


@pytest.mark.parametrize("corruption", ["A", "B"])
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_the_hand_built_induction_circuit_is_found_where_it_is(corruption, direction):
    """Percent of the gap that one cell closes (denoising) or opens (noising), averaged over prompts."""
    model = lean(induction_llama())
    made = [induction_pair(seed, corruption) for seed in range(12)]
    group = prepare(model, [pair for pair, _ in made], "resid_pre")
    ends = [measure("d", LogitDiff(), group.logits[run], group.answers) for run in (CLEAN, CORRUPTED)]
    assert torch.allclose(ends[0], torch.tensor(9.85).double(), atol=0.02)
    assert torch.allclose(ends[1], torch.tensor(0.0 if corruption == "A" else -9.85).double(), atol=0.02)
    at = {"A": {0: {0: 100}, 1: {0: 8, 1: 100}}, "B": {0: {1: 100}, 1: {1: 100}}}[corruption]
    if direction == "noising":  # under A the query token's match is lost with either half of the pair
        at = {"A": {0: {0: 100}, 1: {1: 92}}, "B": {0: {1: 100}, 1: {1: 100}}}[corruption]
    base = ends[1] if direction == "denoising" else ends[0]
    gap = (ends[0] - ends[1]) * (1 if direction == "denoising" else -1)
    for layer in (0, 1):
        table = sweep_layer(model, group, layer, direction, {"d": LogitDiff()})["d"]
        percent = 100 * (table - base[:, None]) / gap[:, None]
        expected = torch.zeros_like(percent)
        for row, (_, k) in enumerate(made):
            for offset, value in at[layer].items():
                expected[row, k + offset] = value
        assert (percent - expected).abs().max() < 1.0, percent.round()


class Deaf:
    """A model whose patches are lost, one way or the other."""

    def __init__(self, model: LeanModel, how: str) -> None:
        self._model, self._how = model, how
        self.n_layers, self.device = model.n_layers, model.device
        self.capture, self.run = model.capture, model.run

    def resume(self, layer, residual, interventions=(), *, positions=None):
        if self._how == "edited copy is dropped":
            for intervention in interventions:
                intervention.edit(residual)
        return self._model.resume(layer, residual, (), positions=positions)


@pytest.mark.parametrize("how", ["never called", "edited copy is dropped"])
@pytest.mark.parametrize("site", ["resid_pre", "mlp_out"])
def test_a_patch_that_does_nothing_is_an_error_that_names_the_site(model, pairs, how, site):
    group = prepare(model, pairs, site)
    with pytest.raises(StageError, match=rf"blocks\.1\.hook_{site}"):
        sweep_layer(Deaf(model, how), group, 1, "denoising", {"logit-diff": LogitDiff()})


def test_a_model_that_looks_ahead_is_refused(model, pairs):
    group = prepare(model, pairs, "resid_pre")
    group.values[1][CLEAN][:, 0] += 1.0
    with pytest.raises(StageError, match="self-check") as caught:
        sweep_layer(model, group, 1, "denoising", {"logit-diff": LogitDiff()})
    assert "before the first differing token" in caught.value.why


def test_built_in_metrics_are_per_example_and_mean_what_they_say(model, pairs):
    group = prepare(model, pairs, "resid_pre")
    logits, answers = group.logits[CORRUPTED], group.answers
    rows = range(3)
    p = logits.softmax(-1)
    expected = {
        LogitDiff: [logits[i, answers.answer[i]] - logits[i, answers.wrong_answer[i]] for i in rows],
        Prob: [p[i, answers.answer[i]] for i in rows],
        ProbDiff: [p[i, answers.answer[i]] - p[i, answers.wrong_answer[i]] for i in rows],
        KL: [(q * (q / p[i]).log()).sum() for i in rows for q in [group.logits[CLEAN][i].softmax(-1)]],
    }
    for metric, values in expected.items():
        assert measure(metric.name, metric(), logits, answers).tolist() == pytest.approx(
            [float(v) for v in values], 1e-4
        )


@pytest.mark.parametrize(
    ("returns", "said"),
    [
        (lambda logits, answers: logits.mean(), r"shape \[\]"),
        (lambda logits, answers: logits[:, :2], r"shape \[3, 2\]"),
        (lambda logits, answers: logits[:, 0] / 0, "inf|nan"),
        (lambda logits, answers: 0.5, "0.5, not a tensor"),
        (lambda logits, answers: logits @ logits, "RuntimeError"),
    ],
)
def test_a_metric_that_breaks_its_contract_is_named_with_the_value(model, pairs, returns, said):
    group = prepare(model, pairs, "resid_pre")
    with pytest.raises(PluginError, match="'odd'") as caught:
        measure("odd", returns, group.logits[CLEAN], group.answers)
    assert caught.value.exit_code == 8 and "PatchMetric" in caught.value.why
    assert re.search(said, caught.value.why)


def by_words(text: str) -> list[int]:
    """A toy tokenizer: BOS, then a token a word, leading space included; a word with `--` is two."""
    pieces = [part for word in re.findall(r" ?[^ ]+| $", text) for part in re.split("(?<=--)", word) if part]
    return [1, *(2 + sum(map(ord, piece)) * len(piece) for piece in pieces)]


PAIR_FILE = """\
concept = "greatness"

[[pair]]
id = "good"
clean = "He was a great"
corrupted = "He was a small"
answer = " man"
wrong_answer = " boy"
heldout = true

[[pair]]
id = "long"
clean = "He was a very great"
corrupted = "He was a small"
answer = " man"
wrong_answer = " boy"

[[pair]]
id = "two tokens"
clean = "He was a great"
corrupted = "He was a small"
answer = " states--man"
wrong_answer = " boy"

[[pair]]
id = "same answer"
clean = "He was a great"
corrupted = "He was a small"
answer = " man"
wrong_answer = " man"

[[pair]]
id = "same prompt"
clean = "He was a great"
corrupted = "He was a great"
answer = " man"
wrong_answer = " boy"

[[pair]]
id = "merges"
clean = "He was a great"
corrupted = "He was a small"
answer = "er"
wrong_answer = " boy"
"""


def test_pairs_that_do_not_fit_are_refused_with_their_reason(tmp_path):
    path = tmp_path / "pairs.toml"
    path.write_text(PAIR_FILE)
    encoded, refused = encode_pairs(read_pairs(path), by_words)
    assert [e.pair.id for e in encoded] == ["good"]
    assert encoded[0].length == 5 and encoded[0].first_difference == 4
    assert encoded[0].clean_ids.count(1) == 1 and encoded[0].pair.heldout
    assert encoded[0].pair.concept == "greatness"
    reasons = {r.pair.id: r.reason for r in refused}
    assert "6 tokens, the corrupted one 5" in reasons["long"]
    assert "2 tokens, not one" in reasons["two tokens"]
    assert "both answers are token" in reasons["same answer"]
    assert "the same tokens" in reasons["same prompt"]
    assert "merges with the end of the prompt" in reasons["merges"]
    assert "context of 4" in encode_pairs([encoded[0].pair], by_words, n_ctx=4)[1][0].reason


def test_pairs_as_json_lines_are_the_same_pairs(tmp_path):
    (tmp_path / "a.toml").write_text(PAIR_FILE)
    pairs = read_pairs(tmp_path / "a.toml")
    lines = [json.dumps({k: getattr(p, k) for k in p.__dataclass_fields__}) for p in pairs]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    assert read_pairs(tmp_path / "a.jsonl") == pairs


ONE_LINE = '{"id": "a", "clean": "b", "corrupted": "c", "answer": "d", "wrong_answer": "e"}'


@pytest.mark.parametrize(
    ("name", "text", "line", "said"),
    [
        ("a.toml", 'concept = "x"\n[[pair]]\nid = "a"\nclaen = "b"\n', 2, "'clean'"),
        ("a.toml", 'concept = "x"\n[[pair]\n', 2, ""),
        ("a.toml", '[[pairs]]\nid = "a"\n', 1, "'pair'"),
        ("a.toml", '[[pair]]\nid = "a"\nclean = "b"\n', 1, ""),
        ("a.toml", "[[pair]]\nid = 3\n", 1, "found 3"),
        ("a.jsonl", '\n{"id": "a", "clean"\n', 2, ""),
        (
            "a.jsonl",
            '{"id": "a", "clean": "b", "corrupted": "c", "answer": "d", "wrong_answer": "e"}\n' * 2,
            2,
            "unique",
        ),
        ("a.jsonl", "[1, 2]\n", 1, ""),
    ],
)
def test_a_malformed_pair_file_is_named_with_its_line(tmp_path, name, text, line, said):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ManifestError, match=name) as caught:
        read_pairs(path)
    assert caught.value.where == f"{path}:{line}" and said in caught.value.why


def test_a_missing_or_empty_pair_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"none\.toml"):
        read_pairs(tmp_path / "none.toml")
    (tmp_path / "empty.toml").write_text('concept = "x"\n')
    with pytest.raises(InputError, match="holds no pair"):
        read_pairs(tmp_path / "empty.toml")
