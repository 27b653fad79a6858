"""The examples of the help pages, run as they stand in the demonstration's project."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from greatctl.cli.app import app
from greatctl.cli.commands import NAMES, register

EXAMPLES = {name: __import__(f"greatctl.cli.commands.{name}_", fromlist=["x"]).EXAMPLES for name in NAMES}
HERE = [
    "greatctl fetch --audit --json",
    "greatctl fetch --estimate",
    "greatctl tokenize --export pt",
    "greatctl harvest",
    "greatctl train",
    "greatctl interpret",
    'greatctl interpret --text "He kept his head when all about him were losing theirs." --top-k 5',
    "greatctl interpret --latent 118",
    *EXAMPLES["steer"],
    "greatctl report --output greatness.html",
    "greatctl report --format md --output findings.md",
    "greatctl run --from tokenize --to harvest --json",
    "greatctl status",
    "greatctl verify",
    "greatctl doctor",
]
LONG = [
    "greatctl tokenize --model bundled",
    "greatctl tokenize --character darwin --window 512",
    "greatctl train --arch relu --l1-coefficient 3 --name seed-recipe",
    "greatctl train --name seed-recipe --arch relu --l1-coefficient 3 --export pth",
    "greatctl train --sweep arch=topk,batchtopk --sweep k=16,32,64",
    "greatctl patch --model bundled --metric logit-diff --metric kl --pairs composure",
    "greatctl patch --site edges --method attribution --verify 20",
    'greatctl patch --clean "The captain was calm and" --corrupted "The captain was angry and" --answer " strong" '
    '--wrong-answer " weak"',
    "greatctl run",
]


@pytest.fixture(scope="module")
def project(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples") / "project"
    shutil.copytree(demo, folder)
    if not app.registered_commands:
        register(app)
    return folder


def run(example: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Result:
    monkeypatch.chdir(folder)
    return CliRunner().invoke(app, ["--offline", *shlex.split(example)[1:]], prog_name="greatctl")


@pytest.mark.parametrize("example", HERE)
def test_an_example_runs_as_it_stands(example: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(example, project, monkeypatch)
    assert done.exit_code == 0, done.output


@pytest.mark.slow
def test_the_long_examples_run_one_after_the_other(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for example in LONG:
        done = run(example, project, monkeypatch)
        assert done.exit_code == 0, done.output


def test_these_examples_are_those_of_the_pages() -> None:
    known = {example for examples in EXAMPLES.values() for example in examples}
    assert {*HERE, *LONG} <= known
