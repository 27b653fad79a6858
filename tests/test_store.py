"""Sealed artifacts, shards, locks and atomic files: whole or not there, whatever happens."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from greatctl.errors import InputError, IntegrityError, LockedError, ManifestError, ResourceError
from greatctl.store import artifact, files
from greatctl.store.artifact import Identity, current, load, newest, sealed_under, touch, work
from greatctl.store.lock import hold
from greatctl.store.shards import INDEX, ShardReader, ShardWriter
from greatctl.store.tables import read_columns, write_table

ROOT = Path(__file__).resolve().parents[1]
IDENTITY = Identity("harvest", {"k": 64, "seed": 0}, {"tokens": "abc"})


def _shard(number: int) -> dict[str, torch.Tensor]:
    return {"acts": torch.full((4, 3), float(number)), "window": torch.arange(4)}


def _make(final: Path, shards: int = 3, identity: Identity = IDENTITY) -> None:
    with work(final, identity) as w:
        writer = ShardWriter(w.path)
        for n in range(shards):
            if n not in writer:
                writer.write(n, _shard(n), 4)
        writer.finish()
        w.seal({"rows": 4 * shards}, hashes=writer.hashes(), seconds=time.time())


def _bytes(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "run.json"}


def _flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def test_sealed_artifact_is_up_to_date_and_the_first_difference_is_named(tmp_path: Path) -> None:
    final = tmp_path / "a"
    assert current(final, IDENTITY) == (None, "not made yet")
    _make(final)
    found, reason = current(final, IDENTITY)
    assert found is not None and reason == ""
    assert current(final, Identity("harvest", {"k": 32, "seed": 0}, {"tokens": "abc"}))[1] == "config.k 64 -> 32"
    assert current(final, Identity("harvest", {"k": 64, "seed": 0}, {"tokens": "x"}))[1] == "inputs.tokens changed"


def test_same_work_gives_same_bytes_and_fingerprints_ignore_place_and_time(tmp_path: Path) -> None:
    _make(tmp_path / "here" / "a")
    _make(tmp_path / "there" / "a")
    assert _bytes(tmp_path / "here" / "a") == _bytes(tmp_path / "there" / "a")


def test_copied_and_touched_project_stays_up_to_date(tmp_path: Path) -> None:
    _make(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    for path in (tmp_path / "copy").iterdir():
        os.utime(path, (4e9, 4e9))  # a clock in the future
    assert current(tmp_path / "copy", IDENTITY)[0] is not None


def test_copied_project_is_hashed_once_and_a_flip_after_that_is_still_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _make(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    hashed: list[Path] = []
    real = artifact.sha256_file
    monkeypatch.setattr(artifact, "sha256_file", lambda path: (hashed.append(path), real(path))[1])
    for expected in (4, 4):  # three shards and the index, the first time only
        assert current(tmp_path / "copy", IDENTITY)[0] is not None
        assert len(hashed) == expected
    path = tmp_path / "copy" / "shard-00000.safetensors"
    stat = path.stat()
    time.sleep(0.02)  # the file system's clock ticks in hundredths of a second
    _flip(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert load(tmp_path / "copy").damaged() == ["shard-00000.safetensors (content differs from its sha256)"]


def test_damage_in_a_copy_is_not_noted_as_sound(tmp_path: Path) -> None:
    _make(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    _flip(tmp_path / "copy" / "shard-00000.safetensors")
    before = (tmp_path / "copy" / "run.json").read_bytes()
    for _ in range(2):
        assert load(tmp_path / "copy").damaged()
    assert (tmp_path / "copy" / "run.json").read_bytes() == before


def test_project_on_a_read_only_disk_can_be_read_and_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    files.write_json(tmp_path / "copy" / "work.json", {"fingerprint": IDENTITY.fingerprint, "discard": []})
    for name in ("fsync", "unlink", "replace"):
        monkeypatch.setattr(os, name, _failing(errno.EROFS))
    found = current(tmp_path / "copy", IDENTITY)[0]
    assert found is not None
    touch(found)


@pytest.mark.parametrize("name", ["shard-00001.safetensors", INDEX])
def test_one_flipped_bit_is_found_and_refused(tmp_path: Path, name: str) -> None:
    _make(tmp_path / "a")
    _flip(tmp_path / "a" / name)
    with pytest.raises(IntegrityError, match=name):
        load(tmp_path / "a").check()


def test_flip_is_found_even_when_size_and_times_are_put_back(tmp_path: Path) -> None:
    _make(tmp_path / "a")
    path = tmp_path / "a" / "shard-00000.safetensors"
    stat = path.stat()
    _flip(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert load(tmp_path / "a").damaged()


@pytest.mark.parametrize("at", [0, 40, 200, -2])
def test_flip_in_the_record_itself_is_found(tmp_path: Path, at: int) -> None:
    _make(tmp_path / "a")
    _flip(tmp_path / "a" / "artifact.json", at)
    with pytest.raises(IntegrityError, match=r"artifact\.json"):
        load(tmp_path / "a")


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", "null", '{"schema": NaN}', "{" * 5000, '{"digest": 3, "schema": 1}', "\x00\xff"]
)
def test_record_edited_by_hand_is_refused(tmp_path: Path, content: str) -> None:
    _make(tmp_path / "a")
    (tmp_path / "a" / "artifact.json").write_text(content)
    with pytest.raises(IntegrityError):
        load(tmp_path / "a")


def test_enormous_record_is_refused_without_being_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make(tmp_path / "a")
    for name in ("artifact.json", "run.json"):
        with (tmp_path / "a" / name).open("r+b") as stream:
            stream.truncate(100_000_000)
    real = json.loads

    def small_only(text: bytes) -> object:
        assert len(text) < 1_000_000
        return real(text)

    monkeypatch.setattr(json, "loads", small_only)
    with pytest.raises(IntegrityError, match=r"artifact\.json"):
        load(tmp_path / "a")
    assert sealed_under(tmp_path) == []
    _make(tmp_path / "b")  # and its run.json does not disturb a neighbour


def test_newer_schema_asks_for_an_upgrade(tmp_path: Path) -> None:
    _make(tmp_path / "a")
    path = tmp_path / "a" / "artifact.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))
    with pytest.raises(InputError, match="newer"):
        load(tmp_path / "a")


@pytest.mark.parametrize("harm", ["truncate", "delete", "empty", "swap"])
def test_harmed_shard_is_redone_alone(tmp_path: Path, harm: str) -> None:
    final = tmp_path / "a"
    _make(final)
    before = _bytes(final)
    target = final / "shard-00001.safetensors"
    if harm == "truncate":
        target.write_bytes(target.read_bytes()[:-9])
    elif harm == "delete":
        target.unlink()
    elif harm == "empty":
        target.write_bytes(b"")
    else:
        target.write_bytes((final / "shard-00002.safetensors").read_bytes())
    assert current(final, IDENTITY)[0] is None
    with work(final, IDENTITY) as w:
        writer = ShardWriter(w.path)
        assert [n in writer for n in range(3)] == [True, False, True]
        writer.write(1, _shard(1), 4)
        writer.finish()
        w.seal({"rows": 12}, hashes=writer.hashes())
    assert _bytes(final) == before


@pytest.mark.parametrize("harm", ["torn", "duplicate", "garbage", "gone"])
def test_index_recovers_to_its_good_lines(tmp_path: Path, harm: str) -> None:
    writer = ShardWriter(tmp_path)
    for n in range(3):
        writer.write(n, _shard(n), 4)
    path = tmp_path / INDEX
    lines = path.read_bytes().splitlines(keepends=True)
    bad = {"torn": [*lines[:2], lines[2][:20]], "duplicate": [*lines, lines[0]], "garbage": [*lines, b"\xff\x00\n"]}
    path.unlink() if harm == "gone" else path.write_bytes(b"".join(bad[harm]))
    again = ShardWriter(tmp_path)
    kept = [n for n in range(3) if n in again]
    assert kept == {"torn": [0, 1], "duplicate": [0, 1, 2], "garbage": [0, 1, 2], "gone": []}[harm]
    for n in range(3):
        if n not in again:
            again.write(n, _shard(n), 4)
    again.finish()
    assert path.read_bytes() == b"".join(lines)


def test_reader_refuses_an_index_with_a_hole(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    writer.write(0, _shard(0), 4)
    writer.write(2, _shard(2), 4)
    with pytest.raises(IntegrityError, match="every shard"):
        ShardReader(tmp_path)


_WORKER = """
import sys, time, torch
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.test_store import IDENTITY, _shard
from greatctl.store.artifact import work
from greatctl.store.shards import ShardWriter
final = Path(sys.argv[1])
with work(final, IDENTITY) as w:
    writer = ShardWriter(w.path)
    for n in range(40):
        if n not in writer:
            writer.write(n, _shard(n), 4)
        print(n, flush=True)
        time.sleep(0.002)
    writer.finish()
    w.seal({{"rows": 160}}, hashes=writer.hashes())
