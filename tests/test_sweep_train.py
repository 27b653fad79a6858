"""`train --sweep`: each SAE has the bytes that it would have alone, the rows are read once, and a kill loses nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import HOOK, dictionary, planted, project
from small_training import settings
from test_train import contents, context

from greatctl.errors import InputError, InterruptedRun, ManifestError, StageError, UsageError
from greatctl.events import Event, Run
from greatctl.extend.manager import load_plugins
from greatctl.sae.checkpoints import Checkpoints
from greatctl.sae.data import ActivationRows
from greatctl.sae.rows import Cursor
from greatctl.sae.setup import build
from greatctl.sae.topk import TopK
from greatctl.sae.trainer import Trainer
from greatctl.sae.walk import walk
from greatctl.settings import Origins
from greatctl.stages import train, train_jobs
from greatctl.stages.context import Context, Project, Result
from greatctl.store.artifact import Identity, newest, work
from greatctl.store.files import write_json
from greatctl.store.shards import ShardReader, ShardWriter

OTHER = "blocks.0.hook_resid_post"
QUICK = {"d_sae": 32, "steps": 16, "batch_size": 128, "ce_windows": 0, "checkpoint_every": 5}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with activations of two hook points, the second of which has outliers of its own."""
    root = tmp_path_factory.mktemp("sweeps")
    project(root, planted(1500, dictionary(32, 16)))
    first = root / "data" / "activations" / "toy" / HOOK
    with work(first.with_name(OTHER), Identity("harvest", {"site": OTHER})) as w:
        writer = ShardWriter(w.path)
        for number, shard in enumerate(ShardReader(first)):
            acts = shard["acts"].roll(3, dims=1)
            acts[7] *= 500
            writer.write(number, {**shard, "acts": acts}, acts.shape[0])
        writer.finish()
        facts = json.loads((first / "meta.json").read_text())
        write_json(w.path / "meta.json", {**facts, "hook_point": OTHER, "layer": 0})
        w.seal({})
    return root


def place(shared: Path, here: Path) -> Path:
    """That data with results of its own."""
    here.mkdir()
    (here / "data").symlink_to(shared / "data")
    return here


def asked(root: Path, given: dict[str, Any], heard: Run | None = None, *, force: bool = False) -> Result:
    """Run the stage as the command line does, with `given` as flags."""
    config = train.Config(**{**QUICK, **given})
    flags = {name: "flag --" + name.replace("_", "-") for name in {**QUICK, **given}}
    origins = {name: "default" for name in train.Config.model_fields} | flags
    found = Project(root, None, root / "data", root / "results")  # type: ignore[arg-type]
    with_origins = Origins(origins, config.model_dump(mode="json"))
    run = heard or Run("train")
    return train.run(Context(found, load_plugins(folder=None), run, with_origins, force=force, device="cpu"), config)


def stopping_at(step: int) -> Run:
    """A run that is asked to stop at that step."""
    run = Run("train")

    def stop(event: Event) -> None:
        if event.kind == "progress" and event.data["done"] == step:
            run.stop.request(15)

    run.emit = stop
    return run


SWEEP = {"arch": ["topk", "batchtopk"], "lr": ["1e-3"], "seed": ["0", "1"], "hook_point": [HOOK, OTHER]}


def test_each_sae_of_a_sweep_has_the_bytes_of_the_single_command(shared: Path, tmp_path: Path) -> None:
    together, alone = place(shared, tmp_path / "together"), place(shared, tmp_path / "alone")
    said: list[str] = []
    result = asked(together, {"sweep": SWEEP, "k": 3}, Run("train", lambda e: said.append(e.message)))
    assert all(
        sum(words.startswith(f"{site}: train: ") and "rows;" in words for words in said) == 1 for site in (HOOK, OTHER)
    )
    rows: list[dict] = list(result.summary["sweep"])  # type: ignore[call-overload]
    assert len(rows) == 8 and len({row["name"] for row in rows}) == 8
    for row in (rows[0], rows[7]):
        single = {"arch": row["arch"], "k": 3, "lr": row["lr"], "seed": row["seed"], "hook_point": row["hook_point"]}
        single |= {"shuffle_seed": 0} if row["seed"] else {}
        made = asked(alone, {**single, "name": row["name"]})
        assert made.artifact is not None
        one, other = contents(made.artifact), contents(together / "results" / "saes" / row["name"])
        assert one.keys() == other.keys()
        assert [name for name in one if one[name] != other[name]] == []
        assert row["explained_variance"] == made.summary["explained_variance"] and row["state"] == "trained"
    assert result.artifact is not None and result.artifact.name == rows[0]["name"]
    found = newest(together / "results" / "saes", "train")
    assert found is not None and found.path == result.artifact and 0 <= float(result.summary["waited_for_rows"]) <= 1  # type: ignore[arg-type]


