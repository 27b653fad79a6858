"""One process per artifact.

The lock is the kernel's (flock), so a killed process never leaves a stale one. A second process is refused at once and
told who holds it. The holder's name lies in a file of its own, since opening a lock file empties it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import LockedError, ResourceError
from .files import disk_errors, make_dir

__all__ = ["hold"]


@contextmanager
def hold(target: Path, *, required: bool = False) -> Iterator[None]:
    """Hold the lock of the artifact folder `target` (`.NAME.lock` beside it) for the length of the block.

    Args:
        required: refuse where the file system has no locks (parallel workers); otherwise go on without one, which
            `greatctl doctor` warns about.

    Raises:
        LockedError: another process holds it; names pid, host, start and command.
        ResourceError: `required`, and the file system has no locks.
    """
    make_dir(target.parent)
    lock = FileLock(target.parent / f".{target.name}.lock", timeout=0)
    holder = target.parent / f".{target.name}.holder"
    try:
        with disk_errors(target):
            lock.acquire()
    except Timeout:
        raise _refusal(target, holder) from None
    except NotImplementedError as error:
        if required:
            raise ResourceError(
                f"the file system of {target.parent} has no locks",
                why=str(error),
                fix="run without --worker, or put the data on a local disk with --data-dir",
                where=str(target.parent),
                code="no-locks",
            ) from error
    try:
        with disk_errors(holder):
            holder.write_text(json.dumps(_myself()))
        yield
    finally:
        try:
            with suppress(OSError):  # only a name for people; a disk that cannot be written has been reported already
                holder.unlink(missing_ok=True)
        finally:
            lock.release()


def _myself() -> dict[str, object]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["greatctl", *sys.argv[1:]]),
    }


def _refusal(target: Path, holder: Path) -> LockedError:
    try:
        who = json.loads(holder.read_text())
        why = "process {pid} on {host} has worked on it since {since}: {command}".format(**who)
    except (OSError, ValueError, KeyError):
        why = "another process works on it"
    return LockedError(
        f"{target} is in use", why=why, fix="wait for it to end, then run the same command again", where=str(target)
    )
