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
    assert own == set(fields) - {"seed"}, f"flags and settings differ: {own ^ (set(fields) - {'seed'})}"
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
    assert out.code == 2 and out.error["code"] == "usage" and "train" in out.error["fix"]
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


@pytest.mark.parametrize("stage", ["harvest", "train", "interpret"])
def test_cuda_where_there_is_none_is_exit_9_and_costs_nothing(greatctl: Greatctl, demo: Path, stage: str) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    before = sorted(demo.rglob("artifact.json"))
    out = greatctl("-C", demo, stage, "--device", "cuda", "--force", "--json", cwd=demo)
    assert out.code in (2, 9) and "cpu" in json.dumps(out.error)
    assert sorted(demo.rglob("artifact.json")) == before and not list(demo.rglob(".*.partial"))


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


def test_every_flag_that_a_message_names_exists() -> None:
    import ast

    import typer

    from greatctl.cli.app import app
    from greatctl.cli.commands import register

    if not app.registered_commands:
        register(app)
    command = typer.main.get_command(app)
    known = {o for p in command.params for o in p.opts}
    known |= {o for sub in command.commands.values() for p in sub.params for o in (*p.opts, *p.secondary_opts)}  # type: ignore[attr-defined]
    known |= {"--help", "--help)"}
    for path in sorted((ROOT / "greatctl").rglob("*.py")):
        if path.parts[-2] == "reference":  # a program of its own, with flags of its own
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", node.value):
                    assert flag in known, f"{path.name}:{node.lineno} speaks of {flag}"


EXAMPLES = [(n, e) for n in NAMES for e in __import__(f"greatctl.cli.commands.{n}_", fromlist=["x"]).EXAMPLES]


