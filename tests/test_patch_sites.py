"""Heads, neurons and SAE latents as places to patch: each against a plain forward of the Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from test_patching import LAYERS, LENGTH, VOCABULARY, hf, lean, model, pairs  # noqa: F401

from greatctl.errors import StageError, UsageError
from greatctl.patching.cells import batches_of, plan_of
from greatctl.patching.latents import PARTS, Latents
from greatctl.patching.metrics import LogitDiff, LogProb, measure
from greatctl.patching.pairs import EncodedPair, Pair
from greatctl.patching.promising import promising_latents, promising_neurons, write_norms
from greatctl.patching.runs import CLEAN, CORRUPTED, prepare
from greatctl.patching.sources import make_source
from greatctl.patching.sweep import Sweep, patch, sweep_layer
from greatctl.patching.units import groups

METRIC = {"d": LogitDiff()}
DIFF = LogitDiff()


def projection(hf, site: str, layer: int):  # noqa: F811
    """The Hugging Face module at whose input or output a site stands, and which of the two."""
    block = hf.model.layers[layer]
    return {
        "q": (block.self_attn.q_proj, "out"),
        "k": (block.self_attn.k_proj, "out"),
        "v": (block.self_attn.v_proj, "out"),
        "z": (block.self_attn.o_proj, "in"),
        "mlp_post": (block.mlp.down_proj, "in"),
        "attn_out": (block.self_attn.o_proj, "out"),
        "resid_pre": (block, "in"),
    }[site]


def forward(hf, ids: Sequence[int], edits: Sequence[tuple[str, int, Callable]]) -> torch.Tensor:  # noqa: F811
    """Logits [p, V] of the untouched Hugging Face model with hooks on its own modules."""
    handles = []
    for site, layer, edit in edits:
        module, side = projection(hf, site, layer)

        def before(m, args, kwargs, edit=edit):
            if args:
                return (edit(args[0].clone()), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"].clone())}

        if side == "in":
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(lambda m, a, out, edit=edit: edit(out.clone())))
    try:
        with torch.no_grad():
            return hf(torch.tensor([list(ids)]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def diff(logits: torch.Tensor, pair: EncodedPair) -> float:
    return float(logits[-1, pair.answer_id] - logits[-1, pair.wrong_answer_id])


@pytest.mark.parametrize("positions", ["each", "all"])
@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("site", ["z", "q", "k", "v", "mlp_post"])
def test_a_cell_of_a_head_or_neuron_is_one_plain_forward(hf, model, pairs, site, direction, positions):  # noqa: F811
    group = prepare(model, pairs, site)
    base, source = ("corrupted_ids", CLEAN) if direction == "denoising" else ("clean_ids", CORRUPTED)
    units = [0, 3, 17] if site == "mlp_post" else None
    table = sweep_layer(model, group, 1, direction, METRIC, 7, positions=positions, units=units)["d"]
    n = {"z": 4, "q": 4, "k": 2, "v": 2, "mlp_post": 3}[site]  # as many rows as there are heads, never padded
    assert table.shape == ((3, n, LENGTH) if positions == "each" else (3, n))
    width = 1 if site == "mlp_post" else 8
    for row, pair in enumerate(pairs[:2]):
        for at, unit in enumerate(units or range(n)):
            part = slice(unit * width, (unit + 1) * width)
            value = group.values[1][source][row].flatten(1)[:, part]
            for place in (4, 7, 8) if positions == "each" else (slice(None),):

                def write(x, place=place, part=part, value=value):
                    x[0, place, part] = value[place]
                    return x

                expected = diff(forward(hf, getattr(pair, base), [(site, 1, write)]), pair)
                found = table[row, at] if positions == "all" else table[row, at, place]
                assert abs(float(found) - expected) < 1e-4


def test_the_pattern_of_a_head_decides_what_it_reads_and_all_heads_together_are_attn_out(model, pairs):  # noqa: F811
    """With values and patterns from the other run, z is the other run's; z of all heads is attn_out."""
    heads, whole = prepare(model, pairs, "z"), prepare(model, pairs, "attn_out")
    rows, mask = torch.arange(3), torch.zeros(3, LENGTH, dtype=torch.bool)
    mask[:, 7] = True
    ours = patch(model, heads, 1, "denoising", rows, mask)
    assert torch.allclose(ours, patch(model, whole, 1, "denoising", rows, mask), atol=1e-5)
    pattern = prepare(model, pairs, "pattern")
    table = sweep_layer(model, pattern, 1, "denoising", METRIC, positions="each")["d"]
    assert table.shape == (3, 4, LENGTH)
    new = pattern.values[1][CORRUPTED].clone()
    new[0, 2, 7] = pattern.values[1][CLEAN][0, 2, 7]
    by_hand = patch(model, pattern, 1, "denoising", rows, torch.ones(3, LENGTH, dtype=torch.bool), donor=new)
    assert abs(float(table[0, 2, 7]) - diff(by_hand[:1], pairs[0])) < 1e-5


