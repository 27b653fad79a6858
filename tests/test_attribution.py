"""Attribution: gradients are the model's own, known circuits give known numbers, and integrated gradients add up."""

from __future__ import annotations

from dataclasses import replace
from types import MethodType
from typing import Any

import induction_circuit
import pytest
import torch
from induction_circuit import induction_llama, induction_pair, lean
from tiny_llama import save_tiny
from transformers import LlamaForCausalLM, Qwen3ForCausalLM

from greatctl.errors import UsageError
from greatctl.model.interface import Intervention
from greatctl.model.lean import LeanModel
from greatctl.patching.attribution import DROP, METHODS, latent_scores, node_scores
from greatctl.patching.edge_attribution import edge_scores
from greatctl.patching.gradients import Tape
from greatctl.patching.graph import graph
from greatctl.patching.latents import Latents
from greatctl.patching.metrics import CE, KL, LogitDiff, Prob, Rank
from greatctl.patching.pairs import EncodedPair, Pair
from greatctl.patching.runs import prepare
from greatctl.patching.sites import SITES
from greatctl.patching.sweep import sweep_layer

DIFF = {"logit-diff": LogitDiff()}
SMALL = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "head_dim": 4}


def in_double(hf: Any) -> LeanModel:
    """The frozen model in float64, its norms included, which otherwise compute in float32 whatever the weights."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    for module in hf.double().modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(forward, module)
    return lean(hf)


@pytest.fixture(scope="module", params=[LlamaForCausalLM, Qwen3ForCausalLM], ids=["llama", "qwen3"])
def model(request, tmp_path_factory) -> LeanModel:
    hf = save_tiny(tmp_path_factory.mktemp("tiny"), model=request.param, **SMALL)
    return in_double(hf)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> LeanModel:
    return in_double(save_tiny(tmp_path_factory.mktemp("tiny"), **SMALL))


def pairs_of(*prompts: tuple[list[int], list[int]], answer: int = 5, wrong: int = 9) -> list[EncodedPair]:
    return [
        EncodedPair(Pair(f"p{at}", "a", "b", "c", "d"), tuple(clean), tuple(corrupted), answer, wrong)
        for at, (clean, corrupted) in enumerate(prompts)
    ]


PAIRS = pairs_of(([2, 7, 30, 4, 11], [2, 8, 31, 4, 11]), ([2, 40, 41, 42, 43], [2, 40, 51, 42, 53]))


def moved(model: LeanModel, pair: EncodedPair, site: str, change: torch.Tensor) -> float:
    """The metric of the corrupted run with a change added at a site."""
    tokens = torch.tensor([pair.corrupted_ids])
    logits = model.run(tokens, [Intervention(site, lambda value: value + change)], positions=torch.tensor([4]))[0]
    return float(logits[pair.answer_id] - logits[pair.wrong_answer_id])


@pytest.mark.parametrize("site", SITES)
def test_a_node_score_is_the_slope_of_the_metric_along_the_change(model, site):
    group = prepare(model, PAIRS, site)
    found = node_scores(model, group, DIFF, positions="each")["logit-diff"]
    layer, step, axis = 1, 1e-4, 1 if site == "pattern" else 2
    change = group.values[layer][0] - group.values[layer][1]
    units = found[layer].shape[1]
    for row, unit, place in ((0, units - 1, 2), (1, 0, 4)):
        mask = torch.zeros_like(change[row : row + 1])
        whole = slice(None) if units == 1 and mask.ndim == 3 else unit
        where = (0, whole, place) if axis == 1 else (0, place, whole)
        mask[where] = 1.0
        up, down = (
            moved(model, PAIRS[row], group.site.at(layer), s * step * change[row : row + 1] * mask) for s in (1, -1)
        )
        assert found[layer][row, unit, place] == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-9)


def test_node_scores_are_those_of_one_graph_through_the_whole_model(model):
    base = torch.tensor([pair.corrupted_ids for pair in PAIRS])
    sites = [f"blocks.{layer}.attn.hook_z" for layer in range(2)]
    leaves: dict[str, torch.Tensor] = {}

    def leaf(site: str) -> Intervention:
        def edit(value: torch.Tensor) -> torch.Tensor:
            leaves[site] = torch.zeros_like(value, requires_grad=True)
            return value + leaves[site]

        return Intervention(site, edit)

    logits = model.run(base, [leaf(site) for site in sites], positions=torch.tensor([4, 4])).log_softmax(-1)
    (-logits[:, 5]).sum().backward()
    group = prepare(model, PAIRS, "z")
    found = node_scores(model, group, {"ce": CE()})["ce"]
    for layer, site in enumerate(sites):
        change = group.values[layer][0] - group.values[layer][1]
        torch.testing.assert_close(found[layer][..., 0], (change * leaves[site].grad).sum((1, 3)), rtol=1e-6, atol=1e-9)


def read_slope(model: LeanModel, pair: EncodedPair, sender: torch.Tensor, kind: str, head: int, layer: int) -> float:
    """By central differences: the metric's slope when one input alone reads so much more of a sender."""
    ends = []
    for sign in (1, -1):

        def edit(value: torch.Tensor, sign: int = sign) -> torch.Tensor:
            more = torch.zeros_like(value)
            more[0, :, head] = sign * 1e-4 * sender
            return value + more

        tokens = torch.tensor([pair.corrupted_ids])
        site = f"blocks.{layer}.{kind}"
        logits = model.run(tokens, [Intervention(site, edit)], positions=torch.tensor([4]))[0]
        ends.append(float(logits[pair.answer_id] - logits[pair.wrong_answer_id]))
    return (ends[0] - ends[1]) / 2e-4


