"""Parallel harvest workers: any number of them gives the bytes of a single run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from greatctl.errors import LockedError, ResourceError, UsageError
from greatctl.stages import harvest
from greatctl.stages.context import Project
from greatctl.stages.workers import Share
from greatctl.store import lock, shards
from greatctl.store.lock import hold
from tests.test_harvest import SITE, config, outputs, tokenized, uneven
from tests.tiny_llama import context, save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    save_tiny(path)
    return path


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Mapping[str, bytes]:
    project = tokenized(tmp_path_factory.mktemp("single"), folder)
    harvest.run(context(project), config())
    return outputs(project)


def _left_over(project: Project) -> list[str]:
    """Folders of work; lock files stay, since another process may hold or await one."""
    return [p.name for p in (project.activations / "tiny").iterdir() if p.name.startswith(".") and p.is_dir()]


def test_two_workers_and_a_sealing_run_give_the_bytes_of_one(
    tmp_path: Path, folder: Path, single: Mapping[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tokenized(tmp_path, folder)
    for worker in ("2/2", "1/2"):
        result = harvest.run(context(project), config(worker=worker))
        assert result.artifact is None and result.summary["worker"] == worker
    monkeypatch.setattr(harvest, "_open", lambda *a: pytest.fail("every shard was there, so no model is needed"))
    harvest.run(context(project), config())
    assert outputs(project) == single
    assert _left_over(project) == []


def test_three_workers_give_the_bytes_of_one_on_windows_of_uneven_length(tmp_path: Path, folder: Path) -> None:
    alone, shared = uneven(tmp_path / "alone", folder), uneven(tmp_path / "shared", folder)
    harvest.run(context(alone), config())
    for worker in ("3/3", "1/3", "2/3"):
        harvest.run(context(shared), config(worker=worker))
    harvest.run(context(shared), config())
    assert outputs(shared) == outputs(alone)


def test_a_killed_worker_is_taken_over_by_a_single_run(
    tmp_path: Path, folder: Path, single: Mapping[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tokenized(tmp_path, folder)
    harvest.run(context(project), config(worker="1/2"))
    write, written = shards.ShardWriter.write, []

    def dies(self: Any, number: int, *rest: Any) -> Any:
        if written:
            raise KeyboardInterrupt
        written.append(number)
        return write(self, number, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards.ShardWriter, "write", dies)
        harvest.run(context(project), config(worker="2/2"))
    assert len(written) == 1
    harvest.run(context(project), config())
    assert outputs(project) == single
    assert _left_over(project) == []


def test_shards_of_another_configuration_are_not_taken(
    tmp_path: Path, folder: Path, single: Mapping[str, bytes]
) -> None:
    project = tokenized(tmp_path, folder)
    harvest.run(context(project), config(worker="1/2", batch_size=2))
    harvest.run(context(project), config())
    assert outputs(project) == single


def test_a_running_worker_is_not_robbed(tmp_path: Path, folder: Path) -> None:
    project = tokenized(tmp_path, folder)
    harvest.run(context(project), config(worker="1/2"))
    running = project.activations / "tiny" / f".{SITE}.worker-1-of-2"
    with hold(running), pytest.raises(LockedError):
        harvest.run(context(project), config())


def test_workers_are_refused_where_the_file_system_has_no_locks(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tokenized(tmp_path, folder)

    def no_flock(self: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(lock.FileLock, "acquire", no_flock)
    with pytest.raises(ResourceError, match="no locks"):
        harvest.run(context(project), config(worker="1/2"))
    assert harvest.run(context(project), config()).artifact is not None  # alone, it goes on without one


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(folder, number) of every shard that is written from now on."""
    written: list[tuple[str, int]] = []
    write = shards.ShardWriter.write

    def counts(self: Any, number: int, *rest: Any) -> Any:
        written.append((self.folder.name, number))
        return write(self, number, *rest)

    monkeypatch.setattr(shards.ShardWriter, "write", counts)
    return written


def test_a_bad_share_is_refused_even_when_everything_is_up_to_date(tmp_path: Path, folder: Path) -> None:
    project = tokenized(tmp_path, folder)
    harvest.run(context(project), config())
    for command in (harvest.run, harvest.plan):
        with pytest.raises(UsageError, match="not a worker"):
            command(context(project), config(worker="3/2"))
    assert harvest.run(context(project), config(worker="1/2")).up_to_date


def test_forced_workers_make_their_shards_again_and_a_forced_run_seals_them(
    tmp_path: Path, folder: Path, single: Mapping[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tokenized(tmp_path, folder)
    harvest.run(context(project), config())
    written = _counted(monkeypatch)
    for worker in ("1/2", "1/2", "2/2"):
        harvest.run(context(project, force=True), config(worker=worker))
    n = len(single) - 3  # besides the shards: index, meta and stats
    assert len(written) == n + (n + 1) // 2  # the first share twice
    monkeypatch.setattr(harvest, "_open", lambda *a: pytest.fail("every shard was there, so no model is needed"))
    assert not harvest.run(context(project, force=True), config()).up_to_date
    assert outputs(project) == single and _left_over(project) == []


def test_a_worker_makes_only_the_hook_points_that_are_not_up_to_date(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, other = tokenized(tmp_path, folder), "blocks.0.hook_resid_post"
    harvest.run(context(project), config())
    written = _counted(monkeypatch)
    both = config(hook_point=[SITE, other], worker="1/1")
    assert harvest.run(context(project), both).summary["hook_point"] == other
    assert {name for name, _ in written} == {f".{other}.worker-1-of-1"}
    harvest.run(context(project), config(hook_point=[SITE, other]))
    assert _left_over(project) == []


def test_lock_files_stay_so_that_two_processes_never_hold_one_each(tmp_path: Path, folder: Path) -> None:
    project = tokenized(tmp_path, folder)
    harvest.run(context(project), config(worker="1/2"))
    path = project.activations / "tiny" / f"..{SITE}.worker-1-of-2.lock"
    inode = path.stat().st_ino
    harvest.run(context(project), config())
    assert path.stat().st_ino == inode


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2", "1/2/3"])
def test_a_worker_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a worker"):
        Share.parse(text)