class Forgetful:
    """A model that cannot resume behind a prefix."""

    reuses_prefix = False

    def __init__(self, model) -> None:  # noqa: F811
        self._model = model

    def __getattr__(self, name: str):
        return getattr(self._model, name)


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "mlp_out", "z", "v", "pattern"])
def test_reusing_the_prefix_and_batching_change_nothing_that_matters(model, pairs, site):  # noqa: F811
    whole = Forgetful(model)
    plain = sweep_layer(whole, prepare(whole, pairs, site), 1, "noising", METRIC, 1, positions="each")["d"]
    for batch_cells in (1, 5, 500):
        ours = sweep_layer(model, prepare(model, pairs, site), 1, "noising", METRIC, batch_cells, positions="each")["d"]
        assert (ours - plain).abs().max() < 1e-5


@pytest.mark.parametrize("batch_cells", [1, 4, 100])
@pytest.mark.parametrize("overhead", [0, 10, 10_000])
def test_batches_hold_every_task_once_and_start_at_its_first_change(model, pairs, batch_cells, overhead):  # noqa: F811
    group = prepare(model, pairs, "z", layers=[0])
    plan = plan_of(group, "denoising", "each")
    batches = batches_of(plan, range(4), LENGTH, batch_cells, overhead)
    tasks = [task for b in batches for task in zip(b.rows, b.places, b.units, strict=True)]
    wanted = {(r, p, u) for r in range(3) for p in range(pairs[r].first_difference, LENGTH) for u in range(4)}
    assert len(tasks) == len(set(tasks)) and set(tasks) == wanted
    assert all(len(b) <= batch_cells and b.start == min(b.places) for b in batches)
    assert len(batches) == 1 or batch_cells < 100 or overhead < 10_000


class Cramped(Forgetful):
    """A device on which three cells fit at once."""

    reuses_prefix = True

    def resume(self, layer, residual, interventions=(), **how):
        if len(residual) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self._model.resume(layer, residual, interventions, **how)


def test_a_batch_that_does_not_fit_is_halved_with_a_notice_and_gives_the_same_numbers(model, pairs):  # noqa: F811
    group, said = prepare(model, pairs, "resid_pre"), []
    sweep = Sweep(Cramped(model), group, "denoising", METRIC, notice=said.append)
    (batch,) = sweep.batches([-1], 100, 10_000)
    expected = Sweep(model, group, "denoising", METRIC).run([(1,)], batch)[0]["d"]
    assert (sweep.run([(1,)], batch)[0]["d"] - expected).abs().max() < 1e-5
    assert said and "going on with" in said[0]


class Lost(Forgetful):
    """Edits inside of blocks are called, and their results dropped."""

    reuses_prefix = True

    def resume(self, layer, residual, interventions=(), **how):
        dropped = [type(i)(i.site, lambda value, i=i: (i.edit(value), value)[1]) for i in interventions]
        return self._model.resume(layer, residual, dropped, **how)


