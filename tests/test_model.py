"""The frozen model: lean equals Hugging Face and the bridge, edits do what they say, refusals say why."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_httpserver import HTTPServer
from tiny_llama import BOS, TEXT, context, make_project, save_tiny

from greatctl import model
from greatctl.errors import AccessError, InputError, ManifestError, ResourceError, StageError, UsageError
from greatctl.events import Event
from greatctl.model import Intervention
from greatctl.model.interface import LEAN_SITES, RESIDUAL_SITES, site_names
from greatctl.stages import models

ROOT = Path(__file__).resolve().parents[1]
TOKENS = torch.randint(2, 320, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(path)
    return path


@pytest.fixture(scope="module")
def lean(folder: Path) -> Any:
    return model.load(folder, name="tiny")


@pytest.fixture(scope="module")
def bridge(folder: Path) -> Any:
    pytest.importorskip("transformer_lens")
    return model.load(folder, name="tiny", engine="transformer-lens")


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max())


def test_captures_are_hugging_faces_hidden_states(folder: Path, lean: Any) -> None:
    hf = save_tiny(folder.parent / "again")
    states = hf(TOKENS, output_hidden_states=True).hidden_states
    sites = [f"blocks.{layer}.hook_resid_pre" for layer in range(3)]
    found = lean.capture(TOKENS, [*sites, "blocks.1.hook_resid_post"])
    for layer, site in enumerate(sites):
        assert far(found[site], states[layer]) <= 1e-5
    assert torch.equal(found["blocks.1.hook_resid_post"], found["blocks.2.hook_resid_pre"])


def test_lean_equals_transformer_lens_at_every_site_and_under_edits(lean: Any, bridge: Any) -> None:
    ours, theirs = lean.capture(TOKENS, lean.sites()), bridge.capture(TOKENS, lean.sites())
    for site in lean.sites():
        assert far(ours[site], theirs[site]) <= 1e-5, site
    for kind in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post"):
        edit = [Intervention(f"blocks.1.{kind}", lambda value: value.roll(1, dims=0))]
        assert far(lean.run(TOKENS, edit), bridge.run(TOKENS, edit)) <= 1e-5, kind
        assert far(lean.run(TOKENS, edit), lean.run(TOKENS)) > 1e-2, kind
    residual = ours["blocks.2.hook_resid_pre"]
    assert far(bridge.resume(2, residual), lean.run(TOKENS)) <= 1e-5


def test_the_bridge_reaches_heads_and_refuses_half_an_edit(bridge: Any) -> None:
    heads = bridge.capture(TOKENS, ["blocks.2.attn.hook_z", "blocks.0.attn.hook_k"])
    assert heads["blocks.2.attn.hook_z"].shape == (3, 12, 4, 8)
    assert heads["blocks.0.attn.hook_k"].shape[-2] == 2  # key-value heads, not padded to query heads
    with pytest.raises(UsageError, match="resid_mid"):
        bridge.run(TOKENS, [Intervention("blocks.1.hook_resid_mid", lambda value: value)])


def test_editing_resid_mid_reaches_the_skip_connection(lean: Any) -> None:
    push = torch.randn(32, generator=torch.Generator().manual_seed(2))
    mid = lean.run(TOKENS, [Intervention("blocks.1.hook_resid_mid", lambda value: value + push)])
    attn = lean.run(TOKENS, [Intervention("blocks.1.hook_attn_out", lambda value: value + push)])
    assert far(mid, attn) <= 1e-5
    assert far(mid, lean.run(TOKENS)) > 1e-2


def test_resuming_from_any_layer_is_the_whole_run(lean: Any) -> None:
    clean = lean.run(TOKENS)
    found = lean.capture(TOKENS, site_names(3, RESIDUAL_SITES))
    for layer in range(3):
        assert torch.equal(lean.resume(layer, found[f"blocks.{layer}.hook_resid_pre"]), clean)
    assert torch.equal(lean.resume(3, found["blocks.2.hook_resid_post"]), clean)
    edit = [Intervention("blocks.2.hook_attn_out", torch.zeros_like)]
    assert torch.equal(lean.resume(1, found["blocks.1.hook_resid_pre"], edit), lean.run(TOKENS, edit))


def test_an_intervention_that_is_never_reached_is_an_error(lean: Any, bridge: Any) -> None:
    residual = lean.capture(TOKENS, ["blocks.2.hook_resid_pre"])["blocks.2.hook_resid_pre"]
    for engine in (lean, bridge):
        with pytest.raises(StageError, match=r"blocks\.0\.hook_mlp_out did not happen"):
            engine.resume(2, residual, [Intervention("blocks.0.hook_mlp_out", torch.zeros_like)])


def test_an_edit_may_not_change_the_shape(lean: Any) -> None:
    with pytest.raises(StageError, match="changed the shape"):
        lean.run(TOKENS, [Intervention("blocks.0.hook_mlp_out", lambda value: value[:, :1])])


def test_only_the_asked_positions_are_unembedded(lean: Any) -> None:
    at = torch.tensor([11, 0, 5])
    picked = lean.run(TOKENS, positions=at)
    assert picked.shape == (3, 320)
    assert far(picked, lean.run(TOKENS)[torch.arange(3), at]) <= 1e-5


def test_right_padding_changes_no_real_position(lean: Any) -> None:
    padded = torch.cat([TOKENS, torch.ones(3, 7, dtype=torch.long)], dim=1)
    sites = [site for site in lean.sites() if not site.endswith("hook_pattern")]
    alone, beside = lean.capture(TOKENS, sites), lean.capture(padded, sites)
    assert max(far(alone[site], beside[site][:, :12]) for site in sites) <= 1e-5


def test_capture_stops_after_the_deepest_site(lean: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("this part is deeper than what was asked for")

    monkeypatch.setattr(lean._decoder.layers[1].mlp, "forward", never)
    monkeypatch.setattr(lean._decoder.layers[2], "forward", never)
    assert set(lean.capture(TOKENS, ["blocks.1.hook_resid_mid"])) == {"blocks.1.hook_resid_mid"}
    with pytest.raises(AssertionError, match="deeper"):
        lean.capture(TOKENS, ["blocks.1.hook_mlp_out"])


def test_upto_loads_only_the_needed_blocks_and_captures_the_same(folder: Path, lean: Any) -> None:
    part = model.load(folder, name="tiny", upto=2)
    assert part.n_layers == 3
    assert len(part._decoder.layers) == 2
    site = "blocks.1.hook_resid_post"
    assert torch.equal(part.capture(TOKENS, [site])[site], lean.capture(TOKENS, [site])[site])
    with pytest.raises(StageError, match="cannot compute logits"):
        part.run(TOKENS)
    with pytest.raises(ManifestError):
        model.load(folder, name="tiny", upto=4)


def test_an_unknown_site_names_the_nearest(lean: Any, bridge: Any) -> None:
    for engine in (lean, bridge):
        with pytest.raises(UsageError) as caught:
            engine.capture(TOKENS, ["blocks.1.hook_resid_pst"])
        assert "hook_resid_post" in caught.value.fix


def test_the_self_check_names_the_site_that_disagrees(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = model.load(folder, name="tiny")
    mask = torch.ones(1, 1, 12, 12, dtype=torch.bool)
    monkeypatch.setattr(broken, "_mask", lambda layer, start, x, explicit: mask if layer == 1 else None)
    with pytest.raises(StageError, match=r"disagrees with Hugging Face at blocks\.1\.hook_attn_out"):
        broken.check(TOKENS, ["blocks.1.hook_resid_pre", "blocks.1.hook_attn_out"])


def test_gradients_flow_through_an_edit_and_nowhere_else(lean: Any) -> None:
    assert not lean.run(TOKENS).requires_grad
    push = torch.zeros(32, requires_grad=True)
    logits = lean.run(TOKENS, [Intervention("blocks.1.hook_resid_pre", lambda value: value + push)])
    logits[:, -1, 5].sum().backward()
    assert push.grad is not None
    assert push.grad.abs().max() > 0


def test_bfloat16_weights_stay_bfloat16_and_dtype_is_chosen_by_width(folder: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "wide", hidden_size=1024, intermediate_size=8, num_hidden_layers=1, dtype="bfloat16")
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    (tmp_path / "wide" / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert model.load(tmp_path / "wide", name="w").dtype == torch.bfloat16
    assert model.load(folder, name="t").dtype == torch.float32
    assert model.load(folder, name="t", dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(UsageError, match="int8"):
        model.load(folder, name="t", dtype="int8")


def test_encode_puts_one_bos_in_front_and_reads_special_text_as_text(lean: Any) -> None:
    ids = model.encode(lean.tokenizer, f"{BOS} he said {BOS}")
    assert ids[0] == 0
    assert ids.count(0) == 1
    assert lean.tokenizer.decode(ids[1:]) == f"{BOS} he said {BOS}"
    assert model.encode(lean.tokenizer, BOS * 3).count(0) == 1
    assert model.encode(lean.tokenizer, "")[:2] == [0]


def test_a_tokenizer_that_insists_on_special_text_still_gives_one_bos(lean: Any) -> None:
    class Insists:
        bos_token_id, eos_token_id = 0, 1

        def __call__(self, text: str, **how: object) -> dict[str, list[int]]:
            return {"input_ids": [0, 0, 5, 0, 6]}

    assert model.encode(Insists(), f"{BOS}{BOS}he{BOS}said") == [0, 5, 6]
    assert lean.special_ids == [0, 1]


def test_the_revision_follows_the_weights_and_not_the_folder(folder: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "same")
    save_tiny(tmp_path / "other", seed=7)
    assert model.revision_of(folder) == model.revision_of(tmp_path / "same")
    assert model.revision_of(folder) != model.revision_of(tmp_path / "other")


def test_a_folder_that_is_no_model_says_why(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="not a usable model") as caught:
        model.load(tmp_path / "empty", name="e")
    assert "config.json" in caught.value.why
    save_tiny(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    with pytest.raises(InputError) as caught:
        model.load(tmp_path / "pickled", name="p")
    assert "safetensors" in caught.value.why
    save_tiny(tmp_path / "short")
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(InputError) as caught:
        model.load(tmp_path / "short", name="s")
    assert "weights are missing" in caught.value.why
    (tmp_path / "short" / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(InputError):
        model.load(tmp_path / "short", name="s")
    with pytest.raises(InputError, match="there is no folder"):
        model.load(tmp_path / "nowhere", name="n")


def test_a_device_that_is_not_there_suggests_the_cpu() -> None:
    assert models.pick_device("cpu") == "cpu"
    with pytest.raises(UsageError):
        models.pick_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ResourceError) as caught:
            models.pick_device("cuda")
        assert "cpu" in caught.value.fix


def test_a_model_larger_than_the_first_gpu_is_spread_over_all_and_said_aloud(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(model, "load", lambda *a, **k: asked.append(k["device_map"]), raising=False)
    monkeypatch.setattr(models, "pick_device", lambda wanted: "cuda" if wanted == "auto" else wanted)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    size = model.weight_bytes(folder, model.describe(folder))
    assert size == pytest.approx((folder / "model.safetensors").stat().st_size, rel=0.01)
    assert model.weight_bytes(folder, model.describe(folder), dtype="bfloat16", upto=1) == size // 6
    said: list[Event] = []
    ctx = dataclasses.replace(context(make_project(tmp_path, {}), emit=said.append), device="auto")
    for free in (2 * size, size, size // 2):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number, free=free: (free, free))
        models.open_model(ctx, str(folder))
    assert asked == [None, "auto", "auto"]
    assert ["main memory" in e.message for e in said] == [False, True]
    assert all("2 GPUs" in e.message for e in said)
    models.open_model(dataclasses.replace(ctx, device="cuda:1"), str(folder))  # one GPU by number stays one
    assert asked[-1] is None


def test_offline_without_a_cached_copy_is_an_access_error(tmp_path: Path) -> None:
    with pytest.raises(AccessError) as caught:
        model.load("greatctl-tests/no-such-model", name="x", offline=True)
    assert "bundled" in caught.value.fix


ASK = """
import sys
from greatctl import model
from greatctl.errors import GreatctlError
try:
    model.load("acme/locked", name="acme/locked")
