"""Harvest: rows are the model's activations, and no kill, flipped bit or full disk changes or loses any."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_llama import TEXT, context, make_project, save_tiny

from greatctl.corpus.windows import TokenStore
from greatctl.errors import (
    InputError,
    IntegrityError,
    InterruptedRun,
    ManifestError,
    ResourceError,
    StageError,
    UsageError,
)
from greatctl.events import Event, Run, StopRequest
from greatctl.model.lean import LeanModel
from greatctl.stages import harvest, tokenize
from greatctl.stages.context import Project
from greatctl.store import shards
from greatctl.store.artifact import load
from greatctl.store.shards import ShardReader

ROOT = Path(__file__).resolve().parents[1]
TEXTS = {"darwin-a": TEXT * 4, "wood-b": TEXT[::-1] * 3}
SITE = "blocks.1.hook_resid_post"
SMALL = {"shard_windows": 8, "batch_size": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(path)
    return path


def tokenized(root: Path, folder: Path) -> Project:
    project = make_project(root, TEXTS)
    tokenize.run(context(project), tokenize.Config(model=str(folder), window=16))
    return project


def config(**more: Any) -> harvest.Config:
    return harvest.Config(**{**SMALL, **more})


def outputs(project: Project, site: str = SITE) -> Mapping[str, bytes]:
    artifact = load(project.activations / "tiny" / site).check()
    return {row["path"]: (artifact.path / row["path"]).read_bytes() for row in artifact.outputs}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Mapping[str, bytes]:
    """The bytes of a harvest that nothing disturbed."""
    project = tokenized(tmp_path_factory.mktemp("undisturbed"), folder)
    harvest.run(context(project), config())
    return outputs(project)


def test_rows_are_the_activations_of_every_real_token(tmp_path: Path, folder: Path) -> None:
    project = tokenized(tmp_path, folder)
    result = harvest.run(context(project), config())
    hf = save_tiny(tmp_path / "again")
    store = TokenStore(project.tokens / "tiny-16")
    reader = ShardReader(project.activations / "tiny" / SITE)
    assert reader.rows == int(store.length.sum()) == result.summary["n_tokens"]
    assert len(reader.entries) == result.summary["shards"] > 1
    for shard in reader:
        for key in ("window", "position", "token"):
            assert shard[key].dtype == torch.int32
        truth = hf(store.input_ids.long(), output_hidden_states=True).hidden_states[2]
        windows, positions = shard["window"].long(), shard["position"].long()
        assert (shard["acts"] - truth[windows, positions]).abs().max() <= 1e-5
        assert torch.equal(shard["token"], store.input_ids[windows, positions])
        assert (positions < store.length[windows]).all()


def test_statistics_leave_special_tokens_out(tmp_path: Path, folder: Path) -> None:
    project = tokenized(tmp_path, folder)
    harvest.run(context(project), config())
    path = project.activations / "tiny" / SITE
    parts = list(ShardReader(path))
    acts = torch.cat([p["acts"] for p in parts]).double()[torch.cat([p["token"] for p in parts]) > 1]
    stats = load_file(path / "stats.safetensors")
    assert torch.allclose(stats["mean"], acts.mean(0), atol=1e-12)
    assert torch.allclose(stats["mean_norm"], acts.norm(dim=1).mean())
    assert torch.allclose(stats["variance"], (acts - acts.mean(0)).square().sum(1).mean())
    assert (stats["mean"].shape, stats["mean_norm"].shape, stats["variance"].shape) == ((32,), (1,), (1,))
    meta = json.loads((path / "meta.json").read_text())
    assert (meta["hook_point"], meta["layer"], meta["n_layers"], meta["d_model"]) == (SITE, 1, 3, 32)
    assert (meta["dtype"], meta["tokens_name"], meta["special_ids"]) == ("float32", "tiny-16", [0, 1])


def test_several_hook_points_in_one_pass_give_the_bytes_of_single_passes(
    tmp_path: Path, folder: Path, undisturbed: Mapping[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tokenized(tmp_path, folder)
    passes = []
    capture = LeanModel.capture
    monkeypatch.setattr(LeanModel, "capture", lambda *a: passes.append(a[2]) or capture(*a))
    sites = ["blocks.0.hook_mlp_out", SITE]
    result = harvest.run(context(project), config(hook_point=sites))
    assert outputs(project) == undisturbed
    assert result.summary["hook_point"] == sites[0]
    assert result.summary["hook_points"] == sites
    windows = len(TokenStore(project.tokens / "tiny-16").length)
    batches = sum(-(-min(8, windows - start) // 3) for start in range(0, windows, 8))
    assert len(passes) == 1 + batches  # the self-check, then each batch once
    again = harvest.run(context(project), config(hook_point=sites))
    assert again.up_to_date
    assert again.summary == result.summary


class Killed(BaseException):
    """Stands for a process that is no more: nothing in the code under test catches it."""


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_run_that_dies_resumes_and_ends_with_the_same_bytes(
    at: int, tmp_path: Path, folder: Path, undisturbed: Mapping[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tokenized(tmp_path, folder)
    write = shards.ShardWriter.write
    written = []

    def dies(self: Any, number: int, *rest: Any) -> Any:
        if number == at:
            raise Killed
        return write(self, number, *rest)

    monkeypatch.setattr(shards.ShardWriter, "write", dies)
    with pytest.raises(Killed):
        harvest.run(context(project), config())
    assert not (project.activations / "tiny" / SITE).exists()
    monkeypatch.setattr(shards.ShardWriter, "write", lambda s, n, *r: written.append(n) or write(s, n, *r))
    said: list[Event] = []
    harvest.run(context(project, emit=said.append), config())
    assert written[0] == at
    assert outputs(project) == undisturbed
    progress = [e.data for e in said if e.kind == "progress"]
    assert progress[-1]["done"] == progress[-1]["total"]
    assert (progress[0]["already"] > 0) == (at > 0)  # type: ignore[operator]


CHILD = """
import sys, time
sys.path[:0] = [{tests!r}, {root!r}]
from pathlib import Path
from dataclasses import replace
from tiny_llama import context
from greatctl import manifest
from greatctl.stages import harvest
from greatctl.stages.context import Project
from greatctl.store import shards
root = Path(sys.argv[1])
write = shards.ShardWriter.write
def slow(self, number, *rest):
    entry = write(self, number, *rest)
    print(number, flush=True)
    time.sleep(0.2 if number < 1 else 60)
    return entry
