"""Files that are either whole or not there.

Everything is written under a partial name, flushed to the disk, renamed, and the folder flushed as well; so a crash at
any instant leaves the old file or the new one, never half of one. A full disk becomes a `ResourceError` that says how
much was needed and how much is free.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ManifestError, ResourceError

__all__ = [
    "PARTIAL",
    "canonical_json",
    "disk_errors",
    "free_bytes",
    "fsync_dir",
    "make_dir",
    "read_bytes",
    "sha256_bytes",
    "sha256_file",
    "sweep",
    "write_bytes",
    "write_json",
    "write_text",
]

PARTIAL = ".partial"
_UNUSABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.EXDEV,  # a folder and its parent on two disks: nothing can be renamed into place
    errno.EBUSY,  # a mount point is in the way
)
_LARGEST_RECORD = 32 * 2**20


def canonical_json(value: object, *, indent: int | None = None) -> str:
    """JSON with sorted keys and no NaN: the same value gives the same bytes on every machine.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    separators = (",", ":") if indent is None else (",", ": ")
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, indent=indent, separators=separators)


def sha256_bytes(data: bytes) -> str:
    """Hex sha256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def free_bytes(path: Path) -> int:
    """Bytes free on the disk that holds `path` (or its nearest existing parent)."""
    probe = path
    while not probe.exists():
        probe = probe.parent
    return shutil.disk_usage(probe).free


@contextmanager
def disk_errors(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn the operating system's disk errors into errors that say what to do.

    Raises:
        ResourceError: no space, no inodes, quota, read-only or I/O error.
        ManifestError: the path itself cannot be used (no permission, too long, a file where a folder should be, a
            mount point where a folder should be renamed).
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = free_bytes(path.parent)
            need = f"{needed:,} bytes needed, " if needed else ""
            entries, left = _inodes(path.parent)
            full = ", but no entries (inodes) for new files" if entries and not left else ""
            raise ResourceError(
                f"the disk is full: could not write {path}",
                why=f"{need}{free:,} bytes free{full}",
                fix="free some space, or move the folders with --data-dir / --results-dir; then run the same command again",
                where=str(path),
                code="disk-full",
            ) from error
        if error.errno in (errno.EROFS, errno.EIO):
            raise ResourceError(
                f"could not write {path}",
                why=os.strerror(error.errno),
                fix="choose a writable disk with --data-dir / --results-dir",
                where=str(path),
                code="disk-unwritable",
            ) from error
        if error.errno in _UNUSABLE:
            raise ManifestError(
                f"could not write {path}",
                why=os.strerror(error.errno),
                fix="choose a folder that you may write to, with --data-dir / --results-dir",
                where=str(path),
                code="path-unusable",
            ) from error
        raise


def _inodes(folder: Path) -> tuple[int, int]:
    """(all, free) file entries of the disk of `folder`; (0, 0) where the file system does not count them."""
    while not folder.exists():
        folder = folder.parent
    disk = os.statvfs(folder)
    return disk.f_files, disk.f_favail


def fsync_dir(folder: Path) -> None:
    """Flush a folder's entries, so that a rename in it survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_bytes(path: Path, most: int = _LARGEST_RECORD) -> bytes:
    """A record of ours, whole.

    Raises:
        ValueError: it is larger than `most` bytes, so it is no record of ours; the rest is not read.
    """
    with path.open("rb") as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path} is larger than {most:,} bytes")
    return data


def make_dir(folder: Path) -> Path:
    """Create a folder and its parents, with greatctl's errors; returns it."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file atomically and durably."""
    make_dir(path.parent)
    partial = path.with_name(path.name + PARTIAL)
    with disk_errors(path, len(data)):
        try:
            with partial.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        fsync_dir(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically; line ends stay as given."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: object) -> None:
    """Write indented canonical JSON atomically, with a final newline."""
    write_text(path, canonical_json(value, indent=1) + "\n")


def sweep(folder: Path) -> list[Path]:
    """Remove what a killed process left in `folder` (partial files, stray temporaries); returns what was removed."""
    if not folder.is_dir():
        return []
    stray = [p for p in folder.iterdir() if p.is_file() and (p.name.endswith(PARTIAL) or p.name.startswith(".tmp"))]
    with disk_errors(folder):
        for path in stray:
            path.unlink(missing_ok=True)
    return stray
