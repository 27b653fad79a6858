"""Obtaining one source at a time: from disk, from its host, or from a person's hands.

Order of preference: what is intact stays; what can be cleaned again from the original on disk is; only then
is a host asked. Bytes that differ from those first seen are held back until a person says `--update`, and
only after they proved to be the right book; so *changed at its source* and *corrupt* never look alike.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import GreatctlError, InputError, IntegrityError, PluginError
from ..events import Run
from ..extend.contracts import Document, Resource, Source
from ..store.files import sha256_bytes
from ..store.http import Client
from . import raw

if TYPE_CHECKING:
    from ..manifest import Entry

__all__ = ["DOWNLOADS", "ON_DISK", "Library", "Row", "locate"]

ON_DISK = ("fetched", "up-to-date")
DOWNLOADS = ".downloads"
_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_OURS = ("text.txt", "removed.txt", "metadata.json", "artifact.json", "run.json", "work.json")

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One line of the summary.

    Attributes:
        status: `fetched`, `up-to-date`, `manual`, `changed` or `failed`.
        bytes, sha256: of the original on disk (several files: of all together); None where there is none.
        why: what to do, or what went wrong; None where nothing is to be said.
    """

    id: str
    character: str | None
    role: str
    status: str
    bytes: int | None = None
    sha256: str | None = None
    why: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON values; `why` only where there is one."""
        return {k: v for k, v in asdict(self).items() if k != "why" or v}

    @classmethod
    def of(cls, entry: Entry, status: str, files: Mapping[str, bytes] | None = None, why: str | None = None) -> Row:
        """The row of an entry whose originals are `files`."""
        size = sum(map(len, files.values())) if files else None
        digest = hashlib.sha256(b"".join(files.values())).hexdigest() if files else None
        return cls(entry.id, entry.character, entry.role, status, size, digest, why)


@dataclass
class Library:
    """The raw folder and the rules for filling it.

    Attributes:
        folder: data/raw.
        again: ask the host even for what is intact (`--force`, `--update`).
        update: bytes that differ from those first seen replace the old ones.
        noted: what run.json notes of this run (settings and their origins, the mirror's address).
    """

    folder: Path
    ledger: raw.Ledger
    client: Client
    run: Run
    again: bool = False
    update: bool = False
    noted: Mapping[str, object] = field(default_factory=dict)

    def obtain(self, entry: Entry, source: Source, plugins: Mapping[str, str]) -> Row:
        """Make sure that `entry` is on disk, as cheaply as possible.

        Args:
            plugins: name -> digest where `source` comes from a plugin, else empty.

        Raises:
            GreatctlError: it could not be obtained; what was on disk before still is.
        """
        final = self.folder / entry.id
        have = raw.originals(final, entry)
        if have and not (self.again and source.hosts):
            files, chain = have
            if self.ledger.expected(entry) is None:
                self.ledger.note(entry, files)
            return self._keep(entry, source, plugins, files, chain)
        if not source.hosts:
            return Row.of(entry, "manual", None, manual_why(entry))
        files, chain, etags = self._download(entry, source, plugins)
        try:
            return self._judge(entry, source, plugins, files, chain, etags)
        finally:
            self._forget(entry)

    def bring_in(self, entry: Entry, source: Source, plugins: Mapping[str, str], path: Path) -> Row:
        """Copy a person's file in as the original of `entry`; it replaces an earlier one.

        Raises:
            InputError: the file is not there, or of a kind that the source cannot read.
            IntegrityError: it is not what the entry describes.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(
                f"{path} cannot be imported",
                why=error.strerror or str(error),
                fix="give --import the path of a file",
            ) from error
        files = {"original" + (path.suffix.lower() or ".txt"): data}
        row = self._keep(entry, source, plugins, files, [])
        self.ledger.note(entry, files)
        return row

    def _judge(
        self,
        entry: Entry,
        source: Source,
        plugins: Mapping[str, str],
        files: Mapping[str, bytes],
        chain: Sequence[str],
        etags: Mapping[str, str | None],
    ) -> Row:
        """Keep what was downloaded, or hold it back where it differs from what was first seen."""
        document = _read(entry, source, files, plugins)
        expected = self.ledger.expected(entry)
        if expected is not None and expected != _hashes(files) and not self.update:
            return self._changed(entry, files)
        row = self._keep(entry, source, plugins, files, chain, document)
        self.ledger.note(entry, files, etags)
        return row

    def _keep(
        self,
        entry: Entry,
        source: Source,
        plugins: Mapping[str, str],
        files: Mapping[str, bytes],
        chain: Sequence[str],
        document: Document | None = None,
    ) -> Row:
        """Seal the folder, unless just that is there, intact."""
        final = self.folder / entry.id
        wanted = raw.identity(entry, _hashes(files), chain, plugins)
        held = raw.intact(final)
        if held and held.fingerprint == wanted.fingerprint:
            return Row.of(entry, "up-to-date", files)
        document = document or _read(entry, source, files, plugins)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        raw.seal(final, wanted, files, document, {**self.noted, "retrieved": now})
        return Row.of(entry, "fetched", files)

    def _changed(self, entry: Entry, files: Mapping[str, bytes]) -> Row:
        """The row for a healthy file that is not the one first seen; the old one stays."""
        have = raw.originals(self.folder / entry.id, entry)
        new = sum(map(len, files.values()))
        old = f"{sum(map(len, have[0].values())):,} bytes" if have else "another file, which is not on disk any more"
        why = (
            f"changed at its source: {new:,} bytes came, first seen was {old}; "
            f"to take the new one: greatctl fetch --update --source {entry.id}"
        )
        return Row.of(entry, "changed", have[0] if have else None, why)

    def _download(
        self, entry: Entry, source: Source, plugins: Mapping[str, str]
    ) -> tuple[dict[str, bytes], list[str], dict[str, str | None]]:
        """Every file of an entry: (name -> bytes, chain, name -> ETag). What came before a failure is kept
        for resuming.
        """
        parts = self.folder / DOWNLOADS / entry.id
        hosts = source.hosts
        resources = locate(entry, source, plugins, lambda url: self.client.get(url, hosts, parts))
        files: dict[str, bytes] = {}
        chain = [entry.url] if entry.url else []
        etags: dict[str, str | None] = {}

        def tell(done: int, total: int, already: int) -> None:
            self.run.progress(entry.id, done, total, "B", already=already)
            self.run.stop_here()

        for resource in resources:
            part = parts / f"{resource.filename}.part"
            got = self.client.download(resource.url, part, hosts, max_bytes=resource.max_bytes, progress=tell)
            data = part.read_bytes()
            try:
                _verify(resource, data)
            except IntegrityError:
                self._forget(entry)
                raise
            files[resource.filename], etags[resource.filename] = data, got.etag
            chain += [address for address in got.chain if address not in chain]
        return files, chain, etags

    def _forget(self, entry: Entry) -> None:
        shutil.rmtree(self.folder / DOWNLOADS / entry.id, ignore_errors=True)


def locate(entry: Entry, source: Source, plugins: Mapping[str, str], get: Callable[[str], bytes]) -> Sequence[Resource]:
    """The source's resources, checked.

    Raises:
        PluginError: there is none, or a file name would leave the folder or hide one of greatctl's own.
    """
    resources = list(_guarded(entry, plugins, lambda: source.locate(entry, get)))
    names = [r.filename for r in resources]
    bad = next((n for n in names if not _SAFE.fullmatch(n) or n in _OURS), None)
    if not resources or bad is not None or len(set(names)) < len(names):
        raise PluginError(
            f"source kind {entry.kind!r} gave no usable file for {entry.id!r}",
            why=f"the file name {bad!r} is not allowed" if bad else "it named none, or one twice",
            fix="mend the plugin's locate()",
        )
    return resources


def manual_why(entry: Entry) -> str:
    """What a person has to bring, from where, and the command that brings it in."""
    what = entry.where or f"Get the text of {entry.title} by {entry.author}"
    return f"{what.rstrip('. ')}. Then: greatctl fetch --import FILE --source {entry.id}"


def _read(entry: Entry, source: Source, files: Mapping[str, bytes], plugins: Mapping[str, str]) -> Document:
    document = _guarded(entry, plugins, lambda: source.read(entry, files))
    if not isinstance(document, Document) or not isinstance(document.text, str) or not document.text.strip():
        raise PluginError(
            f"source kind {entry.kind!r} gave no document for {entry.id!r}",
            why=f"read() returned {type(document).__name__} instead of a Document with text",
            fix="mend the plugin's read()",
        )
    return document


def _guarded(entry: Entry, plugins: Mapping[str, str], call: Callable[[], T]) -> T:
    """Call into a source. Whatever a plugin's own code raises becomes a PluginError; our own bugs stay what
    they are.
    """
    if not plugins:
        return call()
    try:
        return call()
    except GreatctlError:
        raise
    except Exception as error:  # a stranger's code may raise anything
        raise PluginError(
            f"source kind {entry.kind!r} failed on {entry.id!r}",
            why=f"{type(error).__name__}: {error}",
            fix="mend the plugin, or run with --no-plugins",
        ) from error


def _hashes(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: sha256_bytes(data) for name, data in files.items()}


def _verify(resource: Resource, data: bytes) -> None:
    """Hold a download against the facts that are known of it."""
    found = {"size": len(data)} | {
        name: hashlib.new(name, data, usedforsecurity=False).hexdigest() for name in ("md5", "sha1", "sha256")
    }
    for name, value in found.items():
        wanted = getattr(resource, name)
        if wanted is not None and wanted != value:
            raise IntegrityError(
                f"{resource.filename} is not the file that its record describes",
                why=f"{name} is {value}, should be {wanted}",
                fix="run the same command again; if it stays so, record or file is broken at the source",
                where=resource.url,
            )