def test_a_shard_is_read_once_an_epoch_however_many_learn_from_it(shared: Path, tmp_path: Path) -> None:
    reader = ShardReader(shared / "data" / "activations" / "toy" / HOOK)
    rows = ActivationRows(reader, [0, 1], torch.zeros(100, dtype=torch.bool), budget=20_000)
    asked_for: list[Any] = []
    stream = rows.stream
    rows.stream = lambda *more: (asked_for.append(more), stream(*more))[1]  # type: ignore[method-assign]
    trainers = [
        Trainer(
            build(TopK, TopK.Config(**{"d_in": 16, "d_sae": 32, "k": k}), 0),
            rows,
            settings(steps=8),
            Checkpoints(tmp_path / str(k)),
            Run("train"),
        )
        for k in (2, 3, 4)
    ]
    walked = walk(trainers)
    assert asked_for == [(0, 256, Cursor())] and all(t.step == 8 for t in trainers)
    assert len(walked.steps) == 3 and min(walked.steps) > 0 and walked.waited < walked.seconds


def test_a_stopped_sweep_goes_on_at_the_common_step_with_the_same_bytes(shared: Path, tmp_path: Path) -> None:
    straight, stopped = place(shared, tmp_path / "straight"), place(shared, tmp_path / "stopped")
    given = {"sweep": {"k": ["2", "3"]}, "hook_point": HOOK}
    asked(straight, given)
    with pytest.raises(InterruptedRun):
        asked(stopped, given, stopping_at(12))
    saes = stopped / "results" / "saes"
    ahead = saes / ".batchtopk-32-k3-blocks.1.hook_resid_post.partial" / "checkpoints"
    assert {p.name for p in ahead.glob("step-*")} == {"step-000000010.safetensors", "step-000000012.safetensors"}
    (ahead / "step-000000012.safetensors").unlink()  # as if killed between two files of the set
    said: list[str] = []
    again = asked(stopped, given, Run("train", lambda e: said.append(e.message)))
    assert "train: resumed at step 10 of 16" in said
    for row in again.summary["sweep"]:  # type: ignore[attr-defined]
        assert contents(saes / row["name"]) == contents(straight / "results" / "saes" / row["name"])
    more = asked(stopped, {**given, "sweep": {"k": ["2", "3", "4"]}})
    assert [row["state"] for row in more.summary["sweep"]] == ["up to date"] * 2 + ["trained"]  # type: ignore[attr-defined]
    assert asked(stopped, given).up_to_date


def test_one_that_diverges_is_left_out_and_the_others_go_on(shared: Path, tmp_path: Path, monkeypatch: Any) -> None:
    root = place(shared, tmp_path / "p")
    losses = TopK.losses

    def poisoned(self: TopK, x: torch.Tensor, *, step: int, **more: Any) -> dict[str, torch.Tensor]:
        terms = dict(losses(self, x, step=step, **more))
        return {**terms, "mse": terms["mse"] * float("nan")} if self.config.k == 3 and step == 7 else terms

    monkeypatch.setattr(TopK, "losses", poisoned)
    monkeypatch.setattr("greatctl.sae.trainer.choose", lambda coder, lr, run, device: _plain(coder, lr, run))
    given = {"arch": "topk", "sweep": {"k": ["2", "3"]}}
    with pytest.raises(InterruptedRun):
        asked(root, given, stopping_at(13))
    said: list[str] = []
    result = asked(root, given, Run("train", lambda e: said.append(e.message)))
    assert "train: resumed at step 13 of 16" in said  # the one that diverged holds nobody back
    rows: list[dict] = list(result.summary["sweep"])  # type: ignore[call-overload]
    assert result.exit_code == 11 and [row["state"] for row in rows] == ["trained", "diverged"]
    assert "step 7" in rows[1]["why"] and rows[1]["l0"] is None
    again = asked(root, given)
    assert again.exit_code == 11 and [row["state"] for row in again.summary["sweep"]] == ["up to date", "diverged"]  # type: ignore[attr-defined]
    with pytest.raises(StageError, match="diverged at step 7"):
        asked(root, {"arch": "topk", "sweep": {"k": ["3"]}})