@pytest.mark.parametrize(("name", "example"), EXAMPLES, ids=[e for _, e in EXAMPLES])
def test_each_example_is_understood(
    name: str,
    example: str,
    demo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A stage's example is planned in the demo's project; what it names may be missing there, but it is never misuse."""
    import shlex

    from typer import TyperException

    from greatctl.cli.app import app
    from greatctl.cli.commands import register
    from greatctl.errors import GreatctlError

    if name not in STAGES:
        assert "--help" in example or name in example
        return
    if not app.registered_commands:
        register(app)
    monkeypatch.chdir(demo)
    monkeypatch.setenv("GREATCTL_RESULTS_DIR", str(demo / "results"))
    words = [*shlex.split(example)[1:], "--dry-run", "--json"]
    try:
        app(words, standalone_mode=False)
    except GreatctlError as error:
        assert error.exit_code in (2, 3, 5, 7), error
        assert error.fix
    except TyperException as error:
        pytest.fail(error.format_message())


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
    assert {"python", "torch", "tensors", "gpu", "disk", "sync", "locks", "proxy", "model"} <= set(checks)
    synced = greatctl("--offline", "--data-dir", tmp_path / "Dropbox" / "x", "doctor", "--json", cwd=tmp_path)
    rows = {c["name"]: c for c in synced.document["summary"]["checks"]}
    assert rows["sync"]["state"] == "warning" and "--data-dir" in rows["sync"]["fix"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["trian"], 2),
        (["train", "--k"], 2),
        (["train", "--k", "x"], 2),
        (["train", "--k", "0"], 3),
        (["train", "--arch", "no"], 2),
        (["train", "--steps", "3", "--epochs", "2"], 2),
        (["tokenize", "--window", "100000"], 3),
        (["harvest", "--hook-point", "blocks.1.hook_nothing"], 2),
        (["harvest", "--worker", "9/2"], 2),
        (["patch", "--pairs", "nothing"], 2),
        (["patch", "--pairs", "nothing.toml"], 5),
        (["interpret", "--text", ""], 2),
        (["interpret", "--latent", "99999"], 3),
        (["interpret", "--sae", "nothing"], 5),
        (["fetch", "--import", "nothing.txt", "--source", "sketch-darwin"], 5),
        (["fetch", "--source", "nothing"], 2),
        (["run", "--from", "nothing"], 2),
        (["run", "--from", "report", "--to", "fetch"], 2),
        (["--plugin", "nothing.py", "plugins"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_every_failure_is_one_document_with_what_why_and_fix(
    greatctl: Greatctl, demo: Path, words: list[str], code: int
) -> None:
    out = greatctl("-C", demo, *words, "--json", cwd=demo)
    assert out.code == code, out.out + out.err
    assert set(out.error) == {"code", "message", "why", "fix", "where"}
    assert out.error["message"] and "Traceback" not in out.err


def test_a_write_that_the_system_refuses_is_exit_9_and_resumable(demo: Path, tmp_path: Path) -> None:
    """A limit on file size stands for the full disk: the kernel refuses in the middle of a shard."""
    import resource
    import shutil

    project = tmp_path / "project"
    shutil.copytree(demo, project)
    shutil.rmtree(project / "data" / "activations")
    command = [sys.executable, "-m", "greatctl", "-C", str(project), "harvest", "--layer", "0", "--json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    done = subprocess.run(command, env=env, capture_output=True, text=True, preexec_fn=small_files, check=False)
    assert done.returncode == 9, done.stdout + done.stderr
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "disk-full" and "--data-dir" in error["fix"]
    partial = [p for p in project.rglob("*.partial") if p.is_file()]
    assert partial == []
    again = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout


def test_closed_stdin_does_not_matter(demo: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = f"{sys.executable} -m greatctl -C {demo} status --json <&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=env, timeout=60, check=False)
    assert done.returncode == 0 and json.loads(done.stdout)["ok"]


def test_foreign_text_in_an_error_is_shown_and_never_obeyed(greatctl: Greatctl, tmp_path: Path) -> None:
    folder = tmp_path / "a\x1b[31mb\u202ec"
    folder.mkdir()
    (folder / "sources.toml").write_text("nonsense = [")
    out = greatctl("-C", folder, "status", cwd=tmp_path)
    assert out.code == 3
    assert "\x1b" not in out.err and "\u202e" not in out.err and "\\x1b" in out.err


def test_status_verify_and_completion_run_no_code_of_the_project(
    greatctl: Greatctl, demo: Path, tmp_path: Path
) -> None:
    import shutil

    project = tmp_path / "project"
    shutil.copytree(demo, project)
    (project / "plugins").mkdir()
    (project / "plugins" / "marker.py").write_text(
        "from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\n"
    )
    for words in (["status"], ["verify"], ["--help"], ["train", "--help"]):
        assert greatctl("-C", project, *words, cwd=project).code == 0
    greatctl(
        "-C",
        project,
        cwd=project,
        env={"_GREATCTL_COMPLETE": "complete_bash", "COMP_WORDS": "greatctl tr", "COMP_CWORD": "1"},
    )
    assert not (project / "plugins" / "marker.ran").exists()
    assert greatctl("-C", project, "plugins", cwd=project).code == 0
    assert (project / "plugins" / "marker.ran").exists()


def test_doctor_warns_where_there_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from greatctl.stages import doctor
    from greatctl.store import lock

    def no_flock(self: object) -> None:
        raise NotImplementedError("no flock here")

    monkeypatch.setattr(lock.FileLock, "acquire", no_flock)
    row = doctor._locks(tmp_path)
    assert row["state"] == "warning" and "local disk" in row["fix"]


def test_doctor_says_that_fetch_uses_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    from greatctl.stages import doctor

    for name in doctor._PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    assert doctor._proxy()["state"] == "ok"
    monkeypatch.setenv("https_proxy", "http://me:secret@proxy.example.org:8080")
    row = doctor._proxy()
    assert row["state"] == "warning" and "HTTPS_PROXY" in row["found"] and "--mirror" in row["fix"]
    assert "secret" not in str(row)


def test_doctor_says_what_a_gated_model_needs(greatctl: Greatctl, tmp_path: Path) -> None:
    assert greatctl("init", cwd=tmp_path).code == 0
    out = greatctl("doctor", "--json", cwd=tmp_path, env={"HF_HOME": str(tmp_path / "hf")})
    rows = {c["name"]: c for c in out.document["summary"]["checks"]}
    assert rows["model"]["state"] == "warning" and "bundled" in rows["model"]["fix"]
