"""Fixtures that several test files share. Nothing here touches a network beyond loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers of pytest-xdist share the cores

ROOT = Path(__file__).resolve().parents[1]


class Outcome:
    """What a `greatctl` process said and ended with."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.code, self.out, self.err = done.returncode, done.stdout, done.stderr

    @property
    def document(self) -> dict:
        """stdout as the one JSON document that it must be."""
        return json.loads(self.out)

    @property
    def error(self) -> dict:
        """The error object of a failed `--json` call."""
        assert self.document["ok"] is False, self.out
        return self.document["error"]


def run_greatctl(*words: object, cwd: Path, env: dict[str, str] | None = None, timeout: float = 300) -> Outcome:
    """Run `greatctl WORDS…` in a process of its own."""
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "100", **(env or {})}
    command = [sys.executable, "-m", "greatctl", *map(str, words)]
    return Outcome(
        subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=timeout, check=False)
    )


@pytest.fixture(scope="session")
def greatctl() -> Callable[..., Outcome]:
    """`greatctl("train", "--json", cwd=folder)` in a process of its own."""
    return run_greatctl


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration project, run once for all workers; each has a copy. Tests that change it copy it again."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "demo"
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "demo.json").exists():
            folder.mkdir(exist_ok=True)
            outcome = run_greatctl("demo", "greatctl-demo", "--json", cwd=folder, timeout=600)
            assert outcome.code == 0, outcome.err
            (folder / "demo.json").write_text(outcome.out)
    mine = tmp_path_factory.mktemp("mine") / "demo"
    shutil.copytree(folder, mine)
    return mine / "greatctl-demo"
