"""Stage `train`: names, refusals, resume after a kill, and what ends up in the folder."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from planted import HOOK, dictionary, planted, project
from safetensors.torch import load_file

from greatctl.errors import (
    InputError,
    IntegrityError,
    InterruptedRun,
    ManifestError,
    ResourceError,
    StageError,
    UsageError,
)
from greatctl.events import Run
from greatctl.extend.manager import load_plugins
from greatctl.sae.folder import load as load_sae
from greatctl.stages import controls, models, splice, train
from greatctl.stages.context import Context, Project
from greatctl.store import artifact
from greatctl.store.files import write_bytes
from greatctl.store.tables import read_columns

ROOT = Path(__file__).resolve().parents[1]
QUICK = {"arch": "topk", "d_sae": 32, "k": 3, "steps": 30, "batch_size": 128, "ce_windows": 0}


def context(root: Path, *, origins: Mapping[str, str] | None = None, force: bool = False) -> tuple[Context, list]:
    """A context over `root`, and the list that its events go to."""
    events: list = []
    place = Project(root, None, root / "data", root / "results")  # type: ignore[arg-type]
    run = Run("train", events.append)
    return Context(place, load_plugins(folder=None), run, origins=origins or {}, force=force, device="cpu"), events


def run(root: Path, *, force: bool = False, origins: Mapping[str, str] | None = None, **changes):
    """Run the stage in this process."""
    ctx, events = context(root, origins=origins, force=force)
    return train.run(ctx, train.Config(**{**QUICK, **changes})), [e.message for e in events if e.kind == "notice"]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with activations; tests that change its data copy it."""
    root = tmp_path_factory.mktemp("train")
    project(root, planted(3000, dictionary(32, 16)))
    return root


