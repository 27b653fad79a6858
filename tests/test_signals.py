"""A stage that is killed, stopped, paused or run twice: nothing is lost and nothing is torn."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
Greatctl = Callable[..., "object"]
QUICK = {"GREATCTL_TRAIN_CE_WINDOWS": "2"}  # the language model's loss is measured elsewhere


def _environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **QUICK}


def _copy(demo: Path, target: Path) -> Path:
    shutil.copytree(demo, target / "project")
    return target / "project"


def _bytes(folder: Path) -> dict[str, bytes]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "run.json")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def _spawn(project: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "greatctl", "-C", str(project), *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment(), cwd=project
    )


def _wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it ended before it could be disturbed: " + (process.communicate()[1] or "")
        assert time.monotonic() < end, "it never got there"
        time.sleep(0.02)


def test_kill_in_the_middle_of_train_ends_with_the_same_bytes(greatctl: Greatctl, demo: Path, tmp_path: Path) -> None:
    words = ["train", "--steps", "30", "--d-sae", "256", "--checkpoint-every", "5", "--batch-size", "256"]
    words += ["--name", "calm"]
    calm, killed = _copy(demo, tmp_path / "calm"), _copy(demo, tmp_path / "killed")
    assert greatctl("-C", calm, *words, cwd=calm, env=QUICK).code == 0
    process = _spawn(killed, *words)
    checkpoints = killed / "results" / "saes" / ".calm.partial" / "checkpoints"
    _wait_for(lambda: checkpoints.is_dir() and len(list(checkpoints.iterdir())) > 1, process)
    process.kill()
    process.communicate()
    assert not (killed / "results" / "saes" / "calm").exists()
    assert greatctl("-C", killed, *words, cwd=killed, env=QUICK).code == 0
    assert _bytes(calm / "results" / "saes" / "calm") == _bytes(killed / "results" / "saes" / "calm")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_polite_signal_stops_after_a_checkpoint(
    greatctl: Greatctl, demo: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    project = _copy(demo, tmp_path)
    words = ["train", "--steps", "4000", "--d-sae", "256", "--batch-size", "256", "--name", "long", "--json"]
    process = _spawn(project, *words)
    partial = project / "results" / "saes" / ".long.partial"
    _wait_for(partial.is_dir, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    error = json.loads(out)["error"]
    assert error["code"] == "interrupted" and "again" in error["fix"]
    assert not (project / "results" / "saes" / "long").exists()


def test_a_second_signal_stops_at_once_and_a_hangup_after_a_checkpoint(demo: Path, tmp_path: Path) -> None:
    words = ["train", "--steps", "4000", "--d-sae", "256", "--batch-size", "256", "--name", "long"]
    for signals, codes in (([signal.SIGINT, signal.SIGINT], (130,)), ([signal.SIGHUP], (129,))):
        project = _copy(demo, tmp_path / str(len(signals)))
        process = _spawn(project, *words)
        _wait_for((project / "results" / "saes" / ".long.partial").is_dir, process)
        began = time.monotonic()
        for number in signals:
            process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode in codes
        assert time.monotonic() - began < 30
        assert not (project / "results" / "saes" / "long").exists()


def test_a_paused_run_goes_on(greatctl: Greatctl, demo: Path, tmp_path: Path) -> None:
    project = _copy(demo, tmp_path)
    words = ["train", "--steps", "20", "--d-sae", "64", "--k", "4", "--batch-size", "128", "--name", "paused"]
    process = _spawn(project, *words)
    _wait_for((project / "results" / "saes" / ".paused.partial").is_dir, process)
    process.send_signal(signal.SIGSTOP)
    time.sleep(1)
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=120)
    assert process.returncode == 0


def test_two_processes_on_one_artifact_are_told_apart(greatctl: Greatctl, demo: Path, tmp_path: Path) -> None:
    project = _copy(demo, tmp_path)
    words = ["train", "--steps", "4000", "--d-sae", "256", "--batch-size", "256", "--name", "mine"]
    first = _spawn(project, *words)
    _wait_for((project / "results" / "saes" / ".mine.holder").exists, first)
    second = greatctl("-C", project, *words, "--json", cwd=project, env=QUICK)
    assert second.code == 10 and str(first.pid) in second.error["why"]
    first.kill()
    first.communicate()


def test_random_schedules_end_as_some_serial_run_would(greatctl: Greatctl, demo: Path, tmp_path: Path) -> None:
    """Three commands at once, in several orders: each ends well or is told to wait, and nothing is torn."""
    project = _copy(demo, tmp_path)
    commands = [["report", "--force"], ["interpret"], ["tokenize", "--window", "64"]]
    for seed in range(2):
        random.Random(seed).shuffle(commands)
        running = [_spawn(project, *words) for words in commands]
        for process in running:
            process.communicate()
            assert process.returncode in (0, 10)
    assert greatctl("-C", project, "verify", cwd=project).code == 0
