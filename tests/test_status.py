"""`status`: each artifact is compared with what its stage would make of it now, and staleness goes on to what follows."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_llama import TEXT, make_project, save_tiny

from greatctl import manifest
from greatctl.events import Run
from greatctl.extend.loading import code_digest
from greatctl.extend.manager import Plugins, load_plugins
from greatctl.settings import resolve
from greatctl.stages.context import Context, Project, Result
from greatctl.stages.status import damage, survey
from greatctl.store.artifact import Identity, load, work
from greatctl.store.files import write_text

ROOT = Path(__file__).resolve().parents[1]
A, B = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
TRAIN = '\n[train]\narch = "topk"\nd_sae = 48\nk = 3\nsteps = 4\nbatch_size = 64\nce_windows = 0\n'


def do(project: Project, stage: str, plugins: Plugins | None = None, **flags: object) -> Result:
    """Run a stage as the command line would."""
    module = importlib.import_module(f"greatctl.stages.{stage}")
    found = resolve(module.Config, stage, flags=flags, manifest=project.manifest, environ={})
    plugins = plugins or load_plugins(folder=None, enabled=False)
    return module.run(Context(project, plugins, Run(stage), found.origins, offline=True, device="cpu"), found.config)


def opened(root: Path) -> Project:
    return Project(root, manifest.load(root / "sources.toml"), root / "data", root / "results")


def edited(project: Project, old: str, new: str) -> Project:
    """The project with its manifest changed and read again."""
    path = project.root / "sources.toml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    return opened(project.root)


def states(project: Project) -> dict[str, tuple[str, str]]:
    """stage/folder -> (state, reason), without the sources."""
    rows = [row for row in survey(project) if row["stage"] != "fetch"]
    return {f"{row['stage']}/{Path(str(row['path'])).name}": (str(row["state"]), str(row["reason"])) for row in rows}


def not_fine(project: Project) -> dict[str, tuple[str, str]]:
    return {name: found for name, found in states(project).items() if found[0] not in ("up-to-date", "missing")}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hook points of one harvest, an SAE on each and a third of another size, features of two, a report."""
    root = tmp_path_factory.mktemp("status")
    save_tiny(root / "model")
    project = make_project(root / "project", {"darwin-a": TEXT * 6, "wood-b": TEXT * 4})
    project = edited(project, 'name = "bundled"', f'name = "{root / "model"}"')
    write_text(project.root / "sources.toml", (project.root / "sources.toml").read_text() + TRAIN)
    project = opened(project.root)
    do(project, "tokenize", window=16)
    do(project, "harvest", hook_point=[A, B])
    do(project, "train")
    do(project, "interpret")
    do(project, "train", hook_point=B)
    do(project, "interpret")
    do(project, "train", d_sae=56, name="wide")
    do(project, "report")
    return project.root


@pytest.fixture
def project(made: Path, tmp_path: Path) -> Project:
    """A copy that the test may change."""
    shutil.copytree(made, tmp_path / "project")
    return opened(tmp_path / "project")


def test_several_sites_autoencoders_and_features_are_each_planned_as_themselves(project: Project) -> None:
    assert not_fine(project) == {}
    assert set(states(project)) == {
        "tokenize/model-16", f"harvest/{A}", f"harvest/{B}", f"train/topk-48-k3-{A}", f"train/topk-48-k3-{B}",
        "train/wide", f"interpret/topk-48-k3-{A}", f"interpret/topk-48-k3-{B}", "report/report", "patch/patches",
    }  # fmt: skip
    assert states(project)["patch/patches"] == ("missing", "run `greatctl patch`")
    do(project, "harvest", hook_point=[B])  # the other site is in use now
    assert set(not_fine(project)) == {"report/report"}


def test_patched_latents_of_an_older_autoencoder_are_planned_with_it(project: Project) -> None:
    """A newer autoencoder is what `--site latents` would take now; what was patched with the older one stays as it is."""
    pairs = project.root / "pairs.jsonl"
    pairs.write_text(
        '{"id": "a", "clean": "123456", "corrupted": "125456", "answer": "7", "wrong_answer": "9"}\n', encoding="utf-8"
    )
    do(project, "patch", pairs=str(pairs), site="latents", top=2, min_gap=0.0)
    do(project, "train", hook_point=A, name="newer")
    assert not [name for name in not_fine(project) if name.startswith("patch/")]


def test_an_edited_setting_makes_its_own_artifacts_and_all_that_follow_stale(project: Project) -> None:
    found = states(edited(project, "k = 3", "k = 2"))
    assert found["tokenize/model-16"][0] == found[f"harvest/{A}"][0] == "up-to-date"
    for name in (f"topk-48-k3-{A}", f"topk-48-k3-{B}", "wide"):
        assert found[f"train/{name}"] == ("stale", "config.k 3 -> 2")
    assert found[f"interpret/topk-48-k3-{A}"] == ("stale", f"made from topk-48-k3-{A} (inputs.sae), which is stale")
    assert found["report/report"][0] == "stale" and "made from" in found["report/report"][1]


def test_a_stage_that_made_something_new_leaves_what_was_made_for_it_stale(project: Project) -> None:
    do(project, "harvest", hook_point=[A, B], batch_size=8)
    found = not_fine(project)
    assert not any(name.startswith(("tokenize", "harvest")) for name in found)
    assert found[f"train/topk-48-k3-{A}"] == found[f"train/topk-48-k3-{B}"] == ("stale", "inputs.activations changed")


def test_what_is_made_from_something_that_is_gone_is_stale(project: Project) -> None:
    shutil.rmtree(project.saes / f"topk-48-k3-{A}")
    assert states(project)[f"interpret/topk-48-k3-{A}"][0] == "stale"
    shutil.rmtree(project.activations / "model" / B)
    assert states(project)[f"train/topk-48-k3-{B}"][0] == "stale"


