"""Circuits: the one that was built by hand is found edge by edge, and each measure says what it should."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from induction_circuit import VARIANTS, Plan, induction_llama, induction_pair, lean

from greatctl.errors import InputError
from greatctl.patching.circuits import Circuit, Wiring, ladder, prune, random_sets, read_circuit, threshold
from greatctl.patching.components import GraphRuns, LatentRuns
from greatctl.patching.faithfulness import SIZES, Ends, areas, count_of, inflated, minimality, sufficiency
from greatctl.patching.metrics import LogitDiff
from greatctl.patching.scoring import score
from greatctl.patching.study import choose, curve, judge, split, verdict
from greatctl.patching.units import groups

METRIC = ("logit-diff", LogitDiff())
BACKUP = Plan(n_heads=4, n_kv_heads=2, back=(0, 0), match=(1, 1), backup=(0, 2))


def edge_runs(plan: Plan, n: int = 6, corruption: str = "A") -> tuple[GraphRuns, Ends, np.ndarray]:
    model = lean(induction_llama(plan))
    pairs = [induction_pair(seed, corruption, plan.vocabulary)[0] for seed in range(n)]
    runs = GraphRuns(model, groups(pairs), METRIC, "counterpart", "edges")
    return runs, Ends.of(runs), np.ones(n, dtype=bool)


def true_edges(plan: Plan) -> set[str]:
    (back, b), (match, m) = plan.back, plan.match
    return {
        f"embed->a{back}.kv{plan.kv(b)}.v",
        f"a{back}.h{b}->a{match}.kv{plan.kv(m)}.k",
        f"a{match}.h{m}->logits.in",
    }


def named(runs: GraphRuns, keep: np.ndarray) -> set[str]:
    return {runs.names[at] for at in np.flatnonzero(keep)}


@pytest.mark.parametrize("name", ["as in the facts", "smaller vocabulary and heads", "decoys, no grouping"])
def test_the_hand_built_circuit_is_found_edge_by_edge(name: str) -> None:
    plan = VARIANTS[name]
    runs, ends, rows = edge_runs(plan)
    scores = score(runs, "edges", rows, METRIC)
    keep = choose(runs, ends, scores, rows, wiring=runs.wiring)
    assert named(runs, keep) == true_edges(plan)
    judged = judge(runs, ends, keep, scores, (rows, rows), range(len(rows)), draws=40, wiring=runs.wiring)
    assert judged.f.mean[0] == pytest.approx(1, abs=0.02) and judged.left.mean[0] == pytest.approx(0, abs=0.02)
    assert (judged.minimality.change > 0.9).all()
    assert judged.sufficiency.beaten >= 39 and judged.sufficiency.p < 0.1
    assert "the 3 edges" in verdict(judged, "edges", held_out=False)


def test_pruning_finds_it_from_gradients_among_decoys_and_a_back_up_head_that_estimates_double() -> None:
    runs, ends, rows = edge_runs(BACKUP)
    scores = score(runs, "edges", rows, METRIC, method="attribution", directions=("denoising",))
    keep = choose(runs, ends, scores, rows, wiring=runs.wiring)
    assert len(named(runs, keep)) > 3
    pruned = named(runs, choose(runs, ends, scores, rows, selection="greedy", wiring=runs.wiring))
    other = Plan(n_heads=4, n_kv_heads=2, back=(0, 2), match=(1, 1))
    assert pruned in (true_edges(BACKUP), true_edges(other))


def test_with_a_back_up_head_one_path_is_enough_and_neither_is_needed() -> None:
    runs, ends, _ = edge_runs(BACKUP)
    at = {name: place for place, name in enumerate(runs.names)}
    paths = ("a0.h0->a1.kv0.k", "a0.h2->a1.kv0.k")
    without = np.ones((3, len(runs.names)), dtype=bool)
    without[0, at[paths[0]]] = without[1, at[paths[1]]] = False
    without[2, [at[path] for path in paths]] = False
    f = ends.share(runs.values(without))
    assert f[:2] == pytest.approx(1, abs=0.02) and f[2] < 0.2  # necessity fails for each, and holds for both
    alone = np.zeros((1, len(runs.names)), dtype=bool)
    alone[0, [at[name] for name in true_edges(BACKUP)]] = True
    assert ends.share(runs.values(alone))[0] == pytest.approx(1, abs=0.05)


def test_another_corruption_has_another_circuit_without_the_previous_token_head() -> None:
    runs, ends, rows = edge_runs(Plan(), corruption="B")
    keep = choose(runs, ends, score(runs, "edges", rows, METRIC), rows, wiring=runs.wiring)
    assert named(runs, keep) == {"embed->a1.kv0.v", "a1.h1->logits.in"}


def test_the_curve_ends_at_one_and_a_whole_circuit_early_makes_a_large_area() -> None:
    runs, ends, rows = edge_runs(VARIANTS["smaller vocabulary and heads"])
    line = curve(runs, ends, score(runs, "edges", rows, METRIC), rows, range(len(rows)), wiring=runs.wiring)
    assert line.f.mean[-1] == pytest.approx(1) and line.counts[-1] == len(runs.names)
    assert line.areas.cpr > 0.93 and line.areas.cmd < 0.07


class Sums:
    """Components with weights: the metric is the sum of those that are kept, times a pair's own size."""

    ablation = "counterpart"

    def __init__(self, weights: Sequence[float], sizes: Sequence[float]) -> None:
        self.weights, self.sizes = np.array(weights), np.array(sizes)
        self.names = [f"c{at}" for at in range(len(weights))]

    def values(self, keep: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        return (keep @ self.weights)[:, None] * self.sizes


def test_faithfulness_is_a_ratio_of_sums_so_a_pair_with_a_tiny_gap_does_not_rule() -> None:
    ends = Ends(np.array([0.0, 0.0]), np.array([10.0, 0.001]))
    values = np.array([[5.0, 1.0]])
    assert ends.share(values)[0] == pytest.approx(6 / 10.001)
    assert ends.each(values)[0].tolist() == pytest.approx([0.5, 1000])
    assert ends.share(values, np.array([True, False]))[0] == pytest.approx(0.5)
    assert np.isnan(Ends(np.zeros(2), np.zeros(2)).share(values)[0])


def test_areas_are_trapezoids_over_the_ten_sizes() -> None:
    assert areas(np.ones(10)).cpr == pytest.approx(0.999) and areas(np.ones(10)).cmd == 0
    half = areas(np.full(10, 1.5))
    assert half.cpr == pytest.approx(1.4985) and half.cmd == pytest.approx(0.4995)
    by_hand = sum((b - a) * (a + b) / 2 for a, b in pairwise(SIZES))
    assert areas(SIZES).cpr == pytest.approx(by_hand)
    assert [count_of(share, 72) for share in SIZES] == [0, 0, 0, 1, 1, 4, 7, 14, 36, 72]


def test_sufficiency_wants_to_be_nearer_to_one_than_nine_of_ten() -> None:
    rng = np.random.default_rng(0)
    assert sufficiency(0.95, rng.uniform(0, 0.5, 100)).p < 1e-4
    assert sufficiency(1.9, rng.uniform(0.5, 1.5, 100)).p > 0.99  # too much is as wrong as too little
    assert sufficiency(0.5, np.full(100, 0.5)).beaten == 0  # a tie is no win
    few = sufficiency(1.0, np.zeros(20))
    assert few.p == pytest.approx(few.floor) and few.p > 0.05  # so few draws decide nothing


def test_minimality_tells_a_needed_component_from_a_passenger() -> None:
    added = np.stack([np.full(100, 1.0), 1.0 - np.linspace(0, 0.1, 100)], 1)
    found = minimality(1.0, np.array([0.2, 0.98]), added)
    assert found.change == pytest.approx([0.8, 0.02]) and found.needed.tolist() == [True, False]
    keep = np.array([True, False, False, False])
    both = inflated(keep, np.array([[0, 1, 1, 0], [1, 0, 0, 0]], dtype=bool), 0)
    assert both.shape == (1, 2, 4) and both[0, 0].tolist() == [True, True, True, False]
    assert both[0].sum(1).tolist() == [3, 2] and both[0, 1, 0]


def test_held_out_pairs_judge_and_the_verdict_says_so() -> None:
    chosen, judging = split([False, True, False])
    assert chosen.tolist() == [True, False, True] and judging.tolist() == [False, True, False]
    assert all(side.all() for side in split([True, True]))
    runs = Sums([5, 4, 1] + [0] * 17, [1.0, 2.0, 3.0])
    ends = Ends.of(runs)
    keep = choose(runs, ends, runs.weights, chosen)
    assert np.flatnonzero(keep).tolist() == [0, 1]
    judged = judge(runs, ends, keep, runs.weights, (chosen, judging), "abc", draws=60)
    said = verdict(judged, "nodes", held_out=True)
    assert said.startswith("the 2 nodes (of 20) restore 0.90 of the effect on held-out pairs; ")
    assert said.endswith("; without them 0.10 is left")
    flat = Sums([1] * 20, [1.0, 2.0, 3.0])
    everything = choose(flat, Ends.of(flat), flat.weights * 1.0, chosen)
    judged = judge(flat, Ends.of(flat), everything, flat.weights * 1.0, (chosen, judging), "abc", draws=60)
    assert verdict(judged, "nodes", held_out=True).startswith("no small circuit found: ")


def test_pruning_keeps_what_is_needed_with_few_looks() -> None:
    looks = []

    def good(keep: np.ndarray) -> bool:
        looks.append(1)
        return bool(keep[[3, 77]].all())

    found = prune(np.ones(100, dtype=bool), np.arange(100.0), good)
    assert np.flatnonzero(found).tolist() == [3, 77] and len(looks) < 40


# embed 0, a 1, b 2, logits 3
WIRES = Wiring([0, 0, 1, 1, 2, 0], [[1], [2], [2], [3], [3], [3]], 4)


def test_edges_count_only_on_a_path_from_the_embedding_to_the_logits() -> None:
    dangling = np.array([1, 0, 1, 0, 0, 0], dtype=bool)
    assert not WIRES.live(dangling).any()
    whole = np.array([1, 0, 1, 0, 1, 0], dtype=bool)
    assert WIRES.live(whole).tolist() == whole.tolist()
    scores = np.array([9.0, 1.0, 8.0, 0.5, -7.0, 0.1])
    assert not threshold(scores, 2, WIRES).any()
    assert np.flatnonzero(threshold(scores, 3, WIRES)).tolist() == [0, 2, 4]
    assert threshold(scores, 6, WIRES).all() and np.flatnonzero(threshold(scores, 2)).tolist() == [0, 2]


def test_random_sets_have_the_size_and_hang_together() -> None:
    rng = random.Random(0)
    n, nodes = 400, 40
    senders = [rng.randrange(nodes - 1) for _ in range(n)]
    feeds = [[rng.randrange(s + 1, nodes)] for s in senders]
    senders[: nodes - 1], feeds[: nodes - 1] = list(range(nodes - 1)), [[at + 1] for at in range(nodes - 1)]
    wiring = Wiring(senders, feeds, nodes)
    keep = np.zeros(n, dtype=bool)
    keep[:60] = True
    sets = random_sets(keep, 20, 0, wiring=wiring)
    assert (sets.sum(1) == 60).all() and len({row.tobytes() for row in sets}) == 20
    assert np.mean([wiring.live(row).sum() for row in sets]) > 40
    assert (sets == random_sets(keep, 20, 0, wiring=wiring)).all()
    strata = ["head"] * 350 + ["mlp"] * 50
    assert (random_sets(keep, 20, 0, strata=strata)[:, 350:].sum() == 0).all()


def test_the_ladder_reaches_everything() -> None:
    assert ladder(10) == [1, 2, 3, 4, 6, 8, 10] and ladder(1) == [1] and ladder(4557)[-1] == 4557


def test_a_circuit_survives_a_file_and_an_edit(tmp_path: Path) -> None:
    circuit = Circuit("edges", ("embed->m0.in", "m0->logits.in"), (1.5, -0.25), model="m", model_revision="r")
    path = tmp_path / "circuit.json"
    path.write_text(circuit.to_json())
    assert read_circuit(path) == circuit
    value = json.loads(path.read_text())
    value["components"] = [value["components"][0], "a0.h0->m0.in"]
    path.write_text(json.dumps(value))
    edited = read_circuit(path)
    assert edited.components == ("embed->m0.in", "a0.h0->m0.in") and edited.scores == (1.5, 0.0)
    names = ["embed->m0.in", "a0.h0->m0.in", "m0->logits.in"]
    assert edited.mask(names).tolist() == [True, True, False]
    with pytest.raises(InputError, match=r"a0\.h0->m0\.in"):
        edited.mask(["embed->m0.in", "a0.h1->m0.in"])


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"kind": "edges"}', '{"kind": "edges", "components": []}', '{"kind": "cells", "components": ["a"]}',
     '{"kind": "edges", "components": ["a", "a"]}', '{"kind": "edges", "ablation": "noise", "components": ["a"]}'],
)  # fmt: skip
def test_what_is_no_circuit_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "circuit.json"
    path.write_text(text)
    with pytest.raises(InputError, match="is not a circuit"):
        read_circuit(path)