"""


def _spawn(final: Path) -> subprocess.Popen[str]:
    code = _WORKER.format(root=str(ROOT))
    return subprocess.Popen([sys.executable, "-c", code, str(final)], stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_sigkill_at_many_points_ends_with_the_bytes_of_an_undisturbed_run(tmp_path: Path) -> None:
    _make(tmp_path / "calm" / "a", shards=40)
    for kill_after in (0, 3, 17, 38):
        process = _spawn(tmp_path / "killed" / "a")
        for _ in range(kill_after):
            assert process.stdout is not None and process.stdout.readline()
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()
    _make(tmp_path / "killed" / "a", shards=40)
    calm, killed = _bytes(tmp_path / "calm" / "a"), _bytes(tmp_path / "killed" / "a")
    assert calm == killed
    stray = [p.name for p in (tmp_path / "killed").rglob("*") if ".partial" in p.name or p.name.startswith(".tmp")]
    assert stray == []


def test_stray_temporaries_of_a_killed_writer_are_swept(tmp_path: Path) -> None:
    (tmp_path / ".tmpAbC123").write_bytes(b"x" * 100)
    (tmp_path / "shard-00000.safetensors.partial").write_bytes(b"x")
    ShardWriter(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [INDEX]


@pytest.mark.parametrize("point", ["before", "between"])
def test_kill_around_the_final_swap_loses_nothing(tmp_path: Path, point: str) -> None:
    final, newer = tmp_path / "a", Identity("harvest", {"k": 1, "seed": 0}, {"tokens": "abc"})
    _make(final)
    _make(tmp_path / "b", identity=newer)
    (tmp_path / "b").rename(tmp_path / ".a.partial")
    if point == "between":
        final.rename(tmp_path / ".a.old")
    with work(final, newer) as w:
        assert w.resumed
        assert all(n in ShardWriter(w.path) for n in range(3))
    assert not (tmp_path / ".a.old").exists()


def test_an_artifact_that_was_sealed_but_not_yet_in_place_is_put_there_before_other_work(tmp_path: Path) -> None:
    final, newer = tmp_path / "a", Identity("harvest", {"k": 1, "seed": 0}, {"tokens": "abc"})
    _make(final)
    _make(tmp_path / "b", identity=newer)
    (tmp_path / "b").rename(tmp_path / ".a.partial")
    with work(final, IDENTITY) as w:
        assert not w.resumed
        assert current(final, newer)[0] is not None


def test_second_process_is_told_who_holds_the_lock_and_a_killed_holder_frees_it(tmp_path: Path) -> None:
    code = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\nfrom greatctl.store.lock import hold\n"
        "with hold(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(LockedError) as refused, hold(tmp_path / "a"):
        pass
    assert f"process {holder.pid} on" in refused.value.why and refused.value.exit_code == 10
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    with hold(tmp_path / "a"):
        assert (tmp_path / ".a.holder").exists()


def test_newest_is_what_was_made_or_asked_for_last_whatever_the_clock_says(tmp_path: Path) -> None:
    for name in ("b", "a"):
        _make(tmp_path / name)
    os.utime(tmp_path / "a" / "artifact.json", (1, 1))
    found = newest(tmp_path, "harvest")
    assert found is not None and found.path.name == "a"
    touch(load(tmp_path / "b"))
    assert [x.path.name for x in sealed_under(tmp_path)] == ["a", "b"]
    assert newest(tmp_path, "train") is None


def test_newest_is_right_across_models_copies_and_lost_notes(tmp_path: Path) -> None:
    root = tmp_path / "data" / "activations"
    for name in ("big/x", "small/y", "big/z", "small/w"):
        _make(root / name)
    assert [a.path.name for a in sealed_under(root)] == ["x", "y", "z", "w"]
    touch(load(root / "big" / "x"))
    found = newest(root, "harvest")
    assert found is not None and found.path.name == "x"
    shutil.copytree(root, tmp_path / "elsewhere" / "activations")
    root = tmp_path / "elsewhere" / "activations"
    touch(load(root / "small" / "y"))
    assert [a.path.name for a in sealed_under(root)] == ["z", "w", "x", "y"]
    (root / "small" / "y" / "run.json").unlink()
    (root / "small" / "w" / "run.json").write_text('{"sequence": "many"}')
    assert [a.path.name for a in sealed_under(root)] == ["w", "y", "z", "x"]
    touch(load(root / "small" / "w"))
    found = newest(root, "harvest")
    assert found is not None and found.path.name == "w"


def _failing(number: int) -> Callable[..., None]:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def _failing_fsync(number: int) -> Callable[[int], None]:
    def fail(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.ENOSPC, ResourceError),
        (errno.EDQUOT, ResourceError),
        (errno.EROFS, ResourceError),
        (errno.EACCES, ManifestError),
        (errno.ENAMETOOLONG, ManifestError),
    ],
)
def test_disk_errors_leave_the_old_file_and_no_partial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type
) -> None:
    files.write_text(tmp_path / "x", "old")
    monkeypatch.setattr(files.os, "fsync", _failing_fsync(number))
    with pytest.raises(error) as raised:
        files.write_text(tmp_path / "x", "new")
    assert raised.value.fix
    assert (tmp_path / "x").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(
    ("number", "error", "exit_code"), [(errno.ENOSPC, ResourceError, 9), (errno.EXDEV, ManifestError, 3)]
)
@pytest.mark.parametrize("step", ["seal", "settle", "reopen", "take"])
def test_rename_that_fails_is_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int, error: type, exit_code: int
) -> None:
    final = tmp_path / "a"
    _make(final)
    if step == "settle":
        final.rename(tmp_path / ".a.old")
    if step == "reopen":
        (final / INDEX).unlink()
    with pytest.raises(error) as raised:
        if step == "take":
            here, there = ShardWriter(tmp_path / "here"), ShardWriter(tmp_path / "there")
            there.write(0, _shard(0), 4)
            monkeypatch.setattr(here, "_rewrite", lambda: None)
            monkeypatch.setattr(os, "replace", _failing(number))
            here.take(there)
        else:
            monkeypatch.setattr(os, "rename", _failing(number))
            _make(final, identity=Identity("harvest", {"k": 1}) if step == "seal" else IDENTITY)
    assert raised.value.exit_code == exit_code and raised.value.fix


def test_full_disk_at_the_holder_is_told_and_frees_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", _failing(errno.ENOSPC))
        with pytest.raises(ResourceError, match="disk is full"), hold(tmp_path / "a"):
            pass
    with hold(tmp_path / "a"):
        assert (tmp_path / ".a.holder").exists()


@pytest.mark.parametrize(("total", "left", "said"), [(1000, 0, True), (1000, 5, False), (0, 0, False)])
def test_disk_without_inodes_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, total: int, left: int, said: bool
) -> None:
    monkeypatch.setattr(files, "_inodes", lambda folder: (total, left))
    with pytest.raises(ResourceError) as raised, files.disk_errors(tmp_path / "x"):
        raise OSError(errno.ENOSPC, "full")
    assert ("inodes" in raised.value.why) is said and raised.value.exit_code == 9


def test_full_disk_during_a_shard_is_resumable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError), work(tmp_path / "a", IDENTITY) as w:
        writer = ShardWriter(w.path)
        writer.write(0, _shard(0), 4)
        with monkeypatch.context() as patch:
            patch.setattr(files.os, "fsync", _failing_fsync(errno.ENOSPC))
            writer.write(1, _shard(1), 4)
    assert not (tmp_path / "a").exists()
    with work(tmp_path / "a", IDENTITY) as w:
        assert w.resumed and 0 in ShardWriter(w.path)


def test_data_folder_that_is_a_symbolic_link_works(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    _make(tmp_path / "data" / "a")
    assert load(tmp_path / "disk" / "a").damaged(deep=True) == []


def test_file_where_a_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(ManifestError, match="data"):
        _make(tmp_path / "data" / "a")


def test_canonical_json_refuses_nan() -> None:
    with pytest.raises(ValueError, match="JSON"):
        files.canonical_json({"x": float("nan")})


def test_tables_have_the_same_bytes_for_the_same_rows_and_damage_is_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_table(tmp_path / name, {"x": [1, 2], "word": ["é", None]})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert read_columns(tmp_path / "a")["word"] == ["é", None]
    (tmp_path / "a").write_bytes(b"PAR1 no")
    with pytest.raises(IntegrityError, match="readable table"):
        read_columns(tmp_path / "a")