@pytest.mark.parametrize("slot", ["q", "k", "v"])
def test_an_edge_score_is_the_slope_when_one_projection_alone_reads_the_change(model, slot):
    scores = edge_scores(model, PAIRS, DIFF)
    values = dict(zip((edge.name for edge in scores.graph.edges), scores.edges["logit-diff"][0, :, 0], strict=True))
    group = prepare(model, PAIRS, "z")
    z = [group.values[0][run][:1] for run in (0, 1)]
    sender = model.head_outputs(0, z[0] - z[1])[0, :, 2]  # head 2 of layer 0, on key-value head 1
    receiver = "h1.q" if slot == "q" else f"kv1.{slot}"
    expected = read_slope(model, PAIRS[0], sender, f"hook_{slot}_input", 1, 1)
    assert float(values[f"a0.h2->a1.{receiver}"]) == pytest.approx(expected, rel=1e-5)


def test_the_edges_of_a_sender_sum_to_what_it_does_through_all_of_its_ways(model):
    scores = edge_scores(model, PAIRS, DIFF)
    sums = {node.name: torch.zeros(2, dtype=torch.float64) for node in scores.graph.senders}
    for edge, value in zip(scores.graph.edges, scores.edges["logit-diff"][:, :, 0].T, strict=True):
        sums[edge.sender.name] += value
    for at, node in enumerate(scores.graph.senders):
        torch.testing.assert_close(sums[node.name], scores.nodes["logit-diff"][:, at], rtol=1e-8, atol=1e-10)
    heads = node_scores(model, prepare(model, PAIRS, "z"), DIFF)["logit-diff"]
    torch.testing.assert_close(scores.nodes["logit-diff"][:, 1:5], heads[0][..., 0], rtol=1e-8, atol=1e-10)


def test_positions_add_up_and_several_metrics_do_not_disturb_each_other(tiny):
    metrics = {"logit-diff": LogitDiff(), "prob": Prob(), "kl": KL()}
    apart = edge_scores(tiny, PAIRS, metrics, "noising", positions="each")
    for name, metric in metrics.items():
        alone = edge_scores(tiny, PAIRS, {name: metric}, "noising")
        torch.testing.assert_close(apart.edges[name].sum(-1), alone.edges[name][:, :, 0], rtol=1e-8, atol=1e-12)
    assert apart.edges["kl"].abs().max() < 1e-9  # the clean run is its minimum: the first term says nothing there


def test_an_edge_score_by_position_is_the_slope_when_the_change_is_read_there_alone(tiny):
    own = graph(tiny)
    some = own.select(["a0.h2->a1.kv1.?", "a0.h2->a1.h1.q", "embed->m0.in"])[::-1]
    apart = edge_scores(tiny, PAIRS, DIFF, positions="each", edges=some)
    everything = edge_scores(tiny, PAIRS, DIFF, positions="each").edges["logit-diff"]
    columns = [list(own.edges).index(edge) for edge in some]
    assert torch.equal(apart.edges["logit-diff"], everything[:, columns])
    assert [place.position for place in apart.places] == list(range(5))
    group = prepare(tiny, PAIRS, "z")
    z = [group.values[0][run][:1] for run in (0, 1)]
    for slot, place in (("v", 2), ("k", 3)):
        sender = tiny.head_outputs(0, z[0] - z[1])[0, :, 2] * (torch.arange(5) == place)[:, None]
        expected = read_slope(tiny, PAIRS[0], sender, f"hook_{slot}_input", 1, 1)
        column = [edge.name for edge in some].index(f"a0.h2->a1.kv1.{slot}")
        assert float(apart.edges["logit-diff"][0, column, place]) == pytest.approx(expected, rel=1e-5)