@pytest.fixture
def root(shared: Path, tmp_path: Path) -> Path:
    """That project's data with a results folder of the test's own."""
    (tmp_path / "data").symlink_to(shared / "data")
    return tmp_path


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A project whose data the test may change."""
    project(tmp_path, planted(1000, dictionary(32, 16)))
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a sealed folder but run.json, which alone may differ."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "run.json")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def test_the_folder_holds_the_sae_its_curve_and_how_it_was_made(root: Path) -> None:
    result, notices = run(root, epochs=None, steps=200, lr=2e-3)
    folder = root / "results" / "saes" / "topk-32-k3-blocks.1.hook_resid_post"
    assert result.artifact == folder
    names = {
        "cfg.json",
        "sae_weights.safetensors",
        "metrics.parquet",
        "metrics.jsonl",
        "evaluation.json",
        "training.json",
    }
    names |= {f"evaluation_{grouping}.parquet" for grouping in ("split", "character", "work")}
    assert set(contents(folder)) == {*names, "artifact.json"}
    summary = result.summary
    assert (summary["name"], summary["arch"], summary["d_sae"], summary["steps"]) == (
        folder.name,
        "topk",
        32,
        200,
    )
    assert summary["explained_variance"] > 0.5 and 2 < summary["l0"] <= 3
    assert 0 <= summary["dead_fraction"] <= 1 and summary["ce_loss_recovered"] is None
    curve = read_columns(folder / "metrics.parquet")
    assert curve["step"] == list(range(200))
    assert {"mse", "auxk", "loss", "explained_variance", "l0", "dead_fraction", "lr"} < set(curve)
    made = json.loads((folder / "training.json").read_text())
    assert (made["hook_point"], made["model"], made["model_revision"], made["layer"]) == (
        HOOK,
        "toy",
        "r1",
        1,
    )
    assert made["rows"]["special"] == 189 and made["rows"]["held_out"] == 1000 and made["rows"]["train"] == 2000
    assert made["epochs"] == pytest.approx(200 * 125 / 2000)
    assert load_sae(folder).hook_point == HOOK
    assert any("each row is read 12.5 times" in n for n in notices)
    odd, _ = run(root, name="odd", steps=None, tokens=9000, batch_size=900)  # two batches of 1000 rows a pass
    assert odd.summary["tokens"] == 9000


def test_batchtopk_is_the_default_and_its_threshold_gives_l0_equal_k(root: Path) -> None:
    result, _ = run(root, arch="batchtopk", k=4, steps=60)
    assert result.summary["l0"] == pytest.approx(4, rel=0.02)
    made = json.loads((result.artifact / "training.json").read_text())
    threshold = load_file(result.artifact / "sae_weights.safetensors")["threshold"]
    assert made["threshold"] == pytest.approx(float(threshold[0]), rel=1e-5)
    assert train.Config().arch == "batchtopk"


def test_the_same_again_is_up_to_date_and_another_configuration_needs_force(root: Path) -> None:
    first, _ = run(root)
    again, notices = run(root)
    assert again.up_to_date and again.summary == first.summary and notices == ["train: up to date"]
    with pytest.raises(InputError) as caught:
        run(root, lr=5e-4)
    assert caught.value.exit_code == 5 and "config.lr None -> 0.0005" in caught.value.why
    forced, _ = run(root, lr=5e-4, force=True)
    assert not forced.up_to_date
    other, _ = run(root, name="other", lr=1e-4)
    assert other.artifact.name == "other"


def reharvested(root: Path, **identity) -> None:
    """The activations sealed anew with the same bytes, as another harvest of the same tokens would."""
    folder = root / "data" / "activations" / "toy" / HOOK
    files = contents(folder)
    with artifact.work(folder, artifact.Identity("harvest", {"again": True}), fresh=True) as w:
        for name, data in files.items():
            if name != "artifact.json":
                write_bytes(w.path / name, data)
        meta = {**json.loads(files["meta.json"]), **identity}
        write_bytes(w.path / "meta.json", json.dumps(meta).encode())
        w.seal({})


def test_activations_harvested_again_make_the_sae_stale_and_it_is_trained_again(own: Path) -> None:
    run(own)
    reharvested(own)
    result, notices = run(own)
    assert not result.up_to_date and "train: inputs.activations changed" in notices[0]


def test_other_texts_make_the_sae_stale_and_another_model_under_its_name_needs_force(own: Path) -> None:
    run(own)
    project(own, planted(1200, dictionary(32, 16)))
    assert not run(own)[0].up_to_date and run(own)[0].up_to_date
    reharvested(own, model_revision="r2")
    with pytest.raises(InputError) as caught:
        run(own)
    assert (caught.value.exit_code, caught.value.why) == (5, "model_revision r1 -> r2")
    assert not run(own, force=True)[0].up_to_date and run(own)[0].up_to_date


def test_settings_that_cannot_be_are_refused_before_anything_is_loaded(root: Path) -> None:
    cases = [
        ({"k": 33}, ManifestError, "k = 33 is above d_sae = 32"),
        ({"epochs": 2}, UsageError, "--steps and --epochs exclude each other"),
        ({"expansion": 2}, UsageError, "--d-sae and --expansion exclude each other"),
        ({"hook_point": "blocks.9.hook_resid_post"}, InputError, "no activations of blocks.9"),
        ({"arch": "topkk"}, UsageError, "'topkk'"),
    ]
    for changes, error, words in cases:
        ctx, _ = context(root)
        with pytest.raises(error, match=words):
            train.plan(ctx, train.Config(**{**QUICK, **changes}))
    with pytest.raises(UsageError, match="relu has no --aux-coefficient"):
        run(root, arch="relu", aux_coefficient=0.1, origins={"aux_coefficient": "flag --aux-coefficient"})
    with pytest.raises(ValueError, match="name"):
        train.Config(name="../elsewhere")
    assert not (root / "results").exists()


def test_a_flag_beats_the_length_that_the_manifest_gives(root: Path) -> None:
    origins = {"steps": "flag --steps", "epochs": "sources.toml [train]"}
    ctx, _ = context(root, origins=origins)
    assert train.plan(ctx, train.Config(**{**QUICK, "epochs": 7})).facts["steps"] == 30


def test_a_plan_says_what_it_would_make_and_makes_nothing(root: Path) -> None:
    ctx, _ = context(root)
    facts = train.plan(ctx, train.Config(arch="relu")).facts
    assert (facts["d_sae"], facts["epochs"], facts["d_in"]) == (128, 4, 16)
    assert not (root / "results").exists()


def test_missing_stale_and_damaged_inputs_have_their_own_exit_codes(own: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no activations yet"):
        run(tmp_path / "empty")
    shard = own / "data" / "activations" / "toy" / HOOK / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(IntegrityError, match="shard-00000"):
        run(own)
    project(own, planted(1000, dictionary(32, 16)))
    tokens = own / "data" / "tokens" / "toy-17"
    tokens.rename(tokens.with_name("gone"))
    with pytest.raises(InputError, match="out of date"):
        run(own)


def test_activations_that_are_not_finite_are_refused_and_nothing_is_sealed(tmp_path: Path) -> None:
    acts = planted(1000, dictionary(32, 16))
    acts[500] = float("inf")
    project(tmp_path, acts)
    with pytest.raises(StageError, match="not finite"):
        run(tmp_path)
    assert artifact.sealed_under(tmp_path / "results") == []


def test_tiny_data_trains_and_an_unsplit_manifest_holds_out_the_last_windows(tmp_path: Path) -> None:
    project(tmp_path, planted(60, dictionary(32, 16)), splits=("train",))
    result, notices = run(tmp_path, steps=3, batch_size=None)
    assert result.summary["explained_variance"] is not None
    assert any("last 1 of 4 windows are held out" in n for n in notices)
    assert any("a batch has 256 rows instead of 4096" in n for n in notices)


def test_a_stop_request_checkpoints_and_the_rerun_resumes(root: Path) -> None:
    ctx, _ = context(root)
    ctx.run.stop.request(signal.SIGINT)
    with pytest.raises(InterruptedRun):
        train.run(ctx, train.Config(**QUICK))
    with pytest.raises(InputError, match="was begun with another configuration"):
        run(root, lr=5e-4)
    result, notices = run(root, resume=True)
    assert any("resumed at step 1 of 30" in n for n in notices)
    assert result.summary["steps"] == 30


def test_a_stopped_forced_run_goes_on_without_force(root: Path) -> None:
    run(root)
    ctx, _ = context(root, force=True)
    ctx.run.stop.request(signal.SIGTERM)
    with pytest.raises(InterruptedRun):
        train.run(ctx, train.Config(**{**QUICK, "lr": 5e-4}))
    assert run(root)[0].up_to_date
    result, notices = run(root, lr=5e-4)
    assert any("resumed at step 1" in n for n in notices) and not result.up_to_date


def test_export_on_a_finished_sae_only_exports(root: Path) -> None:
    first, _ = run(root)
    result, notices = run(root, export="pth", lr=0.5)
    assert notices == [f"train: exported {result.summary['export']}"]
    assert Path(result.summary["export"]).is_file() and result.summary["explained_variance"] is not None
    assert artifact.load(first.artifact).check()
    assert run(root)[0].up_to_date


def test_an_export_under_a_name_that_nobody_trained_is_exit_5_and_trains_nothing(root: Path) -> None:
    run(root, name="mine", steps=3)
    flags = {"name": "flag --name", "export": "flag --export"}
    with pytest.raises(InputError, match="no SAE named 'mien'") as caught:
        run(root, name="mien", export="pth", origins=flags)
    assert caught.value.exit_code == 5 and "mine" in caught.value.fix and "mine" in caught.value.why
    with pytest.raises(InputError, match="no SAE named 'mien'"):
        train.plan(context(root, origins=flags)[0], train.Config(**{**QUICK, "name": "mien", "export": "pth"}))
    assert not (root / "results" / "saes" / "mien").exists()
    assert run(root, name="new", steps=3, export="pth", origins={**flags, "steps": "flag --steps"})[0].artifact


def test_a_batch_larger_than_the_data_is_cut_to_it_and_the_plan_says_so(root: Path) -> None:
    ctx, _ = context(root)
    assert train.plan(ctx, train.Config(**{**QUICK, "batch_size": 10**6})).facts["batch_size"] == 3189
    _, notices = run(root, batch_size=10**6, steps=3, name="whole")
    assert any("a batch has 2000 rows instead of 1000000: there are no more" in n for n in notices)


def test_a_device_without_float64_is_refused_and_nothing_is_sealed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "pick_device", lambda wanted: "mps")
    with pytest.raises(ResourceError, match="cannot be trained on mps"):
        run(root, name="apple")
    assert not (root / "results" / "saes" / "apple").exists()


@pytest.mark.parametrize("arch", ["topk", "relu", "gated", "jumprelu"])
def test_no_architecture_is_asked_for_more_latents_than_it_has(root: Path, arch: str) -> None:
    with pytest.raises(ManifestError, match="k = 33 is above d_sae = 32") as caught:
        run(root, arch=arch, k=33)
    assert "--d-sae" in caught.value.fix


def test_controls_are_trained_also_where_an_export_is_asked_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controls, "train_controls", lambda ctx, config, trained: {"sae": trained.sae.path.name})
    result, _ = run(root, controls=True, export="pth", name="both")
    assert result.summary["controls"] == {"sae": "both"} and Path(str(result.summary["export"])).is_file()


def test_tensorboard_without_its_package_is_refused_and_leaves_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match="needs the package tensorboard"):
        run(root, tensorboard=True, name="curves")
    assert not [p for p in (root / "results").rglob("*curves*") if p.is_dir()]


class Toy:
    """A language model of 50 tokens that expects each token to be followed by the one of the next number."""

    revision, device = "r1", torch.device("cpu")

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(4)
        self.embed = torch.randn(50, 16, generator=g)
        self.unembed = self.embed.roll(1, dims=0).T
        self.edited: list[torch.Tensor] = []

    def run(self, tokens: torch.Tensor, interventions=()) -> torch.Tensor:
        residual = self.embed[tokens]
        for one in interventions:
            assert one.site == HOOK
            residual = one.edit(residual)
            self.edited.append(residual)
        return residual @ self.unembed


def test_the_spliced_loss_edits_ordinary_positions_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from greatctl.corpus.windows import TokenStore

    toy = Toy()
    monkeypatch.setattr(models, "open_model", lambda ctx, name, **more: toy)
    ctx, _ = context(root)
    store = TokenStore(root / "data" / "tokens" / "toy-17")
    meta = {"model": "toy", "model_revision": "r1", "hook_point": HOOK, "special_ids": [0, 1]}
    held = torch.arange(store.length.numel()) >= store.length.numel() - 2
    ce = splice.spliced_loss(ctx, meta, store, held, 10)
    assert ce is not None
    total, count = 0.0, 0
    for window in held.nonzero().squeeze(1).tolist():
        n = int(store.length[window])
        ids = store.input_ids[window, :n].long()
        logs = (toy.embed[ids] @ toy.unembed).log_softmax(dim=-1)
        total -= sum(float(logs[i, ids[i + 1]]) for i in range(n - 1))
        count += n - 1
    assert ce(None) == pytest.approx(total / count, rel=1e-5)
    ce(torch.zeros_like)
    edited = torch.cat(toy.edited)
    tokens = store.input_ids[held].long()
    real = torch.arange(17) < store.length[held][:, None]
    ordinary = real & (tokens > 1)
    assert bool((edited[ordinary] == 0).all())
    assert torch.equal(edited[~ordinary], toy.embed[tokens[~ordinary]])


def test_the_loss_recovered_is_in_the_summary_and_another_revision_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "open_model", lambda ctx, name, **more: Toy())
    result, _ = run(root, ce_windows=4)
    assert isinstance(result.summary["ce_loss_recovered"], float)
    measured = json.loads((result.artifact / "evaluation.json").read_text())
    assert measured["ce_clean"] > 0 and measured["ce_zero"] > 0
    other = SimpleNamespace(revision="r2-is-another-one")
    monkeypatch.setattr(models, "open_model", lambda ctx, name, **more: other)
    with pytest.raises(InputError, match="not the model that was harvested"):
        run(root, ce_windows=4, name="again")


@pytest.mark.parametrize(
    ("method", "answer", "said"),
    [
        ("encode", lambda self, x: torch.zeros(len(x), 3), "[8, 3]"),
        ("encode", lambda self, x: torch.full((len(x), self.config.d_sae), torch.nan), "NaN"),
        ("encode", lambda self, x: torch.zeros(len(x), self.config.d_sae, dtype=torch.int64), "torch.int64"),
        ("decode", lambda self, latents: latents, "decode"),
        ("losses", lambda self, x, dead, step: {"mse": x.square()}, "losses['mse']"),
        ("losses", lambda self, x, dead, step: x.sum(), "named terms"),
        ("losses", lambda self, x, dead, step: {}, "named terms"),
        ("encode", lambda self, x: x @ torch.zeros(1, 1), "RuntimeError"),
    ],
    ids=["shape", "nan", "dtype", "decode", "vector loss", "no mapping", "no terms", "raises"],
)
def test_an_architecture_that_breaks_its_contract_is_exit_8_before_training(
    own: Path, monkeypatch: pytest.MonkeyPatch, method: str, answer: Any, said: str
) -> None:
    from greatctl.errors import PluginError
    from greatctl.sae.topk import TopK

    monkeypatch.setattr(TopK, method, answer)
    with pytest.raises(PluginError) as caught:
        run(own)
    assert caught.value.exit_code == 8 and "'topk'" in caught.value.message and said in caught.value.why
    assert not list((own / "results" / "saes").glob("[!.]*"))
