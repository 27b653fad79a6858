"""`fetch` killed at random moments, and run again: the end state is that of an undisturbed run, byte for byte."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from greatctl import manifest
from greatctl.store import artifact
from tests.test_fetch import Bench, Mirror, leftovers, server  # noqa: F401  (a fixture)
from tests.test_fetch_kinds import FETCHED, ITEMS

# ruff: noqa: F811  (the fixture)


def project(folder: Path) -> Bench:
    bench = Bench(folder)
    bench.manifest = manifest.load(ITEMS)
    return bench


def killed(folder: Path, url: str, works: list[str], after: float) -> bool:
    """Fetch in a process of its own and kill it after so many seconds; True if it had not ended by then."""
    child = os.fork()
    if child == 0:
        try:
            project(folder).run(source=works, mirror=url)
        finally:
            os._exit(0)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def trials(count: int, tmp_path: Path, url: str, works: list[str]) -> int:
    """`count` times: two kills, then a run to the end, compared with an undisturbed one. Returns the kills that hit."""
    begin = time.monotonic()
    whole = project(tmp_path / "whole")
    whole.run(source=works, mirror=url)
    seconds, wanted = time.monotonic() - begin, whole.bytes()
    chance, hits = random.Random(count), 0
    for trial in range(count):
        folder = tmp_path / f"trial-{trial}"
        folder.mkdir()
        hits += killed(folder, url, works, chance.uniform(0, seconds))
        hits += killed(folder, url, works, chance.uniform(0, 0.7 * seconds))
        bench = project(folder)
        assert bench.run(source=works, mirror=url).exit_code == 0
        left = {path: sha for path, sha in bench.bytes().items() if not path.endswith(".holder")}
        assert left == wanted, f"trial {trial}"  # (a lock's last holder may still be named)
        assert leftovers(folder) == [], f"trial {trial}"
    return hits


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The versions of installed packages take longer to look up than all the rest; every run here has the same."""
    monkeypatch.setattr(artifact, "versions", dict)


def test_killed_a_few_times_the_end_state_is_byte_identical(tmp_path: Path, server: Mirror) -> None:
    server.reset()
    assert trials(3, tmp_path, server.url, ["wealth-scan", "troubled-world"]) >= 1


@pytest.mark.slow
def test_killed_fifty_times_the_end_state_is_byte_identical(tmp_path: Path, server: Mirror) -> None:
    server.reset()
    assert trials(50, tmp_path, server.url, FETCHED) >= 50
