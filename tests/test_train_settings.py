"""Stage `train`: options of any architecture, pairs of hook points, and inputs that do not fit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from planted import HOOK, dictionary, planted, project
from safetensors.torch import load_file
from test_train import QUICK, context, run

from greatctl.errors import InputError, ManifestError, UsageError
from greatctl.events import Event, Run
from greatctl.manifest import load as load_manifest
from greatctl.sae.folder import load as load_sae
from greatctl.sae.relu import Relu
from greatctl.settings import resolve
from greatctl.stages import train
from greatctl.stages.curves import tensorboard
from greatctl.store.artifact import Identity, work
from greatctl.store.files import write_json, write_text
from greatctl.store.shards import ShardReader, ShardWriter

TARGET = "blocks.1.hook_mlp_out"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project with activations of one site."""
    project(tmp_path, planted(1500, dictionary(32, 16)))
    return tmp_path


def paired(root: Path, *, width: int = 12, **meta: Any) -> None:
    """Activations of a second site: a fixed linear map of the first."""
    first = root / "data" / "activations" / "toy" / HOOK
    mixing = torch.randn(16, width, generator=torch.Generator().manual_seed(3))
    with work(first.with_name(TARGET), Identity("harvest", {"target": width, **meta})) as w:
        writer = ShardWriter(w.path)
        for number, shard in enumerate(ShardReader(first)):
            writer.write(number, {**shard, "acts": shard["acts"] @ mixing}, shard["acts"].shape[0])
        writer.finish()
        facts = json.loads((first / "meta.json").read_text())
        write_json(w.path / "meta.json", {**facts, "hook_point": TARGET, "d_model": width, **meta})
        w.seal({})


def options(root: Path, arch: str, **option: Any) -> dict[str, object]:
    """The plan's config with `--option`."""
    ctx, _ = context(root)
    planned = train.plan(ctx, train.Config(**{**QUICK, "arch": arch, "k": None, "option": option}))
    assert planned.identity is not None
    return dict(planned.identity.config)


def test_an_option_sets_any_field_of_the_architecture_and_takes_its_type(root: Path) -> None:
    found = options(root, "matryoshka", aux_coefficient="0.25", widths=[8, 32], k="5")
    assert (found["aux_coefficient"], found["widths"], found["k"]) == (0.25, [8, 32], 5)
    assert options(root, "relu", decoder_norm_weighted="false")["decoder_norm_weighted"] is False


def test_an_option_that_cannot_be_names_the_nearest_one(root: Path) -> None:
    cases = [
        ({"aux_coeficient": "1"}, UsageError, "has no setting 'aux_coeficient'", "aux_coefficient"),
        ({"aux_coefficient": "much"}, UsageError, "valid number", "aux_coefficient"),
        ({"aux_coefficient": "-1"}, ManifestError, "greater than or equal to 0", "aux_coefficient"),
        ({"d_in": "4"}, UsageError, "cannot set d_in", "leave the option out"),
        ({"d_sae": "4"}, UsageError, "cannot set d_sae", "leave the option out"),
    ]
    for option, error, words, fix in cases:
        with pytest.raises(error) as caught:
            options(root, "topk", **option)
        assert words in caught.value.message and fix in caught.value.fix
    with pytest.raises(UsageError, match="--k and --option k exclude each other"):
        run(root, option={"k": "2"})


def test_options_come_from_words_the_environment_and_a_table(tmp_path: Path) -> None:
    write_text(tmp_path / "sources.toml", "[train]\noption = { aux_coefficient = 0.5, widths = [1, 2] }\n")
    manifest = load_manifest(tmp_path / "sources.toml")

    def resolved(environ: dict[str, str], **flags: object) -> dict:
        return resolve(train.Config, "train", flags=flags, manifest=manifest, environ=environ).config.option

    assert resolved({}) == {"aux_coefficient": 0.5, "widths": [1, 2]}
    assert resolved({"GREATCTL_TRAIN_OPTION": "a-b=1, c=x"}) == {"a_b": "1", "c": "x"}
    assert resolved({}, option=["a=1", "b=[1, 2]", "c=d=e"]) == {"a": "1", "b": [1, 2], "c": "d=e"}
    with pytest.raises(UsageError, match="KEY=VALUE"):
        try:
            resolved({}, option=["nothing"])
        except UsageError as error:
            raise UsageError(error.why) from None


@pytest.mark.parametrize("arch", ["transcoder", "skip-transcoder"])
def test_a_transcoder_learns_the_map_between_two_sites(root: Path, arch: str) -> None:
    paired(root)
    more = {"hook_point": HOOK, "target_hook_point": TARGET, "steps": 120, "lr": 3e-3, "k": 4, "d_sae": 48}
    result, _ = run(root, arch=arch, **more)
    assert result.summary["explained_variance"] > 0.4
    made = json.loads((result.artifact / "training.json").read_text())
    assert made["target_hook_point"] == TARGET and made["config"]["d_out"] == 12
    assert made["target_scale"] != pytest.approx(made["scale"], rel=0.05)
    sae = load_sae(result.artifact)
    assert (sae.d_in, sae.d_out, sae.target_hook_point) == (16, 12, TARGET)
    shard, target = (
        load_file(root / "data" / "activations" / "toy" / site / "shard-00000.safetensors") for site in (HOOK, TARGET)
    )
    x, y = shard["acts"][shard["token"] > 1], target["acts"][shard["token"] > 1]
    assert (y - sae.reconstruct(x)).square().sum() < 0.7 * (y - y.mean(dim=0)).square().sum()