def test_the_fix_for_keys_knows_at_which_position_an_edge_acts(monkeypatch):
    model, (pair, k) = sharpened(monkeypatch, 20, 12), induction_pair(0, "A")
    edges = graph(model).select(["a0.h0->a1.kv0.k", "a0.h0->a1.h1.q"])
    fixed, plain = (
        edge_scores(model, [pair], DIFF, method=m, positions="each", edges=edges).edges["logit-diff"][0]
        for m in ("attribution-qk", "attribution")
    )
    assert float(fixed[1, k + 1]) == pytest.approx(9.85, rel=6e-3) and float(plain[1, k + 1]) > 100
    assert float(fixed.abs().sum()) < 10.2


def test_identical_prompts_score_nothing(tiny):
    same = pairs_of((list(PAIRS[0].clean_ids),) * 2)
    assert not edge_scores(tiny, same, DIFF).edges["logit-diff"].any()
    for method in METHODS:
        found = node_scores(tiny, prepare(tiny, same, "q"), DIFF, method=method, steps=2)["logit-diff"]
        assert not any(bool(values.any()) for values in found.values())


def test_blocks_computed_twice_change_no_number(tiny, monkeypatch):
    kept = edge_scores(tiny, PAIRS, DIFF, method="eap-ig", steps=2).edges["logit-diff"]
    monkeypatch.setattr("greatctl.patching.gradients._kept_blocks", lambda *_: 0)
    monkeypatch.setattr("greatctl.patching.edge_attribution._together", lambda *_: 1)
    again = edge_scores(tiny, PAIRS, DIFF, method="eap-ig", steps=2).edges["logit-diff"]
    torch.testing.assert_close(kept, again, rtol=1e-9, atol=1e-12)


def test_at_most_one_block_has_a_graph_where_memory_is_short(tiny, monkeypatch):
    monkeypatch.setattr("greatctl.patching.gradients._kept_blocks", lambda *_: 0)
    tape = Tape(tiny, torch.zeros(1, 3, tiny.d_model, dtype=torch.float64), ["attn.hook_z"])
    assert not tape._kept
    walked = [passed.block.layer for passed in tape.back(tape.ending(torch.ones_like(tape.logits)[None]))]
    assert walked == [1, 0]


def sharpened(monkeypatch: pytest.MonkeyPatch, step: float, match: float) -> Any:
    monkeypatch.setattr(induction_circuit, "STEP_SHARPNESS", step)
    monkeypatch.setattr(induction_circuit, "MATCH_SHARPNESS", match)
    return lean(induction_llama())


@pytest.mark.parametrize(
    ("sharpness", "exact", "estimated"), [((20, 12), 9.85, 108.6), ((8, 4), 9.85, 12.07), ((5, 2), 7.88, 3.02)]
)
def test_a_saturated_softmax_misleads_and_the_fix_mends_keys(monkeypatch, sharpness, exact, estimated):
    model = sharpened(monkeypatch, *sharpness)
    pair, _ = induction_pair(0, "A")
    heads, keys = (prepare(model, [pair], site) for site in ("z", "k"))
    head = node_scores(model, heads, DIFF)["logit-diff"][0][0, 0, 0]
    assert float(head) == pytest.approx(estimated, rel=2e-3)  # ten times too much, or less than half
    truth = sweep_layer(model, keys, 1, "denoising", DIFF, positions="all")["logit-diff"][0, 0]
    assert float(truth) == pytest.approx(exact, abs=0.01)
    plain, fixed = (
        float(node_scores(model, keys, DIFF, method=method)["logit-diff"][1][0, 0, 0]) for method in METHODS[:2]
    )
    assert plain == pytest.approx(estimated, rel=5e-3) and fixed == pytest.approx(exact, rel=6e-3)
    edges = edge_scores(model, [pair], DIFF, method="attribution-qk")
    values = dict(
        zip((edge.name for edge in edges.graph.edges), edges.edges["logit-diff"][0, :, 0].tolist(), strict=True)
    )
    assert values["a0.h0->a1.kv0.k"] == pytest.approx(exact, rel=6e-3)
    assert abs(values["a0.h0->a1.kv0.v"]) < 0.02 and values["a0.h1->a1.kv0.k"] == 0
    still = node_scores(model, heads, DIFF, method="attribution-qk")["logit-diff"][0][0, 0, 0]
    assert still == head  # what the fix does not mend: a head whose way leads through the next layer's softmax


