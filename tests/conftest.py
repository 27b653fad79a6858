"""Fixtures that several test files share. Nothing here touches a network beyond loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

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
    """The demonstration project, run once for the whole session. Tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("demo")
    outcome = run_greatctl("demo", "greatctl-demo", "--json", cwd=folder)
    assert outcome.code == 0, outcome.err
    (folder / "demo.json").write_text(outcome.out)
    return folder / "greatctl-demo"