except GreatctlError as error:
    print(type(error).__name__, error.exit_code, error.message, error.why, error.fix, sep="|")
"""


@pytest.mark.parametrize(
    ("status", "headers", "kind"),
    [
        (401, {}, "AccessError"),
        (401, {"X-Error-Code": "GatedRepo"}, "AccessError"),
        (403, {}, "AccessError"),
        (403, {"X-Error-Code": "GatedRepo"}, "AccessError"),
        (404, {"X-Error-Code": "RepoNotFound"}, "AccessError"),
        (500, {}, "NetworkError"),
    ],
)
def test_the_hubs_refusals_end_with_the_steps_to_take(
    status: int, headers: dict[str, str], kind: str, httpserver: HTTPServer, tmp_path: Path
) -> None:
    httpserver.expect_request("/api/models/acme/locked/revision/main").respond_with_data("no", status, headers)
    for handler in ("/acme/locked/resolve/main/config.json", "/api/models/acme/locked"):
        httpserver.expect_request(handler).respond_with_data("no", status, headers)
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {
        "HF_ENDPOINT": httpserver.url_for("").rstrip("/"),
        "HF_HOME": str(tmp_path),
        "HF_TOKEN": "hf_secret123",
    }
    env |= {"PYTHONPATH": str(ROOT), "NO_PROXY": "*"}
    done = subprocess.run([sys.executable, "-c", ASK], env=env, capture_output=True, text=True, timeout=60, check=False)
    words = done.stdout.strip().split("|")
    assert words[0] == kind, done.stdout + done.stderr
    assert "hf_secret123" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    if kind == "AccessError":
        assert words[1] == "4"
        for step in ("https://huggingface.co/acme/locked", "HF_TOKEN", "--model bundled"):
            assert step in words[4]


CACHED = """
import sys, torch
from greatctl import model
frozen = model.load("acme/tiny", name="acme/tiny")
print(frozen.revision, tuple(frozen.run(torch.tensor([[0, 5, 6]])).shape))
"""


def test_a_hub_id_in_the_cache_is_read_offline_and_pinned_to_its_commit(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--acme--tiny"
    save_tiny(cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", CACHED], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.split(maxsplit=1) == [commit, "(1, 3, 320)\n"], done.stderr
    assert done.stderr == ""


def test_the_bundled_model_reads_english() -> None:
    try:
        source, name = models.resolve("bundled")
    except (InputError, ImportError) as missing:
        pytest.skip(f"no bundled model: {missing}")
    frozen = model.load(source, name=name)
    ids = torch.tensor([model.encode(frozen.tokenizer, TEXT)])
    loss = torch.nn.functional.cross_entropy(frozen.run(ids)[0, :-1], ids[0, 1:])
    assert loss < 0.8 * torch.log(torch.tensor(frozen.d_vocab))
    assert max(frozen.check(ids, frozen.sites()).values()) <= 1e-4
    assert {site.split(".", 2)[2] for site in frozen.sites()} == set(LEAN_SITES)
