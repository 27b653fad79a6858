"""Edges: the hand-built circuit's are where they were written, and every edge is that of a plain forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from edges_oracle import EdgeOracle
from induction_circuit import VARIANTS, Plan, induction_llama, induction_pair, lean
from tiny_llama import save_tiny
from transformers import GPT2LMHeadModel, LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

from greatctl import model as models
from greatctl.errors import ResourceError, StageError, UsageError
from greatctl.patching.edges import EdgeEffects, edge_effects
from greatctl.patching.graph import graph
from greatctl.patching.metrics import LogitDiff, LogProb
from greatctl.patching.pairs import EncodedPair, Pair
from greatctl.patching.writes import edge_group, make_sources

METRICS = {"logit-diff": LogitDiff()}
BOTH = {**METRICS, "log-prob": LogProb()}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model": LlamaForCausalLM},
    "mistral": {"model": MistralForCausalLM, "sliding_window": 4},
    "qwen2": {"model": Qwen2ForCausalLM},
    "qwen3": {"model": Qwen3ForCausalLM, "head_dim": 16},
}
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4}
BACKUPS = {
    "beside it": Plan(backup=(0, 1)),
    "in another group": Plan(n_heads=4, n_kv_heads=2, back=(0, 0), backup=(0, 3)),
    "in another layer": Plan(n_layers=3, back=(0, 0), backup=(1, 1), match=(2, 0)),
}


def circuit(plan: Plan, corruption: str, direction: str, n_pairs: int = 2, **how: Any) -> dict[str, float]:
    """Edge -> mean normalised effect; 0 is the corrupted and 1 the clean run."""
    model = lean(induction_llama(plan))
    pairs = [induction_pair(seed, corruption, plan.vocabulary)[0] for seed in range(n_pairs)]
    found = edge_effects(model, edge_group(model, pairs), METRICS, direction, **how)
    means = found.normalised("logit-diff").mean(0)[:, 0].tolist()
    return {edge.name: value for edge, value in zip(found.edges, means, strict=True)}


def written(plan: Plan, corruption: str) -> dict[str, float]:
    """The edges along which the weights carry what the corruption changed; 8 % is the wrong answer's own token at k."""
    (early, back), (late, match) = plan.back, plan.match
    kv = f"a{late}.kv{plan.kv(match)}"
    found = {f"embed->{kv}.v": 1.0 if corruption == "B" else 0.08, f"a{late}.h{match}->logits.in": 1.0}
    if corruption == "A":
        found |= {f"embed->a{early}.kv{plan.kv(back)}.v": 1.0, f"a{early}.h{back}->{kv}.k": 1.0}
    return found


@pytest.mark.parametrize("corruption", ["A", "B"])
@pytest.mark.parametrize("name", [name for name in VARIANTS if "decoys" not in name])
def test_denoising_finds_exactly_the_edges_that_were_written(name, corruption):
    plan = VARIANTS[name]
    found, wanted = circuit(plan, corruption, "denoising"), written(plan, corruption)
    off = {edge: value for edge, value in found.items() if abs(value - wanted.get(edge, 0.0)) > 0.005}
    assert not off
    key = f"a{plan.back[0]}.h{plan.back[1]}->a{plan.match[0]}.kv{plan.kv(plan.match[1])}.k"
    assert found[key] == pytest.approx(1.0 if corruption == "A" else 0.0, abs=1e-3)


@pytest.mark.parametrize("name", [name for name in VARIANTS if "decoys" in name])
def test_decoy_heads_do_not_hide_the_edges(name):
    plan = VARIANTS[name]
    for corruption in "AB":
        found, wanted = circuit(plan, corruption, "denoising"), written(plan, corruption)
        assert all(abs(value - wanted.get(edge, 0.0)) < 0.05 for edge, value in found.items())