class _Weighed:
    """A metric that weighs one answer's logit against the other's, as a plugin may."""

    differentiable = True

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def __call__(self, logits: torch.Tensor, answers: Any) -> torch.Tensor:
        return logits[:, 5] - self.weight * logits[:, 9]


def test_ways_that_cancel_are_found_by_dropping_one_block_at_a_time(tmp_path):
    model = in_double(save_tiny(tmp_path, **{**SMALL, "num_hidden_layers": 3}))
    group = prepare(model, PAIRS[:1], "z")

    def cell(weight: float, method: str) -> float:
        return float(node_scores(model, group, {"": _Weighed(weight)}, method=method)[""][0][0, 2, 0])

    first, both = cell(0.0, "attribution"), cell(1.0, "attribution")
    weight = first / (first - both)  # the answer's share of the gradient is cancelled by the other's
    exact = sweep_layer(model, group, 0, "denoising", {"": _Weighed(weight)}, positions="all")[""][0, 2]
    base = _Weighed(weight)(group.logits[1], None)[0]
    assert cell(weight, "attribution") == pytest.approx(0, abs=1e-12 + 1e-9 * abs(first))
    assert abs(float(exact - base)) > 1e-3 * abs(first) and abs(cell(weight, DROP)) > 1e-2 * abs(first)


def test_dropping_a_block_is_the_gradient_of_a_model_in_which_it_is_fixed(tiny):
    group = prepare(tiny, PAIRS, "z")
    fixed = {}
    for layer in range(2):
        site = f"blocks.{layer}.hook_resid_post"
        fixed[layer] = tiny.capture(torch.tensor([p.corrupted_ids for p in PAIRS]), [site])[site]
    entering = "blocks.1.hook_resid_pre"
    before = tiny.capture(torch.tensor([p.corrupted_ids for p in PAIRS]), [entering])[entering]
    seen: dict[str, torch.Tensor] = {}

    def start(value: torch.Tensor) -> torch.Tensor:
        seen["z"] = torch.zeros_like(value, requires_grad=True)
        return value + seen["z"]

    def stream(value: torch.Tensor) -> torch.Tensor:
        seen["stream"] = value
        return value

    around = Intervention("blocks.1.hook_resid_post", lambda value: fixed[1] + seen["stream"] - before)
    edits = [Intervention("blocks.0.attn.hook_z", start), Intervention(entering, stream), around]
    logits = tiny.run(torch.tensor([p.corrupted_ids for p in PAIRS]), edits, positions=torch.tensor([4, 4]))
    (logits[:, 5] - logits[:, 9]).sum().backward()
    change = group.values[0][0] - group.values[0][1]
    wanted = (change * seen["z"].grad).sum((1, 3)).abs()
    clean, corrupted = (some[:, 5] - some[:, 9] for some in group.logits)
    found = node_scores(tiny, group, DIFF, method=DROP)["logit-diff"]
    torch.testing.assert_close(found[0][:, :, 0], (clean - corrupted).sign()[:, None] * wanted)  # 2 blocks: 1 estimate
    plain = node_scores(tiny, group, DIFF)["logit-diff"][1]
    torch.testing.assert_close(found[1].abs(), plain.abs())  # what lies below the last block does not matter to it


