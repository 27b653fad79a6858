"""Numbered safetensors shards that grow one by one and survive a kill.

A shard is written whole (partial name, fsync, rename) and then noted in `index.jsonl`, one line each with its own
checksum; a line whose shard is not there is dropped on opening. Work is cut by shard *number*: whoever writes shard 7,
in whatever order, writes the same bytes. `finish` rewrites the index in order, so that an interrupted run ends with
the bytes of an undisturbed one.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from ..errors import IntegrityError
from .files import canonical_json, disk_errors, fsync_dir, sha256_bytes, sha256_file, sweep, write_bytes, write_text

__all__ = ["INDEX", "ShardEntry", "ShardReader", "ShardWriter"]

INDEX = "index.jsonl"


@dataclass(frozen=True)
class ShardEntry:
    """One line of the index: shard number, file name, rows, bytes, sha256."""

    number: int
    name: str
    rows: int
    bytes: int
    sha256: str


class ShardWriter:
    """Writes shards into `folder`, and knows which of them are already there and intact (hashed once, on opening)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        sweep(folder)
        self._entries: dict[int, ShardEntry] = {}
        for entry in _read_index(folder):
            path = folder / entry.name
            if path.is_file() and path.stat().st_size == entry.bytes and sha256_file(path) == entry.sha256:
                self._entries[entry.number] = entry
        self._rewrite()

    def __contains__(self, number: int) -> bool:
        return number in self._entries

    def write(self, number: int, tensors: Mapping[str, torch.Tensor], rows: int) -> ShardEntry:
        """Write shard `number` (contiguous CPU tensors) durably and note it in the index."""
        data = save_tensors({k: v.contiguous() for k, v in tensors.items()})
        entry = ShardEntry(number, f"shard-{number:05d}.safetensors", rows, len(data), sha256_bytes(data))
        write_bytes(self.folder / entry.name, data)
        path = self.folder / INDEX
        with disk_errors(path), path.open("ab") as stream:
            stream.write(_line(entry))
            stream.flush()
            os.fsync(stream.fileno())
        self._entries[number] = entry
        return entry

    def take(self, other: ShardWriter) -> int:
        """Move in the shards of another writer's folder that are not here yet; returns how many."""
        wanted = [e for n, e in sorted(other._entries.items()) if n not in self._entries]
        self._entries |= {entry.number: entry for entry in wanted}
        self._rewrite()  # first: a shard that is noted but not here is looked for again, one that is not noted is lost
        with disk_errors(self.folder):
            for entry in wanted:
                (other.folder / entry.name).replace(self.folder / entry.name)
            fsync_dir(self.folder)
        return len(wanted)

    def finish(self) -> list[ShardEntry]:
        """Rewrite the index in order of shard number; returns its entries."""
        self._rewrite()
        return [self._entries[n] for n in sorted(self._entries)]

    def hashes(self) -> dict[str, tuple[int, str]]:
        """file name -> (bytes, sha256), for `Work.seal`."""
        return {e.name: (e.bytes, e.sha256) for e in self._entries.values()}

    def _rewrite(self) -> None:
        lines = b"".join(_line(self._entries[n]) for n in sorted(self._entries))
        write_text(self.folder / INDEX, lines.decode())


class ShardReader:
    """Reads a finished shard folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: Sequence[ShardEntry] = sorted(_read_index(folder), key=lambda e: e.number)
        if [e.number for e in self.entries] != list(range(len(self.entries))):
            raise IntegrityError(
                f"{folder / INDEX} does not list every shard",
                why=f"it names {len(self.entries)} shards with gaps",
                fix="run its stage again: it redoes what is missing",
                where=str(folder / INDEX),
            )

    @property
    def rows(self) -> int:
        """Rows in all shards together."""
        return sum(e.rows for e in self.entries)

    def read(self, number: int) -> dict[str, torch.Tensor]:
        """All tensors of one shard.

        Raises:
            IntegrityError: the shard is missing or not readable.
        """
        entry = self.entries[number]
        path = self.folder / entry.name
        try:
            return load_tensors(path.read_bytes())
        except (OSError, SafetensorError) as error:
            raise IntegrityError(
                f"{path} cannot be read",
                why=str(error),
                fix="run its stage again: it redoes this shard",
                where=str(path),
            ) from error

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (self.read(n) for n in range(len(self.entries)))


def _line(entry: ShardEntry) -> bytes:
    body = canonical_json(asdict(entry))
    return f"{zlib.crc32(body.encode()):08x} {body}\n".encode()


def _read_index(folder: Path) -> list[ShardEntry]:
    """Index lines that are whole; a torn or flipped line is dropped, a repeated number counts once (the last)."""
    try:
        lines = (folder / INDEX).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    found: dict[int, ShardEntry] = {}
    for line in lines:
        crc, _, body = line.partition(b" ")
        if crc.decode("ascii", "replace") != f"{zlib.crc32(body):08x}":
            continue
        entry = ShardEntry(**json.loads(body))
        found[entry.number] = entry
    return list(found.values())
