"""Harvest: rows are the model's activations, and no kill, flipped bit or full disk changes or loses any."""

from __future__ import annotations

import dataclasses
import json
import os
import random
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

from greatctl import model
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
from greatctl.model.reading import auto_batch
from greatctl.stages import harvest, tokenize
from greatctl.stages.behind import Behind
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
from greatctl.stages.behind import Behind
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
        harvest.run(ctx, config(hook_point=["blocks.1.ln1.hook_normalized"], engine="lean"))
    with pytest.raises(UsageError, match="hook_pattern cannot be harvested"):
        harvest.run(ctx, config(hook_point=["blocks.1.attn.hook_pattern"]))


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
    both = config(hook_point=["blocks.1.ln1.hook_normalized", SITE])
    result = harvest.run(context(project), both)
    assert result.summary["d_model"] == 32
    truth = outputs_acts(project, SITE)
    harvest.run(context(project), config(engine="lean", hook_point=[SITE]))
    assert (outputs_acts(project, SITE) - truth).abs().max() <= 1e-5


def outputs_acts(project: Project, site: str) -> torch.Tensor:
    return torch.cat([shard["acts"] for shard in ShardReader(project.activations / "tiny" / site)])


def words(seed: int) -> str:
    """A text that no other repeats, and whose last window is as long as its seed makes it."""
    chance = random.Random(seed)
    return " ".join("".join(chance.choices("aehilnorst", k=5)) for _ in range(7 + 2 * seed)) + ".\n"


UNEVEN = {f"wood-{seed}": words(seed) for seed in range(7)}


def uneven(root: Path, folder: Path) -> Project:
    project = make_project(root, UNEVEN)
    tokenize.run(context(project), tokenize.Config(model=str(folder), window=16))
    return project


def test_heads_and_neurons_are_harvested_flat(tmp_path: Path, folder: Path) -> None:
    project = uneven(tmp_path, folder)
    sites = ["blocks.1.attn.hook_k", "blocks.0.mlp.hook_post"]
    result = harvest.run(context(project), config(hook_point=sites))
    assert result.summary["d_model"] == 16  # two key-value heads of eight
    frozen = model.load(folder, name="tiny")
    store = TokenStore(project.tokens / "tiny-16")
    truth = frozen.capture(store.input_ids.long(), sites)[sites[0]].flatten(2)
    for shard in ShardReader(project.activations / "tiny" / sites[0]):
        rows = truth[shard["window"].long(), shard["position"].long()]
        assert (shard["acts"] - rows).abs().max() <= 1e-5