@pytest.mark.parametrize("site", ["q", "k"])
def test_the_fix_knows_the_exact_pattern_of_each_place(tiny, site):
    group = prepare(tiny, PAIRS, site)
    found = node_scores(tiny, group, DIFF, method="attribution-qk", positions="each")["logit-diff"][1]
    base = torch.tensor([PAIRS[0].corrupted_ids])
    name, leaf = "blocks.1.attn.hook_pattern", {}

    def look(value: torch.Tensor) -> torch.Tensor:
        leaf[0] = value.detach().requires_grad_()
        return leaf[0]

    logits = tiny.run(base, [Intervention(name, look)], positions=torch.tensor([4]))[0]
    (logits[5] - logits[9]).backward()
    place, unit = 2, 1

    def write(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[0, place, unit] = group.values[1][0][0, place, unit]
        return value

    seen: list[torch.Tensor] = []
    looked = Intervention(name, lambda value: seen.append(value) or value)
    tiny.run(base, [Intervention(f"blocks.1.attn.hook_{site}", write), looked])
    expected = ((seen[0] - leaf[0].detach()) * leaf[0].grad).sum()
    assert float(found[0, unit, place]) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("method", ["eap-ig", "eap-ig-activations"])
def test_integrated_gradients_add_up_the_better_the_more_steps(tiny, method):
    group = prepare(tiny, PAIRS, "resid_pre")
    clean, corrupted = (logits[:, 5] - logits[:, 9] for logits in group.logits)
    off = []
    for steps in (1, 4, 16):
        edges = edge_scores(tiny, PAIRS, DIFF, method=method, steps=steps) if steps < 16 or method == "eap-ig" else None
        node = node_scores(tiny, group, DIFF, method=method, steps=steps)["logit-diff"][0].sum((1, 2))
        if edges is not None:
            of_embedding = [at for at, edge in enumerate(edges.graph.edges) if edge.sender.kind == "embed"]
            torch.testing.assert_close(edges.edges["logit-diff"][:, of_embedding, 0].sum(1), node)
        off.append(float((node - (clean - corrupted)).abs().max()))
    assert off[2] < off[1] < off[0] and off[2] < 0.02 * off[0]


def test_moving_a_site_alone_adds_up_to_patching_all_of_it(tiny):
    group = prepare(tiny, PAIRS, "z")
    base = group.logits[1][:, 5] - group.logits[1][:, 9]
    values = group.values[1][0]
    logits = tiny.run(
        torch.tensor([pair.corrupted_ids for pair in PAIRS]),
        [Intervention("blocks.1.attn.hook_z", lambda value: values)],
        positions=torch.tensor([4, 4]),
    )
    effect = logits[:, 5] - logits[:, 9] - base
    found = node_scores(tiny, group, DIFF, method="eap-ig-activations", steps=24)["logit-diff"][1].sum((1, 2))
    plain = node_scores(tiny, group, DIFF)["logit-diff"][1].sum((1, 2))
    assert (found - effect).abs().max() < 0.05 * (plain - effect).abs().max()


class _Code:
    """A little autoencoder whose decoder is affine."""

    def __init__(self, d: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.W_enc = torch.randn(d, 12, generator=generator)
        self.W_dec = torch.randn(12, d, generator=generator)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.W_enc.to(x)).relu()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents @ self.W_dec.to(latents) + 0.3


@pytest.mark.parametrize("method", ["attribution", "eap-ig", "eap-ig-activations"])
def test_latents_and_their_error_sum_to_the_whole_activation(tmp_path, method):
    model = lean(save_tiny(tmp_path, **SMALL))
    chosen = [0, 3, 11]
    site = Latents(_Code(16), "blocks.1.hook_resid_pre", chosen)
    found = latent_scores(model, PAIRS, site, 1, LogitDiff(), method=method, steps=3)
    whole = node_scores(model, prepare(model, PAIRS, "resid_pre", layers=[0, 1]), DIFF, method=method, steps=3)
    torch.testing.assert_close(
        found.latents.sum(1) + found.error, whole["logit-diff"][1][:, 0, 0], rtol=1e-4, atol=1e-5
    )
    table = node_scores(model, prepare(model, PAIRS, site, layers=[1]), DIFF, method=method, steps=3)["logit-diff"][1]
    torch.testing.assert_close(table[:, :3, 0], found.latents[:, chosen], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(table[:, 3, 0], found.latents.sum(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(table[:, 4, 0], found.error, rtol=1e-4, atol=1e-5)


def test_answers_of_several_tokens_have_gradients_too(tiny):
    pair = replace(PAIRS[0], answers=((5, 6), (7, 8)), wrong_answers=((9, 10),))
    group = prepare(tiny, [pair], "resid_pre")
    found = node_scores(tiny, group, DIFF, method="eap-ig", steps=24)["logit-diff"][0].sum()
    ends = [LogitDiff()(group.logits[run], group.end_answers(run)) for run in (0, 1)]
    assert float(found) == pytest.approx(float(ends[0] - ends[1]), rel=0.02)


def test_sizes_without_a_direction_are_no_scores_of_edges(tiny):
    with pytest.raises(UsageError, match="attribution-drop"):
        edge_scores(tiny, PAIRS, DIFF, method=DROP)


def test_a_metric_without_a_gradient_is_refused(tiny):
    with pytest.raises(UsageError, match="rank"):
        node_scores(tiny, prepare(tiny, PAIRS, "z"), {"rank": Rank()})
