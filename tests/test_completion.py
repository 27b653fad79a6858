"""Tab: live values through Typer's protocol, quickly, and without running anything of the project."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from typer.testing import CliRunner

from greatctl.cli.app import app
from greatctl.cli.commands import register
from greatctl.cli.completion import CHOICES, STAGES
from greatctl.stages import context

SAE = "batchtopk-2048-k32-blocks.4.hook_resid_post"
PLUGIN = """
from pathlib import Path
Path(__file__).with_suffix(".ran").touch()
def register_architectures(register):
    register("mine", ".coder:Mine")
def register_metrics(register):
    register(name(), 1)
    register("my-metric", object)
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of folders and small JSON files, as the stages leave them."""
    monkeypatch.chdir(tmp_path)
    for name in ("GREATCTL_DATA_DIR", "GREATCTL_RESULTS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "hub" / "models--org--big").mkdir(parents=True)
    root = tmp_path / "p"
    _seal(root / "results" / "saes" / SAE, {"explained_variance": 0.85})
    rows = [{"latent": 1229, "concept": "greatness", "verdict": "unstable"}]
    _seal(root / "results" / "features" / SAE, {"hypotheses": [*rows, {**rows[0], "latent": 7}]})
    _seal(root / "data" / "activations" / "bundled" / "blocks.4.hook_resid_post", {})
    _seal(root / "data" / "tokens" / "bundled-256", {}, {"model": "bundled"})
    (root / "plugins").mkdir()
    (root / "plugins" / "mine.py").write_text(PLUGIN)
    (root / "sources.toml").write_text(
        '[model]\nname = "org/named"\n[[character]]\nid = "darwin"\nname = "Charles [/bold] Darwin"\n'
        '[[source]]\nid = "darwin-origin-1859"\n[[control]]\nid = "wood-common-objects"\n[[seed]]\nid = "carnegie"\n'
    )
    (tmp_path / "mine.toml").write_text('[[pair]]\nclean = "a"\n')
    return root


def _seal(folder: Path, summary: dict[str, object], config: dict[str, object] | None = None) -> None:
    folder.mkdir(parents=True)
    (folder / "artifact.json").write_text(json.dumps({"config": config or {}}))
    (folder / "run.json").write_text(json.dumps({"summary": summary}))


def _offered(*words: str, shell: str = "bash") -> list[str]:
    """What Tab offers after `greatctl WORDS`, of which the last is being written."""
    if not app.registered_commands:
        register(app)
    env = {"_GREATCTL_COMPLETE": f"complete_{shell}", "COMP_WORDS": " ".join(["greatctl", *words])}
    env |= {"COMP_CWORD": str(len(words)), "_TYPER_COMPLETE_ARGS": env["COMP_WORDS"]}
    done = CliRunner(env=env).invoke(app, [], prog_name="greatctl")
    assert done.exit_code == 0, done.output
    return done.stdout.split("\n") if shell != "bash" else done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("interpret --sae |", {SAE}),
        ("patch --sae batch|", {SAE}),
        ("train --name |", {SAE}),
        ("interpret --latent |", {"1229", "7"}),
        ("steer --latent 12|", {"1229"}),
        ("interpret --concept |", {"greatness", "ambition", "composure", "all"}),
        ("fetch --character d|", {"darwin"}),
        ("fetch --source |", {"darwin-origin-1859", "wood-common-objects", "carnegie"}),
        ("fetch --control |", {"wood-common-objects"}),
        ("tokenize --model |", {"bundled", "org/named", "org/big"}),
        ("train --hook-point |", {"blocks.4.hook_resid_post"}),
        ("harvest --hook-point blocks.7.hook_resid_p|", {"blocks.7.hook_resid_pre", "blocks.7.hook_resid_post"}),
        ("train --arch m|", {"matryoshka", "mine"}),
        ("patch --metric my|", {"my-metric"}),
        ("patch --metric logit|", {"logit", "logit-diff"}),
        ("patch --pairs |", {"greatness", "ambition", "composure", "copying", "mine.toml"}),
        ("patch --site resid_p|", {"resid_pre", "resid_post"}),
        ("steer --against |", {"diff-means", "random", "prompt", "none"}),
        ("train --sweep |", {"arch=", "k=", "lr=", "seed=", "d_sae=", "hook_point="}),
        ("harvest --device |", {"auto", "cpu", "cuda", "mps"}),
        ("run --from |", set(STAGES)),
        ("run --to t|", {"tokenize", "train"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tab_offers_what_the_project_has(project: Path, line: str, offered: set[str]) -> None:
    words = line.removesuffix("|").split(" ")
    assert set(_offered("-C", str(project), *words)) == offered
    assert not (project / "plugins" / "mine.ran").exists(), "completion must not run a plugin"


def test_results_elsewhere_are_found_by_flag_and_environment(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "results").rename(project.parent / "elsewhere")
    assert _offered("-C", str(project), "interpret", "--sae", "") == []
    assert _offered("-C", str(project), "--results-dir", "elsewhere", "interpret", "--sae", "") == [SAE]
    monkeypatch.setenv("GREATCTL_RESULTS_DIR", "elsewhere")
    assert _offered("-C", str(project), "interpret", "--sae", "") == [SAE]


def test_a_damaged_project_offers_nothing_and_says_nothing(project: Path) -> None:
    (project / "sources.toml").write_text("nonsense = [")
    assert _offered("-C", str(project), "fetch", "--character", "") == []
    (project / "sources.toml").write_text("character = 3\n")
    assert _offered("-C", str(project), "fetch", "--character", "") == []
    (project / "results" / "features" / SAE / "run.json").write_text("{}")
    assert _offered("-C", str(project), "interpret", "--latent", "") == []


def test_words_about_a_value_are_never_markup(project: Path) -> None:
    assert "Charles (/bold) Darwin" in "\n".join(_offered("-C", str(project), "fetch", "--character", "", shell="zsh"))


def _words(annotation: Any) -> set[str]:
    """The strings of a Literal, also of an optional one or of a list."""
    if get_origin(annotation) is Literal:
        return {word for word in get_args(annotation) if isinstance(word, str)}
    if get_origin(annotation) in (Union, UnionType, list):
        return set().union(*map(_words, get_args(annotation)))
    return set()


def test_the_offered_words_are_those_of_the_settings() -> None:
    for stage in (*STAGES, "steer"):
        fields = importlib.import_module(f"greatctl.stages.{stage}").Config.model_fields
        for name, field in fields.items():
            if words := _words(field.annotation):
                assert set(CHOICES.get((stage, name), ())) == words, f"{stage}.{name}"
        for of, name in CHOICES:
            assert of != stage or name in fields, f"{of} has no setting {name}"
    assert context.STAGES == STAGES


def test_completion_imports_neither_torch_nor_a_stage(project: Path) -> None:
    code = (
        "import sys\nsys.argv = ['greatctl']\nfrom greatctl.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in sys.modules if m in ('torch', 'pyarrow', 'rich') or m.startswith('greatctl.stages.')])\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "_GREATCTL_COMPLETE": "complete_bash"}
    env |= {"COMP_WORDS": f"greatctl -C {project} interpret --sae ", "COMP_CWORD": "5"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    offered, modules = done.stdout.splitlines()
    assert offered == SAE and done.stderr == ""
    assert ast.literal_eval(modules) == []
