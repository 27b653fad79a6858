"""Several processes on one harvest, each with its own shards.

    greatctl harvest --worker 1/2 &  greatctl harvest --worker 2/2 &  wait;  greatctl harvest

Worker I of N makes the shards whose number leaves the rest I - 1 on division by N, in a folder of its own. The plain command
afterwards takes over what the workers left, finished or killed, makes what is still missing, and seals. A shard has the
same bytes whoever makes it, so the result does not depend on how many there were.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from ..store.artifact import Identity
from ..store.files import disk_errors, make_dir
from ..store.lock import hold
from ..store.shards import ShardWriter
from ..store.swap import note, wanted

__all__ = ["Share", "adopt", "worker_folder"]


@dataclass(frozen=True)
class Share:
    """Worker `number` (from 1) of `of`."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str | None) -> Share | None:
        """Read "I/N".

        Raises:
            UsageError: it is not of that form, or I is not in 1..N.
        """
        if text is None:
            return None
        match = re.fullmatch(r"(\d{1,4})/(\d{1,4})", text)
        share = cls(int(match[1]), int(match[2])) if match else None
        if share is None or not 1 <= share.number <= share.of:
            raise UsageError(
                f"{text!r} is not a worker", why="it is I/N, with I from 1 to N", fix="--worker 1/4 to --worker 4/4"
            )
        return share

    def has(self, shard: int) -> bool:
        """Whether this worker makes the shard."""
        return shard % self.of == self.number - 1


@contextmanager
def worker_folder(final: Path, identity: Identity, share: Share, *, fresh: bool = False) -> Iterator[Path]:
    """The locked folder of one worker of `final`, emptied if `fresh` or if it was made for another identity.

    Raises:
        LockedError: the same worker runs already. ResourceError: the file system has no locks.
    """
    folder = final.with_name(f".{final.name}.worker-{share.number}-of-{share.of}")
    with hold(folder, required=True):
        with disk_errors(folder):
            if folder.exists() and (fresh or wanted(folder) != identity.fingerprint):
                shutil.rmtree(folder)
            make_dir(folder)
            note(folder, identity.fingerprint)
        yield folder


def adopt(final: Path, identity: Identity, writer: ShardWriter) -> int:
    """Take over the shards that workers of the same identity left, and remove their folders; returns how many.

    The lock files stay: another process may wait on one, and would share its lock with nobody.

    Raises:
        LockedError: a worker is still running.
    """
    taken = 0
    for folder in sorted(final.parent.glob(f".{final.name}.worker-*-of-*")):
        if not folder.is_dir():
            continue
        with hold(folder), disk_errors(folder):
            if wanted(folder) == identity.fingerprint:
                taken += writer.take(ShardWriter(folder))
            shutil.rmtree(folder)
    return taken