def test_noising_any_edge_of_the_only_path_breaks_it():
    plan = VARIANTS["as in the facts"]
    found = circuit(plan, "A", "noising")
    broken = {edge for edge, value in found.items() if value < 0.5}
    assert broken == {edge for edge, value in written(plan, "A").items() if value > 0.5}
    assert all(value == pytest.approx(1.0, abs=0.02) for edge, value in found.items() if edge not in broken)


@pytest.mark.parametrize("name", BACKUPS)
def test_with_a_backup_head_no_edge_into_k_is_necessary_and_either_is_sufficient(name):
    plan = BACKUPS[name]
    kv = f"a{plan.match[0]}.kv{plan.kv(plan.match[1])}"
    assert plan.backup is not None
    heads = [f"a{layer}.h{head}->{kv}.k" for layer, head in (plan.back, plan.backup)]
    sufficient, necessary = circuit(plan, "A", "denoising"), circuit(plan, "A", "noising")
    assert [sufficient[edge] for edge in heads] == pytest.approx([1.0, 1.0], abs=0.01)
    assert [necessary[edge] for edge in heads] == pytest.approx([1.0, 1.0], abs=0.02)


def test_an_edge_acts_at_the_position_at_which_it_was_written():
    plan = VARIANTS["smaller vocabulary and heads"]
    model = lean(induction_llama(plan))
    (pair, k), wanted = induction_pair(3, "A", plan.vocabulary), {}
    found = edge_effects(model, edge_group(model, [pair]), METRICS, "denoising", positions="each")
    for edge, values in zip(found.edges, found.normalised("logit-diff")[0].tolist(), strict=True):
        wanted |= {(edge.name, at): value for at, value in enumerate(values) if abs(value) > 0.5}
    last = len(pair.clean_ids) - 1
    places = {("embed->a0.kv1.v", k), ("a0.h3->a1.kv0.k", k + 1), ("a1.h0->logits.in", last)}
    assert set(wanted) == places