def test_windows_of_uneven_length_give_the_rows_of_one_by_one_with_hardly_any_padding(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = uneven(tmp_path, folder)
    read_tokens = []
    capture = LeanModel.capture
    monkeypatch.setattr(LeanModel, "capture", lambda *a: read_tokens.append(a[1].numel()) or capture(*a))
    result = harvest.run(context(project), config(shard_windows=64))
    store = TokenStore(project.tokens / "tiny-16")
    assert len(set(store.length.tolist())) >= 4
    real, padded = result.summary["n_tokens"], sum(read_tokens[1:])  # the first is the self-check
    assert padded - real < 0.4 * (store.input_ids.numel() - real)  # type: ignore[operator]
    frozen = model.load(folder, name="tiny")
    (shard,) = ShardReader(project.activations / "tiny" / SITE)
    at = 0
    for window, length in enumerate(store.length.tolist()):
        alone = frozen.capture(store.input_ids[window : window + 1, :length].long(), [SITE])[SITE][0]
        assert (shard["acts"][at : at + length] - alone).abs().max() <= 1e-5
        assert shard["window"][at : at + length].tolist() == [window] * length
        assert shard["position"][at : at + length].tolist() == list(range(length))
        at += length
    assert at == len(shard["acts"])


def test_running_out_of_memory_halves_the_batch_and_keeps_the_artifact(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = uneven(tmp_path / "calm", folder)
    artifact = harvest.run(context(calm), config(batch_size=8)).artifact
    capture = LeanModel.capture
    asked = []

    def tight(self: LeanModel, tokens: torch.Tensor, sites: list[str]) -> dict[str, torch.Tensor]:
        asked.append(len(tokens))
        if len(tokens) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return capture(self, tokens, sites)

    monkeypatch.setattr(LeanModel, "capture", tight)
    said: list[Event] = []
    project = uneven(tmp_path / "tight", folder)
    result = harvest.run(context(project, emit=said.append), config(batch_size=8))
    notices = [e.message for e in said if e.kind == "notice" and "memory" in e.message]
    assert [words.split()[-5:-3] for words in notices] == [["with", "4"], ["with", "2"]]
    assert asked[1:4] == [8, 4, 2] and max(asked[4:]) == 2  # for good, in later shards too
    assert artifact is not None and result.artifact is not None
    assert load(result.artifact).fingerprint == load(artifact).fingerprint
    for ours, theirs in zip(ShardReader(result.artifact), ShardReader(artifact), strict=True):
        for key in ours:
            assert torch.allclose(ours[key], theirs[key], rtol=1e-5, atol=1e-6), key
    monkeypatch.setattr(LeanModel, "capture", lambda *a: pytest.fail("it is up to date"))
    assert harvest.run(context(project), config(batch_size=8)).up_to_date


def test_memory_that_holds_no_window_is_an_error(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = uneven(tmp_path, folder)
    capture, calls = LeanModel.capture, []

    def never(self: LeanModel, tokens: torch.Tensor, sites: list[str]) -> dict[str, torch.Tensor]:
        calls.append(tokens)
        if len(calls) == 1:  # the self-check
            return capture(self, tokens, sites)
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(LeanModel, "capture", never)
    with pytest.raises(ResourceError, match="one window"):
        harvest.run(context(project), config())


def test_without_a_batch_size_one_is_chosen_from_the_window_alone(tmp_path: Path, folder: Path) -> None:
    assert (auto_batch(torch.device("cpu"), 256), auto_batch(torch.device("cuda", 1), 256)) == (16, 64)
    assert auto_batch(torch.device("cpu"), 10**6) == 1
    project = uneven(tmp_path, folder)
    result = harvest.run(context(project), harvest.Config(layer=1))
    assert result.summary["shards"] == 1
    assert harvest.run(context(project), harvest.Config(layer=1)).up_to_date


def test_compiling_is_asked_for_checked_and_given_up_with_a_notice(
    tmp_path: Path, folder: Path, undisturbed: Mapping[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **how: compiled.append(how) or function)
    project = tokenized(tmp_path / "auto", folder)
    harvest.run(context(project), config())
    assert compiled == [] and outputs(project) == undisturbed  # on the CPU, auto changes no byte
    project = tokenized(tmp_path / "on", folder)
    harvest.run(context(project), config(compile="on"))
    assert len(compiled) == 1
    truth = ShardReader(tmp_path / "auto" / "data" / "activations" / "tiny" / SITE)
    for ours, theirs in zip(ShardReader(project.activations / "tiny" / SITE), truth, strict=True):
        assert torch.allclose(ours["acts"], theirs["acts"], atol=1e-5)

    def broken(function: Any, **how: Any) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", broken)
    project = tokenized(tmp_path / "broken", folder)
    said: list[Event] = []
    harvest.run(context(project, emit=said.append), config(compile="on"))
    assert any("without being compiled" in e.message for e in said if e.kind == "notice")


def test_an_error_of_the_writer_ends_the_run_and_keeps_what_was_written(
    tmp_path: Path, folder: Path, undisturbed: Mapping[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tokenized(tmp_path, folder)
    write = shards.ShardWriter.write

    def full(self: Any, number: int, *rest: Any) -> Any:
        if number == 1:
            raise ResourceError("the disk is full")
        return write(self, number, *rest)

    monkeypatch.setattr(shards.ShardWriter, "write", full)
    with pytest.raises(ResourceError, match="the disk is full"):
        harvest.run(context(project), config())
    monkeypatch.setattr(shards.ShardWriter, "write", write)
    harvest.run(context(project), config())
    assert outputs(project) == undisturbed


def test_work_behind_keeps_its_order_and_its_errors() -> None:
    done: list[int] = []
    with Behind() as behind:
        for number in range(5):
            behind.put(lambda number=number: (time.sleep(0.002 * (5 - number)), done.append(number)))
    assert done == [0, 1, 2, 3, 4]
    with pytest.raises(ZeroDivisionError), Behind() as behind:
        behind.put(lambda: 1 // 0)
    with pytest.raises(KeyError, match="first"), Behind() as behind:  # what failed first is what is told
        behind.put(lambda: 1 // 0)
        raise KeyError("first")


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["off", "on"])
def test_a_gpu_gives_the_rows_and_the_statistics_of_the_cpu(compile: str, tmp_path: Path, folder: Path) -> None:
    found = []
    for device in ("cpu", "cuda"):
        project = uneven(tmp_path / device, folder)
        ctx = dataclasses.replace(context(project), device=device)
        artifact = harvest.run(ctx, config(compile=compile if device == "cuda" else "off")).artifact
        assert artifact is not None
        found.append((load_file(artifact / "stats.safetensors"), list(ShardReader(artifact))))
    (stats, rows), (stats_gpu, rows_gpu) = found
    for key, value in stats.items():
        assert torch.allclose(value, stats_gpu[key], rtol=1e-4, atol=1e-5), key
    for ours, theirs in zip(rows_gpu, rows, strict=True):
        assert torch.equal(ours["window"], theirs["window"]) and torch.equal(ours["token"], theirs["token"])
        assert (ours["acts"] - theirs["acts"]).abs().max() <= 1e-3