@pytest.mark.parametrize("site", ["z", "q", "k", "v", "pattern", "mlp_post"])
def test_an_edit_that_is_lost_inside_of_a_block_is_an_error_that_names_the_site(model, pairs, site):  # noqa: F811
    group = prepare(model, pairs, site)
    with pytest.raises(StageError, match=rf"blocks\.1\..*{site.removeprefix('mlp_')}"):
        sweep_layer(Lost(model), group, 1, "denoising", METRIC, positions="all", units=[0])


class Code:
    """A random ReLU autoencoder of 3 x the width."""

    def __init__(self, d: int = 32, n: int = 96, scale: float = 1.0) -> None:
        g = torch.Generator().manual_seed(5)
        self.W_enc, self.b_enc = torch.randn(d, n, generator=g) * 0.3, torch.randn(n, generator=g) * 0.1
        self.W_dec, self.b_dec = torch.randn(n, d, generator=g) * 0.1, torch.randn(d, generator=g) * 0.1
        self.scale = scale  # a decoder whose rows are not what a latent adds

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return ((x - self.b_dec) @ self.W_enc + self.b_enc).relu()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents / self.scale @ self.W_dec + self.b_dec


POINT = "blocks.1.hook_resid_post"


def latents(chosen: Sequence[int] = (3, 50), **more) -> Latents:
    return Latents(Code(**more), POINT, chosen)