shards.ShardWriter.write = slow
project = Project(root, manifest.load(root / "sources.toml"), root / "data", root / "results")
harvest.run(context(project), harvest.Config(shard_windows=8, batch_size=3))
"""


def test_sigkill_in_the_middle_leaves_a_run_that_resumes(
    tmp_path: Path, folder: Path, undisturbed: Mapping[str, bytes]
) -> None:
    project = tokenized(tmp_path, folder)
    code = CHILD.format(tests=str(ROOT / "tests"), root=str(ROOT))
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline().strip() == "0"
    assert child.stdout.readline().strip() == "1"
    os.kill(child.pid, signal.SIGKILL)
    child.wait(timeout=30)
    assert not (project.activations / "tiny" / SITE).exists()
    started = time.monotonic()
    harvest.run(context(project), config())
    assert time.monotonic() - started < 30
    assert outputs(project) == undisturbed


def test_a_request_to_stop_ends_after_what_is_on_disk(
    tmp_path: Path, folder: Path, undisturbed: Mapping[str, bytes]
) -> None:
    project = tokenized(tmp_path, folder)
    stop = StopRequest()
    ctx = context(project)
    ctx = type(ctx)(**{**vars(ctx), "run": Run("harvest", lambda event: stop.request(signal.SIGINT), stop)})
    with pytest.raises(InterruptedRun) as caught:
        harvest.run(ctx, config())
    assert caught.value.exit_code == 130
    harvest.run(context(project), config())
    assert outputs(project) == undisturbed


@pytest.mark.parametrize("how", ["flipped", "deleted", "truncated"])
def test_a_damaged_shard_is_refused_and_redone_alone(
    how: str, tmp_path: Path, folder: Path, undisturbed: Mapping[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tokenized(tmp_path, folder)
    harvest.run(context(project), config())
    victim = project.activations / "tiny" / SITE / "shard-00001.safetensors"
    data = bytearray(victim.read_bytes())
    data[-9] ^= 1
    if how == "deleted":
        victim.unlink()
    else:
        victim.write_bytes(bytes(data) if how == "flipped" else bytes(data[:-100]))
    with pytest.raises(IntegrityError, match="shard-00001"):
        load(victim.parent).check()
    written = []
    write = shards.ShardWriter.write
    monkeypatch.setattr(shards.ShardWriter, "write", lambda s, n, *r: written.append(n) or write(s, n, *r))
    harvest.run(context(project), config())
    assert written == [1]
    assert outputs(project) == undisturbed


def test_too_small_a_disk_is_refused_beforehand(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tokenized(tmp_path, folder)
    planned = harvest.plan(context(project), config()).facts["bytes"]
    assert planned == int(TokenStore(project.tokens / "tiny-16").length.sum()) * (32 * 4 + 12)
    monkeypatch.setattr(harvest, "free_bytes", lambda path: 1000)
    monkeypatch.setattr(harvest, "open_model", lambda *a, **k: pytest.fail("the model was loaded all the same"))
    with pytest.raises(ResourceError) as caught:
        harvest.run(context(project), config())
    assert "1,000 bytes free" in caught.value.why


def test_a_value_that_is_not_finite_is_named_by_shard_window_and_position(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tokenized(tmp_path, folder)
    capture = LeanModel.capture
    calls = []

    def poisoned(self: LeanModel, tokens: torch.Tensor, sites: list[str]) -> dict[str, torch.Tensor]:
        found = capture(self, tokens, sites)
        calls.append(tokens)
        if len(calls) == 6:  # the self-check, three batches of shard 0, then the second batch of shard 1
            found[sites[0]][1, 5, 7] = float("nan")
        return found

    monkeypatch.setattr(LeanModel, "capture", poisoned)
    with pytest.raises(IntegrityError, match="shard 1, window 12, position 5"):
        harvest.run(context(project), config())


def test_float16_that_overflows_is_not_stored(tmp_path: Path, folder: Path) -> None:
    hf = save_tiny(tmp_path / "loud")
    hf.model.embed_tokens.weight.data[0] = 1e5  # BOS, in every window
    hf.save_pretrained(tmp_path / "loud")
    project = tokenized(tmp_path, tmp_path / "loud")
    with pytest.raises(IntegrityError, match="position 0"):
        harvest.run(context(project), config(dtype="float16", hook_point=["blocks.0.hook_resid_pre"]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_stored_precision_is_the_one_asked_for(dtype: str, tmp_path: Path, folder: Path) -> None:
    project = tokenized(tmp_path, folder)
    result = harvest.run(context(project), config(dtype=dtype))
    assert result.summary["dtype"] == dtype
    assert result.artifact is not None
    assert ShardReader(result.artifact).read(0)["acts"].dtype == getattr(torch, dtype)


def test_a_model_that_disagrees_with_hugging_face_is_not_harvested(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tokenized(tmp_path, folder)
    embed = LeanModel._embed
    monkeypatch.setattr(LeanModel, "_embed", lambda self, tokens: embed(self, tokens) * 1.01)
    with pytest.raises(StageError, match=SITE):
        harvest.run(context(project), config())


def test_bad_places_are_refused_before_weights_are_read(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tokenized(tmp_path, folder)
    monkeypatch.setattr(harvest, "open_model", lambda *a, **k: pytest.fail("the model was loaded all the same"))
    ctx = context(project)
    for wrong in (config(layer=3), config(hook_point=["blocks.7.hook_resid_pre"]), config(layer=-1)):
        with pytest.raises(ManifestError, match="out of range"):
            harvest.run(ctx, wrong)
    for wrong in (config(hook_point=["resid_post"]), config(layer=1, hook_point=[SITE])):
        with pytest.raises(UsageError):
            harvest.run(ctx, wrong)
    with pytest.raises(UsageError) as caught:
        harvest.run(ctx, config(hook_point=["blocks.1.hook_resid_pots"]))
    assert "'blocks.1.hook_resid_post'" in caught.value.fix
    with pytest.raises(UsageError, match="lean engine"):
        harvest.run(ctx, config(hook_point=["blocks.1.attn.hook_z"], engine="lean"))


def test_layer_is_short_for_its_residual_stream(tmp_path: Path, folder: Path) -> None:
    project = tokenized(tmp_path, folder)
    planned = harvest.plan(context(project), config(layer=0))
    assert planned.facts["hook_points"] == ["blocks.0.hook_resid_post"]
    assert planned.final == project.activations / "tiny" / "blocks.0.hook_resid_post"


def test_tokens_of_another_tokenizer_are_refused_with_both_hashes(tmp_path: Path, folder: Path) -> None:
    project = tokenized(tmp_path, folder)
    save_tiny(tmp_path / "other")
    spoilt = tmp_path / "other" / "tokenizer.json"
    spoilt.write_text(spoilt.read_text().replace('"h"', '"\\u0068 "', 1))
    with pytest.raises(InputError) as caught:
        harvest.run(context(project), config(model=str(tmp_path / "other")))
    assert caught.value.why.count("…") == 2
    assert "greatctl tokenize" in caught.value.fix


def test_without_tokens_it_says_to_tokenize_first(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        harvest.plan(context(make_project(tmp_path, {})), config())
    assert "greatctl tokenize" in caught.value.fix


def test_other_sites_are_harvested_through_transformer_lens(tmp_path: Path, folder: Path) -> None:
    pytest.importorskip("transformer_lens")
    project = tokenized(tmp_path, folder)
    both = config(hook_point=["blocks.1.attn.hook_z", SITE])
    result = harvest.run(context(project), both)
    assert result.summary["d_model"] == 32
    truth = outputs_acts(project, SITE)
    harvest.run(context(project), config(engine="lean", hook_point=[SITE]))
    assert (outputs_acts(project, SITE) - truth).abs().max() <= 1e-5


def outputs_acts(project: Project, site: str) -> torch.Tensor:
    return torch.cat([shard["acts"] for shard in ShardReader(project.activations / "tiny" / site)])