def test_a_broken_record_is_damaged_and_so_is_nothing_dropped(project: Project) -> None:
    record = project.activations / "model" / A / "artifact.json"
    record.write_bytes(record.read_bytes()[:100])
    found = states(project)
    assert found[f"harvest/{A}"][0] == "damaged" and "artifact.json" in found[f"harvest/{A}"][1]
    assert found[f"train/topk-48-k3-{A}"][0] == "stale"
    assert damage(project)[1] == [f"{record} ({found[f'harvest/{A}'][1]})"]


def test_an_empty_project_has_no_rows(tmp_path: Path) -> None:
    assert survey(make_project(tmp_path, {})) == []


def test_another_export_makes_nothing_stale(project: Project) -> None:
    do(project, "tokenize", window=16, export=["pt"])
    assert not_fine(project) == {}


def test_a_model_that_is_not_at_hand_says_nothing_about_what_was_made_with_it(project: Project) -> None:
    project = edited(project, str(project.manifest.model_name), "nobody/has-this-model")
    state, note = states(project)["tokenize/model-16"]
    assert state == "up-to-date" and note.startswith("not compared: ")


def fetched_with(project: Project, plugins: Mapping[str, str]) -> None:
    with work(project.raw / "odd", Identity("fetch", {"id": "odd"}, plugins=plugins)) as w:
        write_text(w.path / "text.txt", TEXT)
        w.seal({})


def test_a_local_plugin_is_hashed_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = make_project(tmp_path, {})
    plugin = tmp_path / "plugins" / "odd.py"
    write_text(plugin, 'raise SystemExit("it ran")\nkind = "odd-kind"\n')
    fetched_with(project, {"sources/odd-kind": code_digest(plugin)})

    def odd() -> tuple[object, object]:
        row = survey(project)[0]
        return row["state"], row["reason"]

    assert odd() == ("up-to-date", "")
    plugin.write_text(plugin.read_text() + "# edited\n")
    assert odd() == ("stale", "plugins.sources/odd-kind changed")
    plugin.unlink()
    monkeypatch.setattr("greatctl.stages.status.installed", lambda: [])
    assert odd() == ("stale", "the plugin that gave sources/odd-kind is gone")
    monkeypatch.setattr("greatctl.stages.status.installed", lambda: [object()])
    assert odd() == ("up-to-date", "made with the plugin item sources/odd-kind: run its stage to check")


def test_an_autoencoder_of_a_plugin_and_its_features_are_up_to_date_without_running_it(project: Project) -> None:
    shutil.copytree(ROOT / "plugins" / "ista", project.root / "plugins" / "ista")
    plugins = load_plugins(folder=project.root, names=["ista"])
    do(project, "train", plugins, arch="ista", d_sae=40, name="odd")
    features = do(project, "interpret", plugins, sae="odd").artifact
    assert features is not None
    assert not_fine(project) == {"report/report": ("stale", "inputs.features changed")}
    digest = code_digest(project.root / "plugins" / "ista")
    assert load(project.saes / "odd").record["plugins"] == {"architectures/ista": digest}
    code = project.root / "plugins" / "ista" / "coder.py"
    code.write_text(code.read_text() + "# edited\n")
    assert states(project)["train/odd"] == ("stale", "plugins.architectures/ista changed")
    assert states(project)["interpret/odd"][0] == "stale"


def test_a_manifest_that_asks_for_a_plugins_architecture_is_told_without_it(project: Project) -> None:
    found = states(edited(project, 'arch = "topk"', 'arch = "ista"'))
    assert found["train/wide"] == ("stale", "config.arch topk -> ista")


def test_the_report_is_written_twice_over_and_the_same_to_the_byte(project: Project, tmp_path: Path) -> None:
    plugins = CountingPlugins(load_plugins(folder=None, enabled=False))
    module = importlib.import_module("greatctl.stages.report")
    ctx = Context(project, plugins, Run("report"), force=True, device="cpu")  # type: ignore[arg-type]
    target = tmp_path / "new folder" / "copy.html"
    first = module.run(ctx, module.Config(output=target))
    assert first.summary["path"] == str(target) and plugins.calls == 1
    before = {p.name: p.read_bytes() for p in project.report.iterdir() if p.name != "run.json"}
    assert {"index.html", "report.json"} < set(before) and target.read_bytes() == before["index.html"]
    module.run(ctx, module.Config())
    assert {p.name: p.read_bytes() for p in project.report.iterdir() if p.name != "run.json"} == before
    as_json = module.run(replace(ctx, force=False), module.Config(format="json"))
    assert as_json.up_to_date and as_json.summary["path"] == str(project.report / "report.json")
    assert (project.report / "index.html").read_bytes() == before["index.html"]
    state, note = states(project)["report/report"]
    assert (state, note) == ("up-to-date", "")


def test_a_report_cannot_be_put_over_a_folder_or_below_a_file(project: Project, tmp_path: Path) -> None:
    from greatctl.errors import ManifestError

    (tmp_path / "file").write_text("x")
    for place in (tmp_path, tmp_path / "file" / "page.html"):
        with pytest.raises(ManifestError):
            do(project, "report", output=place)


class CountingPlugins:
    """Plugins with one report section, which counts how often it is made."""

    def __init__(self, plugins: Plugins) -> None:
        self.registry, self.calls = plugins.registry, 0

    def report_sections(self, results: Path) -> list[dict[str, object]]:
        self.calls += 1
        return [{"title": "Odd", "plugin": "odd", "blocks": [{"kind": "prose", "text": "One."}]}]