def tiny(family: str, folder: Any) -> tuple[EdgeOracle, Any]:
    hf = save_tiny(folder / family, **{**FAMILIES[family], **SIZES}).requires_grad_(False)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    hf.save_pretrained(folder / family)
    return EdgeOracle(hf), models.load(folder / family, name=family)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[EdgeOracle, Any]:
    return tiny(request.param, tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[EdgeOracle, Any]:
    return tiny("llama", tmp_path_factory.mktemp("llama"))


def pairs_of(n: int, length: int = 7) -> list[EncodedPair]:
    made = []
    for seed in range(n):
        clean = torch.randint(2, 320, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        corrupted = [*clean[:2], clean[2] % 300 + 3, clean[3] % 300 + 5, *clean[4:]]
        made.append(EncodedPair(Pair(f"p{seed}", "a", "b", "c", "d"), tuple(clean), tuple(corrupted), 11, 12))
    return made


def plain(
    oracle: EdgeOracle, found: EdgeEffects, pair: EncodedPair, row: int, direction: str, mask: Sequence[bool] | None
) -> float:
    """The largest distance of any edge's logit difference from one Hugging Face forward."""
    both = (pair.corrupted_ids, pair.clean_ids)
    base, source = both if direction == "denoising" else both[::-1]
    here, there = oracle.run(base), oracle.run(source)
    worst = 0.0
    for at, edge in enumerate(found.edges):
        change = there[edge.sender.name] - here[edge.sender.name]
        places = range(found.values["logit-diff"].shape[2])
        for place in places:
            some = change if mask is None else change * torch.tensor([i == place for i in range(len(base))])[:, None]
            logits = oracle.edge(base, edge.receiver.name, some, here)
            wanted = float(logits[pair.answer_id] - logits[pair.wrong_answer_id])
            worst = max(worst, abs(wanted - float(found.values["logit-diff"][row, at, place])))
    return worst


def test_every_edge_is_that_of_a_plain_hugging_face_forward(case):
    oracle, model = case
    pairs = pairs_of(2)
    for direction, row in (("denoising", 0), ("noising", 1)):
        found = edge_effects(model, edge_group(model, pairs), BOTH, direction, batch=37)
        assert plain(oracle, found, pairs[row], row, direction, None) <= 1e-5
        ends = found.corrupted if direction == "denoising" else found.clean
        moved = (found.values["logit-diff"] - ends["logit-diff"][:, None, None]).abs() > 1e-4
        assert moved.float().mean() > 0.5  # the comparison is about something
        assert found.values["log-prob"].shape == (2, len(found.edges), 1)


def test_edges_at_single_positions_are_those_of_plain_forwards(llama):
    oracle, model = llama
    pairs = pairs_of(2)
    edges = model_edges(model, ["a0.h1->a1.kv1.?", "embed->a1.h2.q", "m0->m1.in", "a1.h0->m1.in", "a0.h3->logits.in"])
    found = edge_effects(model, edge_group(model, pairs), METRICS, "denoising", positions="each", edges=edges, batch=5)
    assert plain(oracle, found, pairs[1], 1, "denoising", [True]) <= 1e-5


def model_edges(model: Any, patterns: list[str]) -> list[Any]:
    return graph(model).select(patterns)


def test_an_ablated_sender_adds_nothing_or_its_mean(llama):
    oracle, model = llama
    pairs = pairs_of(3)
    runs = [oracle.run(pair.corrupted_ids) for pair in pairs]
    mean = {name: torch.stack([run[name] for run in runs]).mean(0) for name in runs[0]}
    nothing = {name: torch.zeros_like(value) for name, value in mean.items()}
    edges = model_edges(model, ["embed->a0.kv0.v", "a0.h1->a1.kv?.k", "m0->a1.h3.q", "a1.h2->logits.in"])
    for kind, added in (("zero", nothing), ("mean", mean)):
        sources = make_sources(model, pairs, kind)
        group = edge_group(model, pairs, sources=sources)
        found = edge_effects(model, group, METRICS, "noising", edges=edges, sources=sources)
        here = oracle.run(pairs[1].clean_ids)
        for at, edge in enumerate(found.edges):
            change = added[edge.sender.name] - here[edge.sender.name]
            logits = oracle.edge(pairs[1].clean_ids, edge.receiver.name, change)
            assert float(logits[11] - logits[12]) == pytest.approx(
                float(found.values["logit-diff"][1, at, 0]), abs=1e-5
            )


def test_sources_that_the_group_was_not_prepared_with_are_refused(llama):
    _, model = llama
    pairs = pairs_of(2)
    with pytest.raises(UsageError, match="from zero values"):
        edge_effects(model, edge_group(model, pairs), METRICS, "noising", sources=make_sources(model, pairs, "zero"))


def test_pairs_of_unequal_length_take_the_sender_from_the_aligned_position(llama):
    oracle, model = llama
    clean, corrupted = (2, 5, 9, 7, 30, 8), (2, 6, 7, 30, 8)
    alignment = ((0, 0), (3, 2), (4, 3), (5, 4))
    pair = EncodedPair(Pair("u", "a", "b", "c", "d"), clean, corrupted, 20, 21, alignment=alignment)
    edges = model_edges(model, ["a0.h?->a1.kv0.v", "m0->m1.in", "a1.h1->logits.in"])
    found = edge_effects(model, edge_group(model, [pair]), METRICS, "noising", edges=edges)
    here, there = oracle.run(clean), oracle.run(corrupted)
    for at, edge in enumerate(found.edges):
        change = torch.zeros_like(here["embed"])
        for mine, theirs in alignment:
            change[mine] = there[edge.sender.name][theirs] - here[edge.sender.name][mine]
        logits = oracle.edge(clean, edge.receiver.name, change)
        assert float(logits[20] - logits[21]) == pytest.approx(float(found.values["logit-diff"][0, at, 0]), abs=1e-5)


def test_answers_of_several_tokens_are_scored_by_their_whole_runs(llama):
    _, model = llama
    pairs = [replace(pair, answers=((11, 30, 4),), wrong_answers=((12, 5),)) for pair in pairs_of(2)]
    edges = model_edges(model, ["embed->a0.kv0.v", "a0.h1->a1.kv1.k", "m1->logits.in"])
    ours, theirs = (
        edge_effects(model, edge_group(model, some), BOTH, "noising", edges=edges) for some in (pairs, pairs[:1])
    )
    assert torch.isfinite(ours.values["logit-diff"]).all()
    assert torch.allclose(ours.values["logit-diff"][:1], theirs.values["logit-diff"], atol=1e-5)
    assert (ours.values["logit-diff"][0, :, 0] != ours.clean["logit-diff"][0]).all()


def test_a_run_patched_with_itself_is_the_baseline(llama):
    _, model = llama
    pair = pairs_of(1)[0]
    same = replace(pair, corrupted_ids=pair.clean_ids)
    found = edge_effects(model, edge_group(model, [same]), METRICS, "denoising")
    assert (found.values["logit-diff"] == found.clean["logit-diff"][:, None, None]).all()


def test_a_batch_that_does_not_fit_is_halved_and_gives_the_same(llama, monkeypatch):
    _, model = llama
    group, resume, said = edge_group(model, pairs_of(2)), model.resume, []
    edges = model_edges(model, ["a0.*->a1.*", "*->logits.in"])
    whole = edge_effects(model, group, METRICS, "denoising", edges=edges)

    def small(layer: int, residual: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        if len(residual) > 3:
            raise torch.OutOfMemoryError("too much")
        return resume(layer, residual, *args, **more)

    monkeypatch.setattr(model, "resume", small)
    halved = edge_effects(model, group, METRICS, "denoising", edges=edges, said=said.append)
    assert torch.allclose(halved.values["logit-diff"], whole.values["logit-diff"], atol=1e-6)
    assert said and "going on with" in said[0]
    monkeypatch.setattr(model, "resume", lambda *args, **more: small(0, torch.empty(9)))
    with pytest.raises(ResourceError):
        edge_effects(model, group, METRICS, "denoising", edges=edges)


@pytest.mark.parametrize("fault", ["a head's output", "an input that nobody reads"])
def test_the_self_checks_stop_a_model_that_computes_something_else(fault, tmp_path, monkeypatch):
    _, model = tiny("llama", tmp_path)
    group = edge_group(model, pairs_of(2))
    if fault == "a head's output":
        outputs = model.head_outputs
        monkeypatch.setattr(model, "head_outputs", lambda *args: outputs(*args) * 1.3)
    else:
        resume = model.resume

        def deaf(layer: int, residual: torch.Tensor, edits: Any = (), **more: Any) -> torch.Tensor:
            return resume(layer, residual, [e for e in edits if "_input" not in e.site], **more)

        monkeypatch.setattr(model, "resume", deaf)
    with pytest.raises(StageError) as error:
        edge_effects(model, group, METRICS, "denoising", edges=model_edges(model, ["a0.h0->a1.kv0.v"]))
    assert error.value.name == "self-check" and "a1.kv0.v" in error.value.message


def test_transformer_lens_refuses_edges_and_names_the_engine(tmp_path):
    pytest.importorskip("transformer_lens")
    save_tiny(tmp_path / "t", **SIZES)
    bridge = models.load(tmp_path / "t", name="t", engine="transformer-lens")
    with pytest.raises(UsageError) as error:
        edge_effects(bridge, edge_group(bridge, pairs_of(1)), METRICS, "denoising")
    assert "--engine lean" in error.value.fix


def test_gpt2_has_edges_too(tmp_path):
    save_tiny(tmp_path / "t", model=GPT2LMHeadModel, num_hidden_layers=2)
    model = models.load(tmp_path / "t", name="t")
    found = edge_effects(model, edge_group(model, pairs_of(2)), METRICS, "denoising")  # checked while it runs
    assert len(found.edges) == len(set(found.edges)) == 4 * 3 + 5 + 6 * 12 + 10 + 11