def everywhere(n: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(n), torch.ones(n, LENGTH, dtype=torch.bool)


def test_an_empty_patch_of_latents_changes_no_bit(model, pairs):  # noqa: F811
    group = prepare(model, pairs, latents(), layers=[1])
    for unit in (None, 0, 1, 2, 3, 4):
        found = patch(model, group, 1, "denoising", *everywhere(), unit=unit, donor=group.values[1][CORRUPTED])
        assert torch.equal(found, group.logits[CORRUPTED])
    nowhere = torch.zeros(3, LENGTH, dtype=torch.bool)
    assert torch.equal(patch(model, group, 1, "denoising", torch.arange(3), nowhere), group.logits[CORRUPTED])


def test_all_latents_and_the_error_are_the_residual_and_reconstruction_is_a_baseline_of_its_own(hf, model, pairs):  # noqa: F811
    group, plain = prepare(model, pairs, latents(scale=2.0), layers=[1]), prepare(model, pairs, "resid_post")
    rows, mask = torch.arange(3), torch.zeros(3, LENGTH, dtype=torch.bool)
    mask[:, 7] = True
    both = patch(model, group, 1, "denoising", rows, mask, unit=2 + PARTS.index("latents and error"))
    assert torch.allclose(both, patch(model, plain, 1, "denoising", rows, mask), atol=1e-5)
    sae, x = latents(scale=2.0).sae, [plain.values[1][run][0, 7] for run in (CLEAN, CORRUPTED)]
    a = [sae.encode(value) for value in x]
    mixed = a[CORRUPTED].clone()
    mixed[50] = a[CLEAN][50]
    made = [sae.decode(value) for value in a]
    expected = {
        1: x[CORRUPTED] + sae.decode(mixed) - made[CORRUPTED],
        2 + PARTS.index("all latents"): x[CORRUPTED] + made[CLEAN] - made[CORRUPTED],
        2 + PARTS.index("error term"): x[CORRUPTED] + (x[CLEAN] - made[CLEAN]) - (x[CORRUPTED] - made[CORRUPTED]),
        2 + PARTS.index("reconstruction"): made[CORRUPTED],
    }
    assert abs(float(a[CLEAN][50] - a[CORRUPTED][50])) > 0.01
    for unit, value in expected.items():

        def write(h, value=value):
            h[0, 7] = value
            return h

        truth = forward(hf, pairs[0].corrupted_ids, [("resid_pre", 2, write)])[-1]
        assert torch.allclose(patch(model, group, 1, "denoising", rows, mask, unit=unit)[0], truth, atol=1e-4)


def test_a_sweep_over_latents_has_a_row_for_each_and_for_the_parts(model, pairs):  # noqa: F811
    site = latents()
    group = prepare(model, pairs, site, layers=[1])
    table = sweep_layer(model, group, 1, "noising", METRIC, positions="all", units=range(site.n_units))["d"]
    whole = sweep_layer(model, prepare(model, pairs, "resid_post"), 1, "noising", METRIC, positions="all")["d"]
    assert table.shape == (3, 6)
    assert (table[:, 2 + PARTS.index("latents and error")] - whole).abs().max() < 1e-5
    assert [site.label(1, u).latent for u in range(2)] == [3, 50] and site.label(1, 5).part == "reconstruction"


def test_a_decoder_that_is_not_affine_and_another_layer_are_refused(model, pairs):  # noqa: F811
    class Bent(Code):
        def decode(self, latents):
            return super().decode(latents) ** 2

    value = model.capture(torch.tensor([pairs[0].clean_ids]), [POINT])[POINT]
    latents().check(value)
    with pytest.raises(StageError, match="self-check"):
        Latents(Bent(), POINT).check(value)
    with pytest.raises(StageError, match="not layer 2"):
        prepare(model, pairs, latents(), layers=[2])


@pytest.mark.parametrize("kind", ["zero", "mean", "resample"])
def test_an_ablation_writes_what_it_says(hf, model, pairs, kind):  # noqa: F811
    group_of = prepare(model, pairs, "mlp_out")
    from greatctl.patching.sites import Plain

    source = make_source(model, pairs, Plain("mlp_out"), [1], kind, seed=3)
    group = prepare(model, pairs, "mlp_out", layers=[1], source=source)
    table = sweep_layer(model, group, 1, "noising", METRIC, positions="each")["d"]
    corrupted = group_of.values[1][CORRUPTED]
    for row, pair in enumerate(pairs):
        value = {"zero": torch.zeros_like(corrupted[0]), "mean": corrupted.mean(0)}.get(kind)
        if value is None:
            other = [p.corrupted_ids for p in pairs].index(source.donors[pair.pair.id])
            assert other != row
            value = corrupted[other]
        for at in (0, 2, 8):

            def write(h, at=at, value=value, clean=group_of.values[1][CLEAN][row]):
                h[0, at] += value[at] - clean[at]
                return h

            truth = forward(hf, pair.clean_ids, [("resid_pre", 2, write)])
            assert abs(float(table[row, at]) - diff(truth, pair)) < 1e-4


def test_one_prompt_alone_cannot_be_resampled(model, pairs):  # noqa: F811
    from greatctl.patching.sites import Plain

    with pytest.raises(UsageError, match="no other prompt"):
        make_source(model, pairs[:1], Plain("resid_pre"), [0], "resample")


def unequal() -> EncodedPair:
    """A name of two tokens against one of a single token: aligned at its end."""
    clean, corrupted = (1, 5, 6, 9, 12, 13, 14), (1, 7, 9, 12, 13, 14)
    alignment = ((0, 0), (2, 1), (3, 2), (4, 3), (5, 4), (6, 5))
    spans = {"name": ((1, 2), (1,)), "end": ((5, 6), (4, 5))}
    return EncodedPair(Pair("u", "a", "b", "c", "d"), clean, corrupted, 20, 21, alignment=alignment, spans=spans)


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_prompts_of_unequal_length_are_patched_where_they_correspond(hf, model, direction):  # noqa: F811
    pair = unequal()
    group = prepare(model, [pair], "resid_pre")
    each = sweep_layer(model, group, 1, direction, METRIC, positions="each")["d"][0]
    spans = sweep_layer(model, group, 1, direction, METRIC, positions="spans")["d"][0]
    assert each.isnan().tolist() == [False, True, False, False, False, False, False]
    base, donor = ("corrupted_ids", CLEAN) if direction == "denoising" else ("clean_ids", CORRUPTED)
    own = 1 - donor

    def truth(places: Sequence[tuple[int, int]]) -> float:
        def write(h):
            for both in places:
                h[0, both[own]] = group.values[1][donor][0, both[donor]]
            return h

        return diff(forward(hf, getattr(pair, base), [("resid_pre", 1, write)]), pair)

    for both in pair.alignment:
        assert abs(float(each[both[0]]) - truth([both])) < 1e-4
    assert abs(float(spans[0]) - truth([(2, 1)])) < 1e-4
    assert abs(float(spans[1]) - truth([(5, 4), (6, 5)])) < 1e-4


def test_answers_of_several_tokens_are_scored_behind_the_prompt_in_every_cell(hf, model, pairs):  # noqa: F811
    right, wrong = ((5, 6), (8,)), ((15, 16, 17), (9, 10))
    several = [EncodedPair(p.pair, p.clean_ids, p.corrupted_ids, right[0][0], wrong[0][0], right, wrong) for p in pairs]
    assert len(groups([*pairs, *several])) == 2
    metrics = {"d": LogitDiff(), "log-prob": LogProb()}
    group = prepare(model, several, "resid_pre")
    table = sweep_layer(model, group, 1, "denoising", metrics, positions="each")
    ends = {k: measure(k, m, group.logits[CLEAN], group.end_answers(CLEAN)) for k, m in metrics.items()}
    whole = sweep_layer(model, group, 1, "denoising", metrics, positions="all")
    for name, values in ends.items():
        assert torch.allclose(whole[name], values, atol=1e-5)  # behind the prompt, too, it is the clean run
    for row, at in ((0, 3), (1, 7), (2, 8)):
        pair, scores = several[row], {}

        def write(h, row=row, at=at):
            h[0, at] = group.values[1][CLEAN][row, at]
            return h

        for ids in (*right, *wrong):
            logits = forward(hf, [*pair.corrupted_ids, *ids[:-1]], [("resid_pre", 1, write)])[LENGTH - 1 :]
            picked = torch.arange(len(ids)), torch.tensor(ids)
            scores[ids] = logits[picked].sum(), logits.log_softmax(-1)[picked].sum()
        sides = [torch.stack([scores[ids][0] for ids in side]).logsumexp(0) for side in (right, wrong)]
        assert abs(float(table["d"][row, at]) - float(sides[0] - sides[1])) < 1e-4
        prob = torch.stack([scores[ids][1] for ids in right]).logsumexp(0)
        assert abs(float(table["log-prob"][row, at]) - float(prob)) < 1e-4


def test_a_window_patches_its_layers_together(hf, model, pairs):  # noqa: F811
    group = prepare(model, pairs, "attn_out")
    sweep = Sweep(model, group, "denoising", METRIC)
    batch = next(b for b in sweep.batches([-1], 1, 0) if (b.rows, b.places) == ((1,), (7,)))

    def write(layer):
        def edit(x):
            x[0, 7] = group.values[layer][CLEAN][1, 7]
            return x

        return edit

    truth = forward(hf, pairs[1].corrupted_ids, [("attn_out", layer, write(layer)) for layer in (1, 2)])
    assert abs(float(sweep.run([(1, 2)], batch)[0]["d"]) - diff(truth, pairs[1])) < 1e-4


def test_the_promising_units_are_those_that_change_the_stream_most(hf, model, pairs):  # noqa: F811
    norms = write_norms(model, 1, 48)
    assert torch.allclose(norms, hf.model.layers[1].mlp.down_proj.weight.norm(dim=0), atol=1e-5)
    group = prepare(model, pairs, "mlp_post")
    change = torch.stack([(group.values[at][0] - group.values[at][1]).abs().sum((0, 1)) for at in range(LAYERS)])
    scores = change * torch.stack([write_norms(model, at, 48) for at in range(LAYERS)])
    best = promising_neurons(model, [pairs], 5)
    assert len(best) == 5 and scores[best[0]] == scores.max()
    assert [float(scores[at]) for at in best] == sorted(scores.flatten().tolist(), reverse=True)[:5]
    site = latents(())
    chosen = promising_latents(model, [pairs], site, 1, 4)
    acts = [site.acts(prepare(model, pairs, "resid_post").values[1][run]) for run in (CLEAN, CORRUPTED)]
    size = (acts[0] - acts[1]).abs().sum((0, 1)) * site.sae.W_dec.norm(dim=1)
    assert chosen[0] == int(size.argmax()) and len(set(chosen)) == 4
