"""Masked runs: everything kept is one run, nothing the other, and anything between is what the definition says."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from edges_oracle import EdgeOracle
from induction_circuit import Plan, induction_llama, induction_pair, lean
from test_edges import BACKUPS, METRICS, llama, pairs_of, tiny

from greatctl.errors import ResourceError, StageError, UsageError
from greatctl.model import Intervention
from greatctl.patching.edges import edge_effects
from greatctl.patching.graph import Edge, Graph, Node, graph
from greatctl.patching.masked import Kept, MaskedRuns
from greatctl.patching.writes import edge_group, make_sources

__all__ = ["llama"]  # a fixture


def drawn(whole: Graph, share: float, seed: int) -> list[Edge]:
    return [edge for edge in whole.edges if random.Random(f"{seed} {edge.name}").random() < share]


def names(kept: Kept) -> set[str]:
    return {one.name for one in kept}


def off(ours: torch.Tensor, theirs: torch.Tensor | Sequence[torch.Tensor]) -> float:
    return float((ours - torch.stack(list(theirs))).abs().max())


def test_all_edges_are_the_clean_run_and_none_the_corrupted_one(llama):
    oracle, model = llama
    pairs = pairs_of(3)
    runs, whole = MaskedRuns(model, edge_group(model, pairs)), graph(model)
    clean, corrupted = ([oracle.logits(getattr(p, ids)) for p in pairs] for ids in ("clean_ids", "corrupted_ids"))
    every: list[Kept] = [list(whole.edges), whole.nodes, [], [*whole.senders[:1], *whole.edges]]
    for kept, logits in zip(every, runs.logits(every), strict=True):
        assert off(logits, clean if kept else corrupted) <= 1e-5
    assert off(runs.logits([whole.senders])[0], clean) <= 1e-5
    turned = MaskedRuns(model, edge_group(model, pairs), direction="denoising")
    assert off(turned.logits([list(whole.edges)])[0], corrupted) <= 1e-5
    assert off(turned.logits([[]])[0], clean) <= 1e-5


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_sets_of_edges_give_what_the_definition_written_out_gives(family, tmp_path):
    oracle, model = tiny(family, tmp_path)
    pairs, whole = pairs_of(2), graph(model)
    sets = [drawn(whole, share, seed) for seed, share in enumerate((0.05, 0.3, 0.8))]
    ours = MaskedRuns(model, edge_group(model, pairs), batch=4).logits(sets)
    for kept, logits in zip(sets, ours, strict=True):
        among = names(kept)
        wanted = [
            oracle.masked(p.clean_ids, oracle.run(p.corrupted_ids), lambda s, r, among=among: f"{s}->{r}" in among)
            for p in pairs
        ]
        assert off(logits, wanted) <= 1e-5
    assert off(ours[0], ours[2]) > 1e-2


def test_sets_of_nodes_are_all_edges_out_of_them(llama):
    oracle, model = llama
    pairs, whole = pairs_of(2), graph(model)
    runs = MaskedRuns(model, edge_group(model, pairs))
    for seed in range(2):
        nodes = [node for node in whole.senders if random.Random(f"{seed} {node.name}").random() < 0.5]
        among = set(nodes)
        edges = [edge for edge in whole.edges if edge.sender in among]
        by_node, by_edge = runs.logits([nodes])[0], runs.logits([edges])[0]
        assert off(by_node, by_edge) <= 1e-5
        assert off(by_node, runs.logits([[*nodes[:2], *edges]])[0]) <= 1e-5
        other = oracle.run(pairs[0].corrupted_ids)
        wanted = oracle.masked(pairs[0].clean_ids, other, lambda s, r, among=among: s in {n.name for n in among})
        assert off(by_node[:1], [wanted]) <= 1e-5


def test_leaving_out_all_edges_into_one_input_is_patching_what_it_makes(llama):
    _, model = llama
    pairs, whole = pairs_of(2), graph(model)
    clean, corrupted = (torch.tensor([getattr(p, ids) for p in pairs]) for ids in ("clean_ids", "corrupted_ids"))
    site = "blocks.1.attn.hook_k"
    value = model.capture(corrupted, [site])[site]

    def write(k: torch.Tensor) -> torch.Tensor:
        return torch.cat([k[:, :, :1], value[:, :, 1:]], dim=2)

    patched = model.run(clean, [Intervention(site, write)])[:, -1]
    kept = [edge for edge in whole.edges if edge.receiver.name != "a1.kv1.k"]
    assert off(MaskedRuns(model, edge_group(model, pairs)).logits([kept])[0], patched) <= 1e-5


def test_leaving_out_one_edge_at_the_end_is_noising_it(llama):
    _, model = llama
    pairs, whole = pairs_of(2), graph(model)
    group = edge_group(model, pairs)
    edges = whole.select(["a0.h1->a1.*", "m0->m1.in", "*->logits.in"])
    noised = edge_effects(model, group, METRICS, "noising", edges=edges).values["logit-diff"][:, :, 0]
    sets = [[edge for edge in whole.edges if edge != left_out] for left_out in edges]
    masked = MaskedRuns(model, group).effects(sets, METRICS)["logit-diff"]
    assert torch.allclose(masked.T, noised, atol=1e-5)


def test_an_ablation_stands_outside_the_set(llama):
    oracle, model = llama
    pairs, whole = pairs_of(3), graph(model)
    kept = drawn(whole, 0.5, 1)
    runs = [oracle.run(pair.corrupted_ids) for pair in pairs]
    mean = {name: torch.stack([run[name] for run in runs]).mean(0) for name in runs[0]}
    zero = {name: torch.zeros_like(value) for name, value in mean.items()}
    for kind, other in (("zero", zero), ("mean", mean)):
        sources = make_sources(model, pairs, kind)
        masked = MaskedRuns(model, edge_group(model, pairs, sources=sources), sources=sources)
        wanted = [oracle.masked(p.clean_ids, other, lambda s, r: f"{s}->{r}" in names(kept)) for p in pairs]
        assert off(masked.logits([kept])[0], wanted) <= 1e-5
        inside, outside = masked.ends(METRICS)
        assert torch.allclose(outside["logit-diff"], masked.effects([[]], METRICS)["logit-diff"][0])
        assert inside["logit-diff"].tolist() == pytest.approx(
            [float(x[11] - x[12]) for x in clean_runs(oracle, pairs)], abs=1e-5
        )
        with pytest.raises(UsageError, match=f"from {kind} values"):
            MaskedRuns(model, edge_group(model, pairs, sources=sources), sources=sources, direction="denoising")


def clean_runs(oracle: EdgeOracle, pairs: Sequence[Any]) -> list[torch.Tensor]:
    return [oracle.logits(pair.clean_ids) for pair in pairs]


def faithfulness(plan: Plan, sets: Sequence[Sequence[str]], *, without: bool = False) -> list[float]:
    """Of each set of edges, or of everything but it; 0 is the corrupted and 1 the clean run."""
    model = lean(induction_llama(plan))
    runs = MaskedRuns(model, edge_group(model, [induction_pair(seed, "A", plan.vocabulary)[0] for seed in range(3)]))
    whole = graph(model)
    chosen = [whole.select(some) for some in sets]
    if without:
        chosen = [[edge for edge in whole.edges if edge not in some] for some in chosen]
    (clean, corrupted), found = runs.ends(METRICS), runs.effects(chosen, METRICS)["logit-diff"]
    share = (found - corrupted["logit-diff"]) / (clean["logit-diff"] - corrupted["logit-diff"])
    return share.mean(1).tolist()


def test_the_circuit_of_three_edges_carries_the_whole_effect_and_no_part_of_it_does():
    circuit = ["embed->a0.kv0.v", "a0.h0->a1.kv0.k", "a1.h1->logits.in"]
    parts = [[edge for edge in circuit if edge != left_out] for left_out in circuit]
    whole, *rest = faithfulness(Plan(), [circuit, *parts])
    assert whole > 0.9
    assert all(abs(share) < 0.1 for share in rest)
    assert faithfulness(Plan(), [circuit], without=True)[0] < 0.1


def test_a_backup_head_keeps_the_rest_faithful_without_the_circuit():
    plan = BACKUPS["in another group"]
    circuit = ["embed->a0.kv0.v", "a0.h0->a1.kv0.k", "a1.h1->logits.in"]
    backup = ["embed->a0.kv1.v", "a0.h3->a1.kv0.k", "a1.h1->logits.in"]
    assert all(share > 0.9 for share in faithfulness(plan, [circuit, backup]))
    one, both = faithfulness(plan, [circuit[:2], [*circuit[:2], *backup[:2]]], without=True)
    assert one > 0.9 and both < 0.1


def test_rows_that_do_not_fit_are_halved_and_give_the_same(llama, monkeypatch):
    _, model = llama
    group, whole, said, resume = edge_group(model, pairs_of(2)), graph(model), [], model.resume
    sets = [drawn(whole, 0.5, seed) for seed in range(3)]
    wanted = MaskedRuns(model, group).logits(sets)

    def small(layer: int, residual: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        if len(residual) > 2:
            raise torch.OutOfMemoryError("too much")
        return resume(layer, residual, *args, **more)

    monkeypatch.setattr(model, "resume", small)
    assert off(MaskedRuns(model, group, said=said.append).logits(sets), list(wanted)) <= 1e-6
    assert said
    monkeypatch.setattr(model, "resume", lambda *args, **more: small(0, torch.empty(9)))
    with pytest.raises(ResourceError):
        MaskedRuns(model, group)


def test_in_half_precision_the_checks_pass_and_the_values_are_near_those_of_float32(tmp_path):
    oracle, exact = tiny("llama", tmp_path)
    half = lean(copy.deepcopy(oracle.hf).to(torch.bfloat16))
    pairs, whole = pairs_of(2), graph(exact)
    sets, edges = [drawn(whole, 0.5, 2)], whole.select(["a0.*->a1.kv0.v", "*->logits.in"])
    found = []
    for model in (exact, half):
        group = edge_group(model, pairs)
        values = edge_effects(model, group, METRICS, "noising", edges=edges).values["logit-diff"]
        found.append((MaskedRuns(model, group).effects(sets, METRICS)["logit-diff"], values))
    scale = 0.1 * float(found[0][1].abs().max())
    assert all(float((a - b).abs().max()) < scale for a, b in zip(*found, strict=True))


def test_a_model_whose_heads_add_something_else_is_refused(tmp_path, monkeypatch):
    _, model = tiny("llama", tmp_path)
    outputs, group = model.head_outputs, edge_group(model, pairs_of(2))
    monkeypatch.setattr(model, "head_outputs", lambda *args: outputs(*args) * 1.3)
    with pytest.raises(StageError) as error:
        MaskedRuns(model, group)
    assert error.value.name == "self-check"


def test_a_node_of_another_model_is_refused(llama):
    _, model = llama
    runs = MaskedRuns(model, edge_group(model, pairs_of(1)))
    with pytest.raises(UsageError, match="unknown node 'm7'"):
        runs.logits([[Node("mlp", 7)]])
