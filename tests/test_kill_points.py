"""A kill at any point of making, sealing, replacing and repairing loses no finished work and changes no byte.

The kill is simulated below everything else: from the n-th call on, the operating system's own write primitives do
nothing but raise, as they do in a process that is no more. Every n is tried, then many at random, twice in a row.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from planted import dictionary, planted, project

from greatctl.errors import GreatctlError
from greatctl.events import Event
from greatctl.patching.sweep import Sweep
from greatctl.stages import patch
from greatctl.store import artifact
from greatctl.store.artifact import Identity, current, load, work
from greatctl.store.files import write_bytes
from greatctl.store.shards import ShardWriter
from tests import test_patch_stage as patches
from tests import test_train as training

IDENTITY = Identity("harvest", {"k": 64})
OLDER = Identity("harvest", {"k": 32})
SHARDS = 3
SEALED = {"a", ".a.lock", ".a.holder"}  # the holder's name is left where the kill is the very last thing
PRIMITIVES = ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync")


class Killed(BaseException):
    """The process is no more."""


@contextmanager
def killed_at(n: int, die: Callable[[], None] | None = None) -> Iterator[list[int]]:
    """Nothing is written any more from the n-th primitive on; yields the count of calls, in a list."""
    calls = [0]

    def guard(real: Callable) -> Callable:
        def primitive(*args, **kwargs):
            calls[0] += 1
            if calls[0] >= n:
                if die:
                    die()
                raise Killed
            return real(*args, **kwargs)

        return primitive

    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in PRIMITIVES:
            monkeypatch.setattr(os, name, guard(getattr(os, name)))
        yield calls


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: these tests are thousands of renames."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing matters to a power cut, not to a kill; that and the packages' versions take longer than all the rest."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(artifact, "versions", dict)


def make(final: Path, identity: Identity = IDENTITY, *, fresh: bool = False, done: list | None = None) -> None:
    """A small stage: something costly in a folder that is no output, three shards, a table; `done` is what was made."""
    done = [] if done is None else done
    if current(final, identity)[0] and not fresh:
        return
    with work(final, identity, fresh=fresh) as w:
        costly = w.path / "scratch" / "state"
        if not costly.exists():
            write_bytes(costly, b"costly")
            done.append("scratch")
        writer = ShardWriter(w.path)
        for n in range(SHARDS):
            if n not in writer:
                writer.write(n, {"acts": torch.full((2, 2), float(n))}, 2)
                done.append(n)
        writer.finish()
        write_bytes(w.path / "table", str(identity.config["k"]).encode())
        w.seal({"rows": 6}, hashes=writer.hashes(), discard=("scratch",))


def contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "run.json")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


@pytest.fixture
def calm(tmp_path: Path) -> dict[str, bytes]:
    """What an undisturbed run makes."""
    make(tmp_path / "calm" / "a")
    assert set(contents(tmp_path / "calm" / "a")) == {
        *(f"shard-{n:05d}.safetensors" for n in range(SHARDS)),
        "index.jsonl",
        "table",
        "artifact.json",
    }
    return contents(tmp_path / "calm" / "a")


def begin(final: Path, before: str) -> None:
    """What lies at `final` before the run that is killed."""
    if before == "replaced":
        make(final, OLDER)
    elif before != "new":
        make(final)
    if before == "repaired":
        (final / "shard-00001.safetensors").write_bytes(b"")


def finish(final: Path, calm: dict[str, bytes], done: list) -> None:
    """Rerun to the end, and see that it is as if nothing had happened."""
    make(final, done=done)
    assert contents(final) == calm
    assert len(done) == len(set(done)), f"made twice: {done}"
    assert {p.name for p in final.parent.iterdir()} <= SEALED
    assert load(final).damaged(deep=True) == []


def attempt(final: Path, n: int, done: list) -> bool:
    """Run until primitive n; whether it was killed there."""
    try:
        with killed_at(n):
            make(final, done=done)
    except Killed:
        return True
    return False


def whole_artifact_left(final: Path) -> bool:
    """Whether an intact artifact, of this identity or the older one, is where a person or `settle` finds it."""
    for folder in (final, final.with_name(".a.old"), final.with_name(".a.partial")):
        try:
            if load(folder).damaged(deep=True) == []:
                return True
        except GreatctlError:
            continue
    return False


@pytest.mark.parametrize("before", ["new", "replaced", "repaired"])
def test_a_kill_at_every_single_point_loses_nothing(tmp_path: Path, calm: dict[str, bytes], before: str) -> None:
    for n in itertools.count(1):
        final, done = tmp_path / str(n) / "kind" / "a", []
        begin(final, before)
        if not attempt(final, n, done):
            break
        assert before != "replaced" or whole_artifact_left(final)
        finish(final, calm, done)
        assert before != "repaired" or set(done) <= {"scratch", 1}
    assert n > 40  # the points were really there


def test_two_hundred_random_kills_twice_in_a_row_lose_nothing(tmp_path: Path, calm: dict[str, bytes]) -> None:
    chance = random.Random(7)
    killed = 0
    for trial in range(200):
        final, done = tmp_path / str(trial) / "kind" / "a", []
        begin(final, chance.choice(["new", "replaced", "repaired"]))
        killed += sum(attempt(final, chance.randint(1, 60), done) for _ in range(2))
        finish(final, calm, done)
    assert killed > 200


def test_a_forced_run_that_is_killed_anywhere_ends_with_the_same_bytes(tmp_path: Path, calm: dict[str, bytes]) -> None:
    final = tmp_path / "a"
    make(final)
    for n in itertools.count(1):
        try:
            with killed_at(n):
                make(final, fresh=True)
            break
        except Killed:
            assert whole_artifact_left(final)
    assert contents(final) == calm and n > 40


def test_a_process_that_really_ends_loses_nothing(tmp_path: Path, calm: dict[str, bytes]) -> None:
    for n in range(1, 80, 6):
        final = tmp_path / str(n) / "a"
        child = os.fork()
        if child == 0:
            with killed_at(n, die=lambda: os._exit(9)):
                make(final)
            os._exit(0)
        os.waitpid(child, 0)
        make(final)
        assert contents(final) == calm
        assert {p.name for p in final.parent.iterdir()} <= SEALED


def test_shards_that_are_being_taken_over_are_never_lost(tmp_path: Path) -> None:
    for n in itertools.count(1):
        here, there = tmp_path / str(n) / "here", tmp_path / str(n) / "there"
        ShardWriter(here).write(0, {"acts": torch.zeros(2)}, 2)
        other = ShardWriter(there)
        for number in (1, 2, 3):
            other.write(number, {"acts": torch.full((2,), float(number))}, 2)
        try:
            with killed_at(n):
                ShardWriter(here).take(ShardWriter(there))
            break
        except Killed:
            again = ShardWriter(here)
            again.take(ShardWriter(there))
            assert all(number in again for number in range(4))
            assert all(number in ShardWriter(here) for number in range(4))
    assert n > 8


@pytest.mark.parametrize("leftover", [["scratch"], ["../b"], [".."], ["", "."], [3, None], "scratch", None])
def test_what_a_kill_left_in_a_sealed_folder_is_removed_and_nothing_outside(tmp_path: Path, leftover: object) -> None:
    final = tmp_path / "a"
    make(final)
    make(tmp_path / "b")
    for folder in (final / "scratch", tmp_path / "b" / "scratch"):
        folder.mkdir()
    artifact.write_json(final / "work.json", {"fingerprint": "x", "discard": leftover})
    assert current(final, IDENTITY)[0] is not None
    assert not (final / "work.json").exists()
    assert (final / "scratch").exists() == (leftover != ["scratch"])
    assert (tmp_path / "b" / "scratch").exists()


def _dies(*args: object) -> None:
    raise Killed


@pytest.mark.parametrize("point", ["write_text", "swap", "tidy"])
def test_a_kill_in_the_sealing_of_an_autoencoder_costs_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    project(tmp_path, planted(1000, dictionary(32, 16)))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "data").symlink_to(tmp_path / "data")
    straight, _ = training.run(tmp_path / "other")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(artifact, point, _dies)
        training.run(tmp_path)
    result, notices = training.run(tmp_path)
    assert result.up_to_date if point == "tidy" else any("resumed at step 30 of 30" in n for n in notices)
    assert result.artifact and straight.artifact
    assert training.contents(result.artifact) == training.contents(straight.artifact)


@pytest.mark.parametrize("point", ["write_text", "swap"])
def test_a_kill_in_the_sealing_of_a_sweep_costs_no_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    model = tmp_path / "model"
    patches.save_tiny(model, num_hidden_layers=2)
    pairs = patches.write_pairs(tmp_path / "count.toml", *patches.EQUAL)
    events: list[Event] = []
    ctx, again = patches.context(tmp_path / "p"), patches.context(tmp_path / "p", emit=events.append)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(artifact, point, _dies)
        patch.run(ctx, patches.config(model, pairs))
    monkeypatch.setattr(Sweep, "run", _dies)  # no batch is patched again
    result = patch.run(again, patches.config(model, pairs))
    progress = [e.data for e in events if e.kind == "progress"]
    assert progress[-1]["done"] == progress[-1]["total"] and len({data["already"] for data in progress}) == 1
    assert progress[0]["done"] == progress[0]["already"] != 0
    assert result.artifact and not (result.artifact / "units").exists()
    assert load(result.artifact).damaged(deep=True) == []
