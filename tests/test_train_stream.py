"""`train --stream`: the rows are those of a harvest, nothing is stored, and a stopped run ends with the same bytes."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import TEXT, context, make_project, save_tiny

from greatctl.corpus.windows import TokenStore
from greatctl.errors import InterruptedRun, ManifestError, UsageError
from greatctl.events import Event, Run
from greatctl.extend.manager import load_plugins
from greatctl.sae.rows import Cursor
from greatctl.stages import harvest, sae_harvest, sae_rows, tokenize, train
from greatctl.stages.context import Context, Project, Result

SITE = "blocks.1.hook_resid_post"
QUICK = {"arch": "topk", "d_sae": 64, "k": 4, "steps": 40, "batch_size": 64, "ce_windows": 0, "stream": True}
BUFFER = {"buffer_rows": 200}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Two tokenized texts and a tiny model."""
    root = tmp_path_factory.mktemp("streamed")
    save_tiny(root / "tiny")
    found = make_project(root, {"darwin-a": TEXT * 8, "wood-b": TEXT[::-1] * 6})
    tokenize.run(context(found), tokenize.Config(model=str(root / "tiny"), window=16))
    return found


def opened(project: Project, results: Path, run: Run | None = None) -> Context:
    """A context over the project's data with results of its own."""
    here = replace(project, results=results)
    return replace(context(here, "train"), plugins=load_plugins(folder=None), run=run or Run("train"))


def run(project: Project, results: Path, heard: Run | None = None, **changes: Any) -> Result:
    return train.run(opened(project, results, heard), train.Config(**{**QUICK, **changes}))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != "run.json"}


def test_streamed_rows_are_those_of_a_harvest_and_nothing_is_stored(project: Project, tmp_path: Path) -> None:
    ctx = opened(project, tmp_path)
    inputs = sae_rows.streamed(ctx, None, SITE, "blocks.1.hook_mlp_out", None)
    assert not project.activations.exists()
    store = TokenStore(inputs.tokens.path)
    aside = sae_rows.held_out(ctx, store)
    rows = sae_rows.open_rows(ctx, [inputs], store, aside)[0]
    assert not project.activations.exists()
    data = replace(project, data=tmp_path / "data")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tokens").symlink_to(project.tokens)
    harvest.run(context(data), harvest.Config(hook_point=[SITE, "blocks.1.hook_mlp_out"]))
    other = replace(ctx, project=replace(data, results=tmp_path))
    kept = sae_rows.open_rows(other, [sae_rows.stored(other, SITE, "blocks.1.hook_mlp_out")], store, aside)[0]
    assert rows.counts == kept.counts and rows.mean_norm == pytest.approx(kept.mean_norm, rel=1e-6)
    assert torch.allclose(rows.held_out(), kept.held_out(), atol=1e-5)
    assert torch.equal(rows.held_out_windows(), kept.held_out_windows())
    every = [torch.cat([x, y], dim=1) for _, x, y in (next(r.stream(0, 10**6, Cursor())) for r in (rows, kept))]  # type: ignore[list-item]
    first, second = (one[one[:, 0].argsort()] for one in every)
    assert torch.allclose(first, second, atol=1e-4)


def test_fault_53_a_stopped_stream_ends_with_the_bytes_of_a_straight_one(project: Project, tmp_path: Path) -> None:
    said: list[Event] = []
    result = run(project, tmp_path / "straight", Run("train", said.append), **BUFFER)
    assert result.artifact is not None and result.summary["steps"] == 40
    assert any("a perfect shuffle would give" in event.message for event in said)
    assert not project.activations.exists()
    stopping = Run("train")

    def stop(event: Event) -> None:
        if event.kind == "progress" and event.message == "train" and event.data["done"] == 17:
            stopping.stop.request(signal.SIGTERM)

    stopping.emit = stop
    with pytest.raises(InterruptedRun):
        run(project, tmp_path / "stopped", stopping, **BUFFER)
    again = run(project, tmp_path / "stopped", resume=True, **BUFFER)
    assert again.artifact is not None
    assert contents(result.artifact) == contents(again.artifact)
    assert run(project, tmp_path / "stopped", **BUFFER).up_to_date


def test_a_sweep_over_hook_points_reads_the_model_once_and_each_sae_is_that_of_a_run_alone(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[tuple[int, tuple[str, ...]]] = []
    read = sae_harvest.read

    def counted(frozen: Any, ids: Any, length: Any, span: range, sites: list[str], **more: Any) -> Any:
        reads.append((len(span), tuple(sites)))
        return read(frozen, ids, length, span, sites, **more)

    monkeypatch.setattr(sae_harvest, "read", counted)
    sites = [SITE, "blocks.0.hook_resid_post"]
    swept = {"hook_point": sites, "k": ["4", "5"]}
    together = run(project, tmp_path / "together", k=None, sweep=swept, **BUFFER)
    both, reads[:] = list(reads), []
    for row in list(together.summary["sweep"])[1:3]:  # type: ignore[call-overload]
        site, k = row["hook_point"], row["k"]
        alone = run(project, tmp_path / "alone", hook_point=site, k=k, name=row["name"], **BUFFER)
        assert alone.artifact is not None
        one, other = contents(alone.artifact), contents(tmp_path / "together" / "saes" / row["name"])
        assert [name for name in one if one[name] != other[name] and name != "artifact.json"] == []
    assert [n for n, _ in both] * 2 == [n for n, _ in reads] and {names for _, names in both} == {tuple(sites)}


def test_a_stopped_sweep_over_streamed_hook_points_ends_with_the_same_bytes(project: Project, tmp_path: Path) -> None:
    given: dict[str, Any] = {"sweep": {"hook_point": [SITE, "blocks.0.hook_resid_post"]}, "steps": 24, **BUFFER}
    heard = Run("train")

    def stop(event: Event) -> None:
        if event.kind == "progress" and event.message == "train" and event.data["done"] == 15:
            heard.stop.request(signal.SIGINT)

    heard.emit = stop
    with pytest.raises(InterruptedRun):
        run(project, tmp_path / "stopped", heard, **given)
    run(project, tmp_path / "stopped", **given)
    straight = run(project, tmp_path / "straight", **given)
    for row in list(straight.summary["sweep"]):  # type: ignore[call-overload]
        one, other = (contents(tmp_path / place / "saes" / row["name"]) for place in ("stopped", "straight"))
        assert one == other


def test_settings_of_streaming_are_refused_without_it(project: Project, tmp_path: Path) -> None:
    for name, value in (("buffer_rows", 100), ("model", "bundled")):
        ctx = replace(opened(project, tmp_path), origins={name: f"flag --{name}"})
        with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} needs --stream"):
            train.plan(ctx, train.Config(**{**QUICK, "stream": False, name: value}))


def test_what_cannot_be_streamed_is_refused_before_a_model_is_opened(project: Project, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be streamed"):
        run(project, tmp_path, hook_point="blocks.1.attn.hook_z")
    with pytest.raises(ManifestError, match="out of range"):
        run(project, tmp_path, hook_point="blocks.9.hook_resid_post")
