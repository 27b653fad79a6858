"""The command line: documents, exit codes, origins, help, and manners."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic.fields import FieldInfo

from greatctl.cli.commands import NAMES
from greatctl.cli.text import visible
from greatctl.stages.context import STAGES

ROOT = Path(__file__).resolve().parents[1]
Greatctl = Callable[..., "object"]


def _options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", text))


@pytest.mark.parametrize("stage", STAGES)
def test_every_flag_of_a_stage_is_a_setting_of_its_config(stage: str) -> None:
    import importlib

    import typer

    from greatctl.cli.options import COMMON

    app = typer.Typer()
    importlib.import_module(f"greatctl.cli.commands.{stage}_").register(app)
    callback = app.registered_commands[0].callback
    assert callback is not None
    own = set(callback.__annotations__) - {"ctx"} - set(COMMON)
    fields: dict[str, FieldInfo] = importlib.import_module(f"greatctl.stages.{stage}").Config.model_fields
    assert own <= set(fields), f"flags without a setting: {own - set(fields)}"
    for name, field in fields.items():
        assert field.description, f"{stage}.{name} has no description"


@pytest.mark.parametrize("command", NAMES)
def test_each_help_page_has_examples_that_name_real_options(greatctl: Greatctl, command: str, tmp_path: Path) -> None:
    module = __import__(f"greatctl.cli.commands.{command}_", fromlist=["EXAMPLES"])
    assert 2 <= len(module.EXAMPLES) <= 4
    out = greatctl(command, "--help", cwd=tmp_path)
    assert out.code == 0 and out.err == ""
    root_options = {"project", "data-dir", "results-dir", "plugin", "no-plugins", "offline", "debug"}
    for example in module.EXAMPLES:
        assert example.startswith("greatctl ")
        assert _options(example) <= _options(out.out) | root_options, example


def test_usage_error_is_one_document_and_exit_2(greatctl: Greatctl, tmp_path: Path) -> None:
    out = greatctl("trian", "--json", cwd=tmp_path)
    assert out.code == 2 and out.error["code"] == "usage" and "train" in out.error["message"]
    out = greatctl("train", "--kk", "3", "--json", cwd=tmp_path)
    assert out.code == 2 and "--k" in json.dumps(out.error)


def test_missing_project_folder_is_exit_3(greatctl: Greatctl, tmp_path: Path) -> None:
    out = greatctl("-C", "nowhere", "status", "--json", cwd=tmp_path)
    assert out.code == 3 and "nowhere" in out.error["message"] and out.error["fix"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", ["harvest", "train", "interpret"])
def test_missing_input_stage_is_exit_5_and_names_the_command(greatctl: Greatctl, stage: str, tmp_path: Path) -> None:
    out = greatctl(stage, "--json", cwd=tmp_path)
    assert out.code == 5, out.out
    assert "greatctl " in out.error["fix"]


def test_dry_run_shows_every_setting_with_its_origin(greatctl: Greatctl, demo: Path) -> None:
    env = {"GREATCTL_TRAIN_LR": "0.002"}
    out = greatctl("-C", demo, "train", "--k", "16", "--dry-run", "--json", cwd=demo, env=env)
    assert out.code == 0, out.err
    settings = out.document["summary"]["settings"]
    assert settings["k"] == {"value": 16, "origin": "flag --k"}
    assert settings["lr"] == {"value": 0.002, "origin": "env GREATCTL_TRAIN_LR"}
    assert settings["epochs"]["origin"] == "sources.toml [train]"
    assert settings["seed"]["origin"] == "default"
    human = greatctl("-C", demo, "train", "--k", "16", "--dry-run", cwd=demo, env=env)
    assert "flag --k" in human.out and "nothing was done" in human.out


def test_wrong_environment_value_is_exit_2_and_names_the_variable(greatctl: Greatctl, demo: Path) -> None:
    out = greatctl("-C", demo, "train", "--json", cwd=demo, env={"GREATCTL_SEED": "abc"})
    assert out.code == 2 and "GREATCTL_SEED" in json.dumps(out.error)


def test_k_above_d_sae_and_out_of_range_are_exit_3(greatctl: Greatctl, demo: Path) -> None:
    for words in (["--k", "4096", "--d-sae", "512"], ["--k", "0"]):
        out = greatctl("-C", demo, "train", *words, "--json", cwd=demo)
        assert out.code == 3, out.out


def test_layer_out_of_range_is_exit_3(greatctl: Greatctl, demo: Path) -> None:
    out = greatctl("-C", demo, "harvest", "--layer", "99", "--json", cwd=demo)
    assert out.code == 3 and "99" in json.dumps(out.error)


def test_unknown_metric_character_and_architecture_are_named_with_the_nearest(greatctl: Greatctl, demo: Path) -> None:
    for words, near in (
        (["patch", "--metric", "logit-dif"], "logit-diff"),
        (["fetch", "--character", "darwn"], "darwin"),
        (["train", "--arch", "topkk"], "topk"),
    ):
        out = greatctl("-C", demo, *words, "--json", cwd=demo)
        assert out.code == 2, out.out
        assert near in json.dumps(out.error)


def test_cuda_where_there_is_none_is_exit_9(greatctl: Greatctl, demo: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    out = greatctl("-C", demo, "harvest", "--device", "cuda", "--force", "--json", cwd=demo)
    assert out.code in (2, 9) and "cpu" in json.dumps(out.error)


def test_status_piped_into_head_is_quiet(demo: Path) -> None:
    command = f"{sys.executable} -m greatctl -C {demo} status | head -1; echo ${{PIPESTATUS[0]}}"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=env, timeout=60, check=False)
    assert done.stdout.splitlines()[-1] in ("0", "141")
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_closed_stdout_is_clean(demo: Path) -> None:
    command = f"{sys.executable} -m greatctl -C {demo} status >&-"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=env, timeout=60, check=False)
    assert done.returncode in (0, 141) and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"LANG": "C", "LC_ALL": "C"}, {"COLUMNS": "20"}, {"FORCE_COLOR": "1"}]
)
def test_odd_terminals_get_readable_output(greatctl: Greatctl, demo: Path, env: dict[str, str]) -> None:
    out = greatctl("-C", demo, "status", cwd=demo, env=env)
    assert out.code == 0 and "train" in re.sub(r"\s", "", out.out)
    if "FORCE_COLOR" not in env:
        assert "\x1b" not in out.out


def test_foreign_text_is_shown_and_never_obeyed(greatctl: Greatctl, demo: Path) -> None:
    hostile = "[/bold] [link=file:///etc/passwd]x[/link] \x1b[31mred \u202eevil <script>"
    out = greatctl("-C", demo, "interpret", "--text", hostile, "--top-k", "2", cwd=demo, env={"FORCE_COLOR": "1"})
    assert out.code == 0, out.err
    assert "\x1b]8;" not in out.out and "\u202e" not in out.out
    assert visible("a\x1b[31m\u202e\n") == "a\\x1b[31m\\u202e\u21b5"


def test_unexpected_exception_is_exit_70_with_a_crash_file_and_no_values(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['greatctl', 'status', '--json']\n"
        "import greatctl.cli.session as s\n"
        "def boom(root, quiet=False):\n    secret = 'hf_' + 'topsecret'\n    raise KeyError('boom')\n"
        "s.open_project = boom\n"
        "from greatctl.cli import main\nmain()\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 70, done.stderr
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "bug" and "crash-" in error["fix"]
    crash = next((tmp_path / "results" / "logs").glob("crash-*.txt")).read_text()
    assert "boom" in crash and "hf_topsecret" not in crash
    assert "Traceback" not in done.stderr


def test_init_writes_the_manifest_once(greatctl: Greatctl, tmp_path: Path) -> None:
    assert greatctl("init", cwd=tmp_path).code == 0
    assert (tmp_path / "sources.toml").read_bytes() == (ROOT / "sources.toml").read_bytes()
    again = greatctl("init", "--json", cwd=tmp_path)
    assert again.code == 2 and "exists" in again.error["message"]


def test_doctor_looks_at_everything(greatctl: Greatctl, tmp_path: Path) -> None:
    out = greatctl("--offline", "doctor", "--json", cwd=tmp_path)
    checks = {c["name"]: c for c in out.document["summary"]["checks"]}
    assert {"python", "torch", "tensors", "gpu", "disk", "sync", "locks", "model"} <= set(checks)
    synced = greatctl("--offline", "--data-dir", tmp_path / "Dropbox" / "x", "doctor", "--json", cwd=tmp_path)
    rows = {c["name"]: c for c in synced.document["summary"]["checks"]}
    assert rows["sync"]["state"] == "warning" and "--data-dir" in rows["sync"]["fix"]