def test_weights_that_are_not_finite_at_the_end_stop_one_sae_and_not_the_others(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(self: TopK, rows: torch.Tensor) -> None:
        if self.config.k == 3:
            with torch.no_grad():
                self.b_enc.fill_(float("inf"))

    monkeypatch.setattr(TopK, "calibrate", spoilt)
    root = place(shared, tmp_path / "p")
    result = asked(root, {"arch": "topk", "sweep": {"k": ["2", "3"]}})
    rows: list[dict] = list(result.summary["sweep"])  # type: ignore[call-overload]
    assert result.exit_code == 11 and [row["state"] for row in rows] == ["trained", "diverged"]
    assert "not finite" in rows[1]["why"]
    with pytest.raises(StageError, match="weights that are not finite"):
        asked(root, {"arch": "topk", "k": 3, "name": "alone"})
    assert not (root / "results" / "saes" / "alone").exists()


def _plain(coder: Any, lr: float, run: Run) -> Any:
    from greatctl.sae.step import PlainStep

    return PlainStep(coder, lr, run)


def test_what_cannot_be_swept_is_refused_before_anything_is_made(shared: Path, tmp_path: Path) -> None:
    root = place(shared, tmp_path / "p")
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"sweep": {"batch_size": ["64", "128"]}}, UsageError, "cannot vary batch_size"),
        ({"sweep": {"k": ["3", "3"]}}, UsageError, "are one SAE"),
        ({"sweep": {"k": ["3", "4"]}, "k": 2}, UsageError, "--k and --sweep k exclude"),
        ({"sweep": {"lr": ["quick"]}}, UsageError, "lr=quick is not possible"),
        ({"sweep": {"k": ["33"]}}, ManifestError, "above d_sae"),
        ({"arch": "jumprelu", "sweep": {"bandwidth": ["1"]}, "option": {"bandwidth": 2}}, UsageError, "exclude"),
        ({"sweep": {"aux": ["1"]}}, UsageError, "cannot vary aux"),
        ({"sweep": {"arch": ["topk", "relu"], "aux_coefficient": ["0", "1"]}}, UsageError, "relu has no"),
        ({"sweep": {"k": ["3", "4"]}, "export": "pth"}, UsageError, "--export does not go with"),
        ({"sweep": ["k"]}, ValueError, "KEY=A,B"),
    ]
    for given, error, words in cases:
        with pytest.raises(error, match=words):
            asked(root, given)
    blamed = [
        ({"sweep": {"k": ["3", "33"]}}, "--sweep k", "--sweep k, --d-sae"),
        ({"sweep": {"bandwidth": ["0"]}, "arch": "jumprelu"}, "--sweep bandwidth", "change --sweep bandwidth"),
        ({"sweep": {"expansion": ["2", "4"]}}, "same thing", "give one of them"),
    ]
    for given, why, fix in blamed:
        with pytest.raises((ManifestError, UsageError)) as caught:
            asked(root, given)
        assert why in caught.value.why and fix in caught.value.fix and "flag" not in caught.value.why
    assert not (root / "results").exists()
    found = train.Config(sweep=["prefixes=[1,2],[3]", "k=1, 2"]).sweep  # type: ignore[arg-type]
    assert found == {"prefixes": ["[1,2]", "[3]"], "k": ["1", "2"]}


def test_hook_points_of_different_tokens_are_refused(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = train_jobs.stored

    def strange(ctx: Context, hook_point: str | None, target: str | None) -> Any:
        found = stored(ctx, hook_point, target)
        return replace(found, meta={**found.meta, "tokens": hook_point})

    monkeypatch.setattr(train_jobs, "stored", strange)
    with pytest.raises(InputError, match="cannot be walked through together"):
        asked(place(shared, tmp_path / "p"), {"sweep": {"hook_point": [HOOK, OTHER]}})


def test_a_plan_lists_the_saes_and_their_memory_together(shared: Path, tmp_path: Path) -> None:
    ctx, _ = context(place(shared, tmp_path / "p"))
    plan = train.plan(ctx, train.Config(**{**QUICK, "sweep": {"k": ["2", "3"], "d_sae": ["32", "64"]}, "d_sae": None}))  # type: ignore[arg-type]
    rows: list[dict] = list(plan.facts["sweep"])  # type: ignore[call-overload]
    assert [(row["k"], row["d_sae"]) for row in rows] == [(2, 32), (2, 64), (3, 32), (3, 64)]
    assert plan.facts["training_bytes"] == 2 * 16 * (32 * 33 + 16 + 64 * 33 + 16) and plan.final is None