class Halves:
    """An autoencoder of a stream: a latent for each half axis, of which it explains the first `known` axes."""

    def __init__(self, width: int, known: int) -> None:
        eye = torch.eye(width)[:known]
        self.W_dec = torch.cat([eye, -eye])

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.W_dec.T).relu()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents @ self.W_dec


def test_latents_of_two_layers_make_a_circuit_and_the_rest_is_an_error_node() -> None:
    plan = Plan()
    model = lean(induction_llama(plan))
    pairs = [induction_pair(seed, "A")[0] for seed in range(4)]
    width = model.d_model
    hooks = {"blocks.0.hook_resid_post": Halves(width, width), "blocks.1.hook_resid_post": Halves(width, width - 8)}
    runs = LatentRuns(model, groups(pairs), METRIC, "counterpart", hooks)
    ends = Ends.of(runs)
    assert ends.full == pytest.approx([9.85] * 4, abs=0.05)  # everything kept is the clean run
    assert ends.empty == pytest.approx([0] * 4, abs=0.05)  # nothing kept is the corrupted one
    rows = np.ones(4, dtype=bool)
    exact = score(runs, "latents", rows, METRIC)
    estimated = score(runs, "latents", rows, METRIC, method="attribution", directions=("denoising", "noising"))
    assert exact.shape == estimated.shape == (len(runs.names),)
    keep = choose(runs, ends, exact, rows, selection="greedy")
    where = {name.partition("#")[0] for name in named(runs, keep)}  # type: ignore[arg-type]
    assert where == set(hooks) and keep.sum() < 0.5 * len(keep)
    axes = [
        int(runs.names[at].partition("#")[2]) for at in np.flatnonzero(keep) if not runs.names[at].endswith("error")
    ]
    before = range(plan.vocabulary, 2 * plan.vocabulary)
    assert any(axis in before for axis in axes)  # what the previous-token head wrote
    mean = LatentRuns(model, groups(pairs), METRIC, "mean", hooks)
    assert Ends.of(mean).full == pytest.approx(ends.full, abs=1e-3)