def test_a_target_is_asked_for_and_refused_where_it_does_not_belong(root: Path) -> None:
    with pytest.raises(UsageError, match="transcoder needs --target-hook-point"):
        run(root, arch="transcoder")
    with pytest.raises(UsageError, match="topk has no --target-hook-point"):
        run(root, target_hook_point=TARGET)
    with pytest.raises(InputError) as caught:
        run(root, arch="transcoder", target_hook_point=TARGET)
    assert caught.value.exit_code == 5
    assert f"greatctl harvest --hook-point {HOOK} --hook-point {TARGET}" in caught.value.fix


@pytest.mark.parametrize("apart", [{"tokens": "0" * 64}, {"model_revision": "r2"}, {"rows": 7}])
def test_fault_48_a_pair_of_other_tokens_or_another_model_is_exit_5(root: Path, apart: dict) -> None:
    paired(root, **apart)
    with pytest.raises(InputError, match="are no pair") as caught:
        run(root, arch="transcoder", hook_point=HOOK, target_hook_point=TARGET)
    assert caught.value.exit_code == 5 and "greatctl harvest" in caught.value.fix


@pytest.mark.parametrize("said", [{"d_model": 13}, {"dtype": "bfloat16"}])
def test_fault_48_shards_that_are_not_what_meta_json_says_are_exit_5_before_training(root: Path, said: dict) -> None:
    paired(root, **said)
    with pytest.raises(InputError, match="not what they are said to be") as caught:
        run(root, hook_point=TARGET, d_sae=48)
    assert caught.value.exit_code == 5 and not list((root / "results").rglob("step-*"))


def test_fault_48_another_hook_point_is_exit_5(root: Path) -> None:
    with pytest.raises(InputError, match=r"no activations of blocks\.7") as caught:
        run(root, hook_point="blocks.7.hook_resid_post")
    assert caught.value.exit_code == 5 and "greatctl harvest --hook-point blocks.7" in caught.value.fix


def test_fault_56_activations_without_variance_are_measured_as_undefined(tmp_path: Path) -> None:
    project(tmp_path, torch.ones(600, 16))
    result, _ = run(tmp_path, steps=5)
    assert result.summary["explained_variance"] is None
    json.dumps(result.summary, allow_nan=False)


def test_fault_57_all_latents_dead_is_a_warning_with_a_remedy_and_finite_numbers(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Relu.start

    def start(self: Relu, *means: Any) -> None:
        begin(self, *means)
        with torch.no_grad():
            self.b_enc -= 1e6

    monkeypatch.setattr(Relu, "start", start)
    result, notices = run(root, arch="relu", k=None, l1_coefficient=1.0)
    assert result.summary["dead_fraction"] == 1 and result.summary["l0"] == 0
    assert any("all latents are dead" in n and "--l1-coefficient" in n for n in notices)
    json.dumps(result.summary, allow_nan=False)


def test_an_observer_and_the_file_see_the_same_curve(root: Path) -> None:
    ctx, events = context(root)
    result = train.run(ctx, train.Config(**QUICK))
    seen = [dict(event.data) for event in events if event.kind == "metric"]
    lines = [json.loads(line) for line in (result.artifact / "metrics.jsonl").read_text().splitlines()]
    assert seen == lines and len(lines) == 30


def test_tensorboard_that_is_not_installed_is_said_with_the_remedy(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match="needs the package tensorboard") as caught:
        run(root, tensorboard=True)
    assert "pip install" in caught.value.fix and not list((root / "results").rglob("cfg.json"))


def test_tensorboard_files_lie_beside_the_artifacts(root: Path) -> None:
    pytest.importorskip("tensorboard")
    result, _ = run(root, tensorboard=True)
    logs = root / "results" / "logs" / "tensorboard" / result.artifact.name
    assert list(logs.glob("events.out.tfevents.*")) and not list(result.artifact.rglob("events*"))
    assert run(root)[0].up_to_date  # no part of the fingerprint


def test_tensorboard_gets_every_number_of_a_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Writer:
        made: ClassVar[list[Writer]] = []

        def __init__(self, log_dir: str, purge_step: int) -> None:
            self.log_dir, self.purge_step, self.scalars, self.closed = log_dir, purge_step, [], False
            Writer.made.append(self)

        def add_scalar(self, *scalar: object) -> None:
            self.scalars.append(scalar)

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr("greatctl.stages.curves._writer_class", lambda: Writer)
    heard: list[Event] = []
    with tensorboard(Run("train", heard.append), tmp_path / "logs") as run:
        run.metric(7, loss=0.5, l0=3.0)
        run.notice("a word")
    (writer,) = Writer.made
    assert (writer.purge_step, writer.scalars, writer.closed) == (7, [("loss", 0.5, 7), ("l0", 3.0, 7)], True)
    assert [event.kind for event in heard] == ["metric", "notice"]
