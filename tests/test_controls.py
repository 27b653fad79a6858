"""The companions of an SAE: what they are, that they stay out of the way, that a kill loses none, and where they show."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_llama import TEXT, context, make_project, save_tiny

from greatctl.events import Run
from greatctl.extend.manager import load_plugins
from greatctl.model.untrained import write_untrained
from greatctl.report import sae as sae_section
from greatctl.sae import produce as produced
from greatctl.sae.trainer import build
from greatctl.settings import Origins
from greatctl.stages import controls, harvest, report, status, tokenize, train
from greatctl.stages.context import Context, Project
from greatctl.store.artifact import load, newest, sealed_under
from greatctl.store.tables import read_columns

SITE = "blocks.1.hook_resid_post"
QUICK = {"arch": "topk", "d_sae": 24, "k": 3, "steps": 12, "batch_size": 64, "ce_windows": 4, "name": "mine"}


def ctx_of(project: Project) -> Context:
    """A context that remembers the settings as flags, as the command line does."""
    origins = Origins({name: f"flag --{name}" for name in QUICK}, QUICK)
    return replace(context(project, "train"), plugins=load_plugins(folder=None), origins=origins)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with an SAE and its controls."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(folder)
    project = make_project(tmp_path_factory.mktemp("controls"), {"darwin-a": TEXT * 12, "wood-b": TEXT[::-1] * 6})
    asked = {"model": str(folder), "window": 16}
    flags = Origins({name: f"flag --{name}" for name in asked}, asked)
    tokenize.run(context(project, origins=flags), tokenize.Config(**asked))  # type: ignore[arg-type]
    harvest.run(context(project), harvest.Config())
    train.run(ctx_of(project), train.Config(**QUICK, controls=True))  # type: ignore[arg-type]
    return project


def rows_of(project: Project) -> Mapping[str, dict]:
    found = json.loads((project.results / "controls" / "mine" / "comparison.json").read_text())
    return {row["control"]: row for row in found}


def test_four_companions_stand_beside_the_sae_with_numbers_and_matches(trained: Project) -> None:
    rows = rows_of(trained)
    assert list(rows) == ["this SAE", *controls.CONTROLS]
    own = json.loads((trained.saes / "mine" / "evaluation.json").read_text())
    assert rows["this SAE"]["explained_variance"] == own["explained_variance"]
    for name in controls.CONTROLS:
        assert rows[name]["explained_variance"] < 1 and 0 < rows[name]["l0"] <= 3
        assert -1 <= rows[name]["matched_hungarian_mean_cosine"] <= rows[name]["matched_ours_mean_max_cosine"] <= 1
    assert len({row["seed"] for row in rows.values()}) == 5  # equal initial directions would match for nothing
    random = rows["random-model"]
    assert random["ce_loss_recovered"] is None and "random weights" in random["ce_undefined"]
    assert own["ce_mean"] is not None and own["kl"] is not None


def test_the_latents_of_the_sae_know_their_best_partner_in_each_companion(trained: Project) -> None:
    folder = trained.results / "controls" / "mine"
    table = read_columns(folder / "latents.parquet")
    ours, theirs = (
        load_file(f / "sae_weights.safetensors")["W_dec"] for f in (trained.saes / "mine", folder / "seed-2")
    )
    cosines = torch.nn.functional.normalize(ours, dim=1) @ torch.nn.functional.normalize(theirs, dim=1).T
    assert table["latent"] == list(range(24))
    assert table["seed_2_cosine"] == pytest.approx(cosines.max(dim=1).values.tolist(), abs=1e-5)
    assert table["seed_2_latent"] == cosines.argmax(dim=1).tolist()


def test_the_frozen_decoder_is_as_it_was_drawn_and_the_others_are_not(trained: Project) -> None:
    registry = load_plugins(folder=None).registry
    folder = trained.results / "controls" / "mine"
    for name in ("frozen-decoder", "seed-1"):
        made = json.loads((folder / name / "training.json").read_text())
        cls = registry.get("architectures", "topk")
        drawn = build(cls, cls.Config(**made["config"]), made["settings"]["seed"]).W_dec
        found = load_file(folder / name / "sae_weights.safetensors")["W_dec"]
        unit = torch.nn.functional.normalize(found, dim=1)
        assert torch.allclose(unit, drawn, atol=1e-5) == (name == "frozen-decoder")


def test_the_random_model_reads_the_same_windows_with_other_weights(tmp_path: Path, trained: Project) -> None:
    folder = trained.results / "controls" / "mine"
    ours, theirs = (
        json.loads((f / "training.json").read_text()) for f in (trained.saes / "mine", folder / "random-model")
    )
    assert theirs["rows"]["special"] == ours["rows"]["special"]
    assert theirs["rows"]["rows"] == ours["rows"]["rows"]
    assert theirs["median_norm"] != pytest.approx(ours["median_norm"], rel=0.01)
    source = json.loads((newest(trained.activations, "harvest").path / "meta.json").read_text())["model"]  # type: ignore[union-attr]
    for number, seed in enumerate((1, 1, 2)):
        write_untrained(source, tmp_path / str(number), layers=2, seed=seed)
    one, again, other = (load_file(tmp_path / str(n) / "model.safetensors") for n in range(3))
    key = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(one[key], again[key]) and not torch.equal(one[key], other[key])
    assert "model.layers.2.mlp.down_proj.weight" not in one
    assert not torch.equal(one[key], load_file(Path(source) / "model.safetensors")[key])


def test_they_are_never_the_newest_sae_and_leave_nothing_behind(trained: Project) -> None:
    assert [a.path.name for a in sealed_under(trained.saes, "train")] == ["mine"]
    assert [a.path.name for a in sealed_under(trained.activations, "harvest")] == [SITE]
    folder = trained.results / "controls" / "mine"
    assert {p.name for p in folder.iterdir() if p.is_dir()} == set(controls.CONTROLS)
    assert not [p for p in folder.rglob("*") if "checkpoint" in p.name or "shard-" in p.name]
    assert status.damage(trained) == (len(sealed_under(trained.data)) + 2, [])
    states = {row["stage"]: (row["state"], row["reason"]) for row in status.survey(trained)}
    assert states["controls"] == states["train"] == ("up-to-date", ""), states


def test_the_same_again_trains_nothing_and_another_sae_has_no_controls(trained: Project) -> None:
    said: list = []
    ctx = replace(ctx_of(trained), run=Run("train", said.append))
    result = train.run(ctx, train.Config(**QUICK, controls=True))  # type: ignore[arg-type]
    notices = [e.message for e in said if e.kind == "notice"]
    assert notices[0] == "train: up to date" and notices[-1] == "controls: up to date"
    assert not any("rows;" in notice for notice in notices), "nothing is trained again"
    assert [row["control"] for row in result.summary["controls"]["controls"]] == list(rows_of(trained))  # type: ignore[index]
    sae = load(trained.saes / "mine")
    assert controls.controls_of(trained, sae) is not None
    stranger = replace(sae, record={**sae.record, "fingerprint": "0" * 64})
    assert controls.controls_of(trained, stranger) is None


def test_a_kill_between_companions_costs_only_the_one_that_was_being_trained(
    trained: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trained.results / "controls" / "mine"
    files = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "run.json"}
    real, made = produced.produce, []

    def dying(place: Path, *a: Any, **k: Any) -> dict:
        if place.name == "seed-1" and "seed-1" not in made:
            made.append("seed-1")
            raise KeyboardInterrupt
        made.append(place.name)
        return real(place, *a, **k)

    monkeypatch.setattr(produced, "produce", dying)
    (folder / "artifact.json").write_text("{}")  # it has to be made again, from nothing
    with pytest.raises(KeyboardInterrupt):
        train.run(ctx_of(trained), train.Config(**QUICK, controls=True))  # type: ignore[arg-type]
    train.run(ctx_of(trained), train.Config(**QUICK, controls=True))  # type: ignore[arg-type]
    assert made == ["frozen-decoder", "random-model", "seed-1", "seed-1", "seed-2"]
    again = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "run.json"}
    assert again == files


def test_a_damaged_companion_is_trained_again_and_the_others_are_kept(
    trained: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = trained.results / "controls" / "mine" / "seed-1" / "sae_weights.safetensors"
    whole, real, made = weights.read_bytes(), produced.produce, []
    weights.write_bytes(whole[:-4] + b"oops")
    monkeypatch.setattr(produced, "produce", lambda place, *a, **k: (made.append(place.name), real(place, *a, **k))[1])
    train.run(ctx_of(trained), train.Config(**QUICK, controls=True))  # type: ignore[arg-type]
    assert made == ["seed-1"] and weights.read_bytes() == whole


def test_the_report_shows_them_side_by_side_and_names_them_as_missing_otherwise(trained: Project) -> None:
    sae = load(trained.saes / "mine")
    beside = sae_section.section(sae, controls.controls_of(trained, sae), [sae])
    tables = [block for block in beside if block.kind == "table"]
    found = next(t for t in tables if "controls" in t.caption)  # type: ignore[union-attr]
    assert [row[0] for row in found.rows] == ["this SAE", *controls.CONTROLS]  # type: ignore[union-attr]
    captions = " ".join(t.caption for t in tables)  # type: ignore[union-attr]
    assert "by character" in captions and "by author" in captions and "by work" in captions
    losses = next(t for t in tables if "loss on held-out" in t.caption)  # type: ignore[union-attr]
    assert [row[0] for row in losses.rows] == ["clean", "spliced", "zero", "mean"]  # type: ignore[union-attr]
    alone = sae_section.section(sae, None, [sae])
    assert any("not trained" in getattr(block, "text", "") for block in alone)
    assert not any("not trained" in getattr(block, "text", "") for block in beside)
    made = report.run(ctx_of(trained), report.Config())
    assert "frozen-decoder" in (Path(str(made.summary["path"]))).read_text()
