"""The lean engine, family by family: every site, prefix reuse, edits inside attention, several devices, fused blocks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny_llama import save_tiny
from transformers import (
    GPT2LMHeadModel,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from greatctl import model
from greatctl.errors import StageError, UsageError
from greatctl.model import Intervention, fast
from greatctl.model.interface import HEAD_SITES, INPUT_SITES, LEAN_SITES, RESIDUAL_SITES, site_names
from greatctl.model.lean import LeanModel
from greatctl.model.loading import describe

TOKENS = torch.randint(2, 320, (3, 12), generator=torch.Generator().manual_seed(1))
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama-2": {"num_key_value_heads": 4},
    "llama-3": {"rope_parameters": ROPE, "tie_word_embeddings": True},
    "mistral-sliding": {"model": MistralForCausalLM, "sliding_window": 4},
    "qwen2-half-sliding": {
        "model": Qwen2ForCausalLM,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "qwen3": {"model": Qwen3ForCausalLM, "head_dim": 16},
    "gpt2": {"model": GPT2LMHeadModel},
}


class Case(NamedTuple):
    """One family: the folder, plain Hugging Face, and lean."""

    name: str
    folder: Path
    hf: Any
    lean: LeanModel


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("family") / request.param
    hf = save_tiny(folder, **FAMILIES[request.param]).requires_grad_(False)
    with torch.no_grad():  # biases start at zero, and GPT-2's weights near it, where a mistake would not show
        for name, parameter in hf.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
            elif ".c_" in name:
                parameter.mul_(4)
    hf.save_pretrained(folder)
    yield Case(request.param, folder, hf, loaded(model.load(folder, name=request.param)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "tiny"
    save_tiny(folder)
    return folder


def loaded(frozen: Any) -> LeanModel:
    assert frozen.engine == "lean"
    return frozen


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).detach().abs().max())


def at(site: str, value: torch.Tensor) -> list[Intervention]:
    return [Intervention(site, lambda _: value)]


def test_every_site_and_the_logits_are_hugging_faces(case: Case) -> None:
    assert far(case.lean.run(TOKENS), case.hf(TOKENS).logits) <= 1e-5
    assert case.lean.sites() == site_names(3, LEAN_SITES)
    assert max(case.lean.check(TOKENS, case.lean.sites()).values()) <= 2e-6
    states = case.hf(TOKENS, output_hidden_states=True).hidden_states
    for layer in range(3):
        site = f"blocks.{layer}.hook_resid_pre"
        assert far(case.lean.capture(TOKENS, [site])[site], states[layer]) <= 1e-5


def test_every_site_is_hugging_faces_in_float64(case: Case) -> None:
    hf = type(case.hf).from_pretrained(case.folder, dtype=torch.float64)
    exact = LeanModel(hf, describe(case.folder, name=case.name), None, [0, 1])
    sites = [site for site in exact.sites() if not site.endswith("pattern")]  # Hugging Face's softmax is float32
    assert max(exact.check(TOKENS, sites).values()) <= 1e-12
    past = exact.past(TOKENS)
    residual = exact.capture(TOKENS, ["blocks.1.hook_resid_pre"])["blocks.1.hook_resid_pre"]
    assert far(exact.resume(1, residual[:, 7:], start=7, past=past), exact.run(TOKENS)[:, 7:]) <= 1e-12


def test_every_site_is_transformer_lens_s(case: Case) -> None:
    pytest.importorskip("transformer_lens")
    bridge = model.load(case.folder, name=case.name, engine="transformer-lens")
    ours, theirs = case.lean.capture(TOKENS, case.lean.sites()), bridge.capture(TOKENS, case.lean.sites())
    for site in case.lean.sites():
        assert far(ours[site], theirs[site]) <= 1e-5, site
    shape = ("n_heads", "n_kv_heads", "d_head", "d_mlp", "d_model", "n_layers")
    assert [getattr(bridge, name) for name in shape] == [getattr(case.lean, name) for name in shape]


def test_edits_inside_a_block_do_what_they_do_in_transformer_lens(case: Case) -> None:
    pytest.importorskip("transformer_lens")
    bridge = model.load(case.folder, name=case.name, engine="transformer-lens")
    clean = case.lean.run(TOKENS)
    for kind in (*HEAD_SITES, "mlp.hook_post"):
        edit = [Intervention(f"blocks.1.{kind}", lambda value: value.roll(1, dims=0))]
        ours = case.lean.run(TOKENS, edit)
        assert far(ours, bridge.run(TOKENS, edit)) <= 1e-5, kind
        assert far(ours, clean) > 1e-3, kind


def test_what_one_projection_reads_can_be_edited_alone_as_in_transformer_lens(case: Case) -> None:
    pytest.importorskip("transformer_lens")
    if case.name not in ("llama-3", "mistral-sliding", "qwen3", "gpt2"):
        pytest.skip("the same code as llama-3")
    bridge = model.load(case.folder, name=case.name, engine="transformer-lens")
    bridge._bridge.set_use_split_qkv_input(True)  # type: ignore[attr-defined]
    bridge._bridge.set_use_hook_mlp_in(True)  # type: ignore[attr-defined]
    clean = case.lean.run(TOKENS)
    for kind in INPUT_SITES:
        edit = [Intervention(f"blocks.1.{kind}", lambda value: value.roll(1, dims=0) + value.roll(1, dims=-2))]
        ours = case.lean.run(TOKENS, edit)
        assert far(ours, bridge.run(TOKENS, edit)) <= 1e-5, kind
        assert far(ours, clean) > 1e-3, kind


def test_inputs_of_projections_have_heads_of_their_own_and_do_not_reach_the_skip_connection(case: Case) -> None:
    lean, sites = case.lean, [f"blocks.1.{kind}" for kind in INPUT_SITES]
    found, clean = lean.capture(TOKENS, sites), lean.run(TOKENS)
    heads = (lean.n_heads, lean.n_kv_heads, lean.n_kv_heads)
    assert [v.shape for v in found.values()] == [*((3, 12, n, 32) for n in heads), (3, 12, 32)]
    assert max(lean.check(TOKENS, sites).values()) <= 2e-6
    start, past = 5, lean.past(TOKENS)
    rest = lean.capture(TOKENS, ["blocks.1.hook_resid_pre"])["blocks.1.hook_resid_pre"][:, start:]
    for site, value in found.items():
        assert far(lean.run(TOKENS, at(site, value)), clean) <= 1e-5
        edits = [Intervention(site, lambda v: torch.cat([v[:, :-1], -v[:, -1:]], 1))]
        whole = lean.run(TOKENS, edits)
        assert far(lean.resume(1, rest, edits, start=start, past=past), whole[:, start:]) <= 1e-5
        assert far(whole, lean.run(TOKENS, [Intervention(site, lambda v: v[:, -1:].neg_() is None or v)])) <= 1e-6
    z, out = (f"blocks.1.{kind}" for kind in ("attn.hook_z", "hook_attn_out"))
    both = lean.capture(TOKENS, [z, out])
    bias = case.hf.transformer.h[1].attn.c_proj.bias if case.name == "gpt2" else 0.0
    assert far(lean.head_outputs(1, both[z]).sum(2) + bias, both[out]) <= 1e-5
    assert far(lean.head_outputs(1, both[z][:, :, [2, 0]], [2, 0]), lean.head_outputs(1, both[z])[:, :, [2, 0]]) <= 1e-6


def test_heads_that_cannot_be_told_apart_are_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lean = loaded(model.load(llama, name="tiny"))
    moved = torch.empty(4, 8, 32, device="meta")
    monkeypatch.setattr(lean._family, "writing", lambda block: moved)
    with pytest.raises(StageError) as error:
        lean.head_outputs(0, torch.zeros(1, 4, 8))
    assert "moved in for each call" in error.value.why


def test_shapes_are_those_of_the_contract(case: Case) -> None:
    lean = case.lean
    found = lean.capture(TOKENS, lean.sites())
    widths = {"q": lean.n_heads, "z": lean.n_heads, "k": lean.n_kv_heads, "v": lean.n_kv_heads}
    for name, heads in widths.items():
        assert found[f"blocks.1.attn.hook_{name}"].shape == (3, 12, heads, lean.d_head)
    assert found["blocks.1.mlp.hook_post"].shape == (3, 12, lean.d_mlp)
    pattern = found["blocks.1.attn.hook_pattern"]
    assert pattern.shape == (3, lean.n_heads, 12, 12)
    assert far(pattern.sum(-1), torch.ones(3, lean.n_heads, 12)) <= 1e-6
    assert (pattern.triu(1) == 0).all()
    assert lean.n_kv_heads == {"llama-2": 4, "gpt2": 4}.get(case.name, 2)


def test_the_heads_outputs_add_up_to_attention(case: Case) -> None:
    found = case.lean.capture(TOKENS, ["blocks.1.attn.hook_z", "blocks.1.hook_attn_out"])
    family = case.lean._family
    out = family.attention_out(family.layers[1], found["blocks.1.attn.hook_z"].flatten(2))
    assert far(out, found["blocks.1.hook_attn_out"]) <= 1e-6


def test_patching_a_site_with_its_own_value_changes_no_bit(case: Case) -> None:
    clean = case.lean.run(TOKENS)
    for site in case.lean.sites():
        patched = case.lean.run(TOKENS, at(site, case.lean.capture(TOKENS, [site])[site]))
        if site.endswith("hook_pattern"):  # an explicit softmax stands in for SDPA
            assert far(patched, clean) <= 1e-5
        else:
            assert torch.equal(patched, clean), site


def test_resuming_behind_a_prefix_is_the_whole_run(case: Case) -> None:
    clean = case.lean.run(TOKENS)
    found, past = case.lean.capture_all(TOKENS, site_names(3, RESIDUAL_SITES))
    assert all(torch.equal(v, case.lean.capture(TOKENS, [s])[s]) for s, v in found.items())
    for layer in range(3):
        for start in (1, 6, 11):
            rest = found[f"blocks.{layer}.hook_resid_pre"][:, start:]
            resumed = case.lean.resume(layer, rest, start=start, past=past)
            assert far(resumed, clean[:, start:]) <= 1e-5
            where = torch.tensor([11, start, 11])
            picked = case.lean.resume(layer, rest, start=start, past=past.upto(start), positions=where)
            assert far(picked, clean[torch.arange(3), where]) <= 1e-5


def test_edits_behind_a_prefix_are_those_of_the_whole_run(case: Case) -> None:
    start, past = 5, case.lean.past(TOKENS)
    rest = case.lean.capture(TOKENS, ["blocks.1.hook_resid_pre"])["blocks.1.hook_resid_pre"][:, start:]
    for kind in LEAN_SITES:
        sites = [f"blocks.{layer}.{kind}" for layer in (1, 2)]
        if kind == "attn.hook_pattern":
            edits = [Intervention(s, lambda v: torch.cat([v[:, :, :-1], v[:, :, -1:].flip(3)], 2)) for s in sites]
        else:
            edits = [Intervention(s, lambda v: torch.cat([v[:, :-1], -v[:, -1:]], 1)) for s in sites]
        whole = case.lean.run(TOKENS, edits)[:, start:]
        assert far(case.lean.resume(1, rest, edits, start=start, past=past), whole) <= 1e-5, kind
        assert far(whole, case.lean.run(TOKENS)[:, start:]) > 1e-3, kind


def test_an_edit_reaches_no_earlier_position_and_every_later_site(case: Case) -> None:
    clean = case.lean.run(TOKENS)
    for kind in LEAN_SITES:
        if kind == "attn.hook_pattern":
            continue

        def edit(value: torch.Tensor) -> torch.Tensor:
            push = torch.linspace(-1, 1, value[:, 6].numel()).square().view_as(value[:, 6])
            value[:, 6] += push  # in place, which must do the same as a new tensor
            return value

        edited = case.lean.run(TOKENS, [Intervention(f"blocks.0.{kind}", edit)])
        assert torch.equal(edited[:, :6], clean[:, :6]), kind
        later = 7 if kind in ("attn.hook_k", "attn.hook_v") else 6
        assert ((edited - clean).abs().amax((0, 2))[later:] > 0).all() or "sliding" in case.name, kind
        assert far(edited, clean) > 1e-4, kind


def test_a_key_value_head_serves_its_query_group_alone(case: Case) -> None:
    site, lean = "blocks.1.attn.hook_z", case.lean
    group = lean.n_heads // lean.n_kv_heads

    def only_first(value: torch.Tensor) -> torch.Tensor:
        return torch.cat([value[:, :, :1].roll(1, dims=0), value[:, :, 1:]], dim=2)

    seen: list[torch.Tensor] = []
    for edits in ([], [Intervention("blocks.1.attn.hook_v", only_first)]):
        lean.run(TOKENS, [*edits, Intervention(site, lambda value: seen.append(value) or value)])
    moved = (seen[0] - seen[1]).abs().amax((0, 1, 3)) > 0
    assert moved.tolist() == [True] * group + [False] * (lean.n_heads - group)


def test_resid_mid_edits_agree_in_place_functional_and_through_attn_out(case: Case) -> None:
    push = torch.randn(32, generator=torch.Generator().manual_seed(2))
    ways = [
        ("hook_resid_mid", lambda value: value + push),
        ("hook_resid_mid", lambda value: value.add_(push)),
        ("hook_attn_out", lambda value: value + push),
    ]
    one, two, three = (case.lean.run(TOKENS, [Intervention(f"blocks.1.{kind}", way)]) for kind, way in ways)
    assert torch.equal(one, two)
    assert far(one, three) <= 1e-5
    assert far(one, case.lean.run(TOKENS)) > 1e-2


def test_results_do_not_depend_on_the_gradient_mode(case: Case) -> None:
    for kind in LEAN_SITES:
        edit = [Intervention(f"blocks.1.{kind}", lambda value: value * 0.5)]
        with torch.enable_grad():
            on = case.lean.run(TOKENS, edit)
            push = torch.ones((), requires_grad=True)
            flowing = case.lean.run(TOKENS, [Intervention(f"blocks.1.{kind}", lambda v, p=push: v * 0.5 * p)])
        with torch.no_grad():
            off = case.lean.run(TOKENS, edit)
        with torch.inference_mode():
            inference = case.lean.run(TOKENS, edit)
        assert torch.equal(on, off) and torch.equal(off, inference), kind
        assert far(flowing, off) <= 1e-5, kind
        (gradient,) = torch.autograd.grad(flowing.square().sum(), push)
        assert gradient.abs() > 0, kind


def test_the_residual_leaving_a_block_is_the_one_entering_the_next(case: Case) -> None:
    value = torch.randn(3, 12, 32, generator=torch.Generator().manual_seed(3))
    post, pre = (case.lean.run(TOKENS, at(s, value)) for s in ("blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"))
    assert torch.equal(post, pre)
    assert torch.equal(case.lean.resume(1, value), pre)


def test_only_the_needed_blocks_are_loaded_in_every_family(case: Case) -> None:
    part = loaded(model.load(case.folder, name=case.name, upto=2))
    assert (part.n_layers, len(part._family.layers)) == (3, 2)
    sites = [site for site in part.sites() if not site.endswith("pattern")]
    ours, whole = part.capture(TOKENS, sites), case.lean.capture(TOKENS, sites)
    assert all(torch.equal(ours[site], whole[site]) for site in sites)
    with pytest.raises(StageError, match="cannot compute logits"):
        part.run(TOKENS)


def test_a_family_that_lean_does_not_know_goes_through_transformer_lens(tmp_path: Path) -> None:
    pytest.importorskip("transformer_lens")
    hf = save_tiny(tmp_path / "other", model=GPTNeoXForCausalLM).requires_grad_(False)
    other = model.load(tmp_path / "other", name="other")
    assert other.engine == "transformer-lens"
    assert far(other.run(TOKENS), hf(TOKENS).logits) <= 1e-5
    states = hf(TOKENS, output_hidden_states=True).hidden_states
    site = "blocks.1.hook_resid_post"
    assert far(other.capture(TOKENS, [site])[site], states[2]) <= 1e-5
    with pytest.raises(UsageError, match="'gpt_neox' family"):
        model.load(tmp_path / "other", name="other", engine="lean")


def test_a_past_may_be_picked_by_rows_before_it_is_used(llama: Path) -> None:
    lean = loaded(model.load(llama, name="tiny"))
    site = "blocks.1.hook_resid_pre"
    found, past = lean.capture_all(TOKENS, [site])
    rows = torch.tensor([2, 0, 2, 1])
    picked = past.rows(rows)
    assert (picked.batch, picked.length, past.batch) == (4, 12, 3)
    resumed = lean.resume(1, found[site][rows, 4:], start=4, past=picked)
    assert far(resumed, lean.run(TOKENS)[rows, 4:]) <= 1e-5
    twice = lean.resume(1, found[site][rows[:2], 4:], start=4, past=picked.rows(torch.tensor([0, 1])))
    assert torch.equal(twice, lean.resume(1, found[site][rows[:2], 4:], start=4, past=past.rows(rows[:2])))


def test_a_past_that_does_not_fit_is_refused(llama: Path) -> None:
    lean = loaded(model.load(llama, name="tiny"))
    rest, past = torch.zeros(3, 6, 32), lean.past(TOKENS)
    for wrong in (
        {"start": 6},
        {"start": 6, "past": past.upto(5)},
        {"start": 6, "past": past.rows(torch.tensor([0]))},
        {"start": 6, "past": past, "positions": torch.tensor([5, 11, 11])},
        {"start": -1, "past": past},
    ):
        with pytest.raises(UsageError):
            lean.resume(1, rest, **wrong)


def test_an_edit_in_place_leaves_the_callers_residual_alone(llama: Path) -> None:
    lean = loaded(model.load(llama, name="tiny"))
    residual = torch.ones(1, 4, 32)
    lean.resume(1, residual, [Intervention("blocks.1.hook_resid_pre", lambda value: value.zero_())])
    assert (residual == 1).all()


def test_transformer_lens_keeps_no_past_and_says_so(llama: Path) -> None:
    pytest.importorskip("transformer_lens")
    bridge = model.load(llama, name="tiny", engine="transformer-lens")
    assert not bridge.reuses_prefix
    for refused in (
        lambda: bridge.past(TOKENS),
        lambda: bridge.capture_all(TOKENS, []),
        lambda: bridge.resume(1, torch.zeros(1, 2, 32), start=1),
    ):
        with pytest.raises(UsageError, match="prefix"):
            refused()
    assert "transformer-lens" in str(bridge.accelerate(TOKENS, []))


def test_a_model_with_eager_attention_does_not_see_the_future(llama: Path) -> None:
    hf = LlamaForCausalLM.from_pretrained(llama, attn_implementation="eager")
    lean = LeanModel(hf, describe(llama, name="tiny"), None, [0, 1])
    assert far(lean.run(TOKENS), loaded(model.load(llama, name="tiny")).run(TOKENS)) <= 1e-5


def test_the_self_check_names_an_inner_site_that_disagrees(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lean = loaded(model.load(llama, name="tiny"))
    turned = lean._family.turned
    monkeypatch.setattr(lean._family, "turned", lambda block, q, k, rotation: turned(block, q, k * 1.1, rotation))
    lean.check(TOKENS, ["blocks.1.attn.hook_q", "blocks.0.hook_resid_post"])
    with pytest.raises(StageError, match=r"blocks\.1\.attn\.hook_pattern"):
        lean.check(TOKENS, ["blocks.1.attn.hook_pattern"])


def test_a_device_map_gives_the_same_model(llama: Path) -> None:
    pytest.importorskip("accelerate")
    plain, mapped = (loaded(model.load(llama, name="t", device_map=m)) for m in (None, {"": "cpu"}))
    assert torch.equal(plain.run(TOKENS), mapped.run(TOKENS))
    assert mapped.device == torch.device("cpu")
    with pytest.raises(UsageError, match="spread"):
        model.load(llama, name="t", engine="transformer-lens", device_map="auto")


def test_the_stream_follows_the_blocks_from_device_to_device(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lean = loaded(model.load(llama, name="tiny"))
    clean, past = lean.run(TOKENS), lean.past(TOKENS)
    moves: list[str] = []
    to = torch.Tensor.to

    def spy(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and str(args[0]) == "cpu:7" and self.ndim == 3 and self.shape[-1] == 32:
            moves.append("there")
        return to(self, *("cpu" if str(arg) == "cpu:7" else arg for arg in args), **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", spy)
    monkeypatch.setattr(lean, "_homes", [lean.device, torch.device("cpu:7"), torch.device("cpu:7")])
    assert torch.equal(lean.run(TOKENS), clean)
    assert moves == ["there", "there"]  # the stub stays on the CPU, so it is sent again for the third block
    site = "blocks.2.hook_resid_pre"
    found = lean.capture(TOKENS, [site])[site]
    assert found.device == lean.device
    assert far(lean.resume(2, found[:, 4:], start=4, past=past), clean[:, 4:]) <= 1e-5


@pytest.mark.gpu
def test_a_model_spread_over_gpu_and_cpu_gives_the_logits_of_one_device(llama: Path) -> None:
    spread = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.norm": 0, "lm_head": 0}
    spread |= {"model.layers.1": "cpu", "model.layers.2": 0}
    lean = loaded(model.load(llama, name="t", device_map=spread))
    assert far(lean.run(TOKENS).cpu(), loaded(model.load(llama, name="t")).run(TOKENS)) <= 1e-4
    assert max(lean.check(TOKENS, lean.sites()).values()) <= 1e-4


def test_fused_blocks_give_the_same_rows_and_no_second_copy_of_the_weights(case: Case) -> None:
    lean = loaded(model.load(case.folder, name=case.name))
    clean, sites = lean.run(TOKENS), ["blocks.0.hook_resid_pre", "blocks.2.hook_resid_post"]
    plain = lean.capture(TOKENS, sites)
    reason = lean.accelerate(TOKENS, sites)
    if case.name == "gpt2":
        assert reason is not None and "family" in reason
        return
    assert reason is None
    block = lean._family.layers[1]
    attn = block.self_attn
    assert attn.k_proj.weight.untyped_storage().data_ptr() == attn.q_proj.weight.untyped_storage().data_ptr()
    assert far(lean.run(TOKENS), clean) <= 1e-5
    for site, value in lean.capture(TOKENS, sites).items():
        assert far(value, plain[site]) <= 1e-5
    assert max(lean.check(TOKENS, lean.sites()).values()) <= 2e-6  # looked into, it walks as before


def test_only_the_usual_shape_is_compiled(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[int, ...]] = []

    def compiler(function: Any, **how: Any) -> Any:
        return lambda hidden, *rest: ran.append(tuple(hidden.shape)) or function(hidden, *rest)

    monkeypatch.setattr(fast.torch, "compile", compiler)
    lean = loaded(model.load(llama, name="t"))
    assert lean.accelerate(TOKENS, ["blocks.2.hook_resid_post"], compiled=True) is None
    assert ran == [(3, 12, 32)] * 3
    lean.capture(TOKENS[:, :9], ["blocks.2.hook_resid_post"])
    assert len(ran) == 3
    lean.capture(TOKENS, ["blocks.2.hook_mlp_out"])  # the block that is looked into walks
    assert len(ran) == 5


def test_a_compiler_that_fails_or_errs_changes_nothing(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = "blocks.2.hook_resid_post"
    lean = loaded(model.load(llama, name="t"))
    plain = lean.capture(TOKENS, [site])[site]

    def broken(function: Any, **how: Any) -> Any:
        def run(*args: Any) -> torch.Tensor:
            raise RuntimeError("no triton")

        return run

    monkeypatch.setattr(fast.torch, "compile", broken)
    assert "compiler failed" in str(lean.accelerate(TOKENS, [site], compiled=True))
    assert torch.equal(lean.capture(TOKENS, [site])[site], plain)
    monkeypatch.setattr(fast.torch, "compile", lambda function, **how: lambda *args: function(*args) * 1.01)
    assert "differ" in str(lean.accelerate(TOKENS, [site], compiled=True))
    assert torch.equal(lean.capture(TOKENS, [site])[site], plain)
    assert lean.accelerate(TOKENS, [site]) is None  # fused without a compiler is still there


@pytest.mark.slow
def test_the_real_compiler_gives_the_same_rows(case: Case) -> None:
    lean = loaded(model.load(case.folder, name=case.name))
    reason = lean.accelerate(TOKENS, ["blocks.2.hook_resid_post"], compiled=True)
    assert (reason is None) == (case.name != "gpt2"), reason
