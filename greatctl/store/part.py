"""A download that is not finished yet: the bytes, and beside them what is known of the file they belong to.

The note (`NAME.json`) is written before the first byte, so that bytes without a trustworthy note are never
continued.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .files import disk_errors, write_json

__all__ = ["Part"]


class Part:
    """The state of one download at `path`; anything left there for another `url` is dropped.

    Attributes:
        etag: the server's strong name for this version of the file; None = cannot be continued.
        total: bytes that the whole file has, where the server said so.
        chain: addresses that led to it.
        complete: all of it is here.
    """

    def __init__(self, path: Path, url: str) -> None:
        self.path = path
        self._note = path.with_name(path.name + ".json")
        self._url = url
        self.etag: str | None = None
        self.total: int | None = None
        self.chain: tuple[str, ...] = ()
        self.complete = False
        self.size = 0
        if not self._load():
            self.drop()

    def restart(self, etag: str | None, total: int | None, chain: Sequence[str]) -> None:
        """Forget the bytes, and note the file that now comes."""
        self.drop()
        strong = etag if etag and not etag.startswith("W/") else None
        self.etag, self.total, self.chain = strong, total, tuple(chain)
        self._save()

    @contextmanager
    def appending(self) -> Iterator[Callable[[bytes], None]]:
        """Open for appending; yields a function that writes one piece. What was written is flushed to disk at
        the end.
        """
        with disk_errors(self.path, self.total or 0), self.path.open("ab") as stream:

            def write(piece: bytes) -> None:
                stream.write(piece)
                self.size += len(piece)

            try:
                yield write
            finally:
                stream.flush()
                os.fsync(stream.fileno())

    def finish(self) -> None:
        """Note that everything is here."""
        self.complete, self.total = True, self.size
        self._save()

    def drop(self) -> None:
        """Remove bytes and note."""
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)
        self.etag = self.total = None
        self.chain, self.complete, self.size = (), False, 0

    def _save(self) -> None:
        note = {
            "url": self._url,
            "etag": self.etag,
            "total": self.total,
            "chain": self.chain,
            "complete": self.complete,
        }
        write_json(self._note, note)

    def _load(self) -> bool:
        try:
            note = json.loads(self._note.read_bytes())
            size = self.path.stat().st_size
            if note["url"] != self._url or (note["complete"] and note["total"] != size):
                return False
            if not note["complete"] and note["etag"] is None:
                return False
            self.etag, self.total, self.chain = note["etag"], note["total"], tuple(note["chain"])
            self.complete, self.size = note["complete"], size
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return self.total is None or self.size <= self.total
