"""Obtaining one source at a time: from disk, from its host, or from a person's hands.

Order of preference: what is intact stays; what can be cleaned again from the original on disk is; a work that another
one brought at the same address is shared; only then is a host asked. Bytes that differ from those first seen are held
back until a person says `--update`, and only after they proved to be the right book; so *changed at its source* and
*corrupt* never look alike.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import GreatctlError, InputError, IntegrityError
from ..events import Run
from ..extend.contracts import Document, Resource, Source
from ..store.http import Client
from . import raw
from .manual import ByHand, bring_command, what_to_bring
from .reading import differences, facts_of, locate, mismatch, read, verify

if TYPE_CHECKING:
    from ..manifest import Entry

__all__ = ["DOWNLOADS", "ON_DISK", "Library", "Row"]

ON_DISK = ("fetched", "up-to-date")
DOWNLOADS = ".downloads"
_LARGEST_IMPORT = 512 * 2**20


@dataclass(frozen=True)
class Row:
    """One line of the summary.

    Attributes:
        status: `fetched`, `up-to-date`, `manual`, `changed` or `failed`.
        bytes, sha256: of the original on disk (several files: of all together); None where there is none.
        why: what to do, or what went wrong; None where nothing is to be said.
        get: what a person has to bring, and from where, for `manual`.
        code, exit_code: of the error that ended a `failed` one: 7 the network, 6 not the right bytes.
    """

    id: str
    character: str | None
    role: str
    status: str
    bytes: int | None = None
    sha256: str | None = None
    why: str | None = None
    get: str | None = None
    code: str | None = None
    exit_code: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON values; what says more than the state only where there is something to say."""
        return {k: v for k, v in asdict(self).items() if v is not None or k not in ("why", "get", "code", "exit_code")}

    @classmethod
    def of(cls, entry: Entry, status: str, files: Mapping[str, bytes] | None = None, why: str | None = None) -> Row:
        """The row of an entry whose originals are `files`."""
        size = sum(map(len, files.values())) if files else None
        digest = hashlib.sha256(b"".join(files.values())).hexdigest() if files else None
        return cls(entry.id, entry.character, entry.role, status, size, digest, why)

    @classmethod
    def failed(cls, entry: Entry, files: Mapping[str, bytes] | None, error: GreatctlError) -> Row:
        """The row of an entry that could not be obtained; `files` is what is on disk from before."""
        row = cls.of(entry, "failed", files, f"{error.message}: {error.why}".rstrip(": "))
        return replace(row, code=error.name, exit_code=error.exit_code)

    @classmethod
    def manual(cls, entry: Entry, files: Mapping[str, bytes] | None = None, reason: str = "") -> Row:
        """The row of an entry that a person has to bring."""
        get = what_to_bring(entry, reason)
        return replace(cls.of(entry, "manual", files, f"{get} Then: {bring_command(entry.id)}"), get=get)


@dataclass
class Library:
    """The raw folder and the rules for filling it.

    Attributes:
        folder: data/raw.
        works: every entry of the manifest, so that two with one address share one download.
        again: ask the host even for what is intact (`--force`, `--update`).
        update: bytes that differ from those first seen replace the old ones; what did not change is not sent again.
        noted: what run.json notes of this run (settings and their origins, the mirror's address).
    """

    folder: Path
    ledger: raw.Ledger
    client: Client
    run: Run
    works: Sequence[Entry] = ()
    again: bool = False
    update: bool = False
    noted: Mapping[str, object] = field(default_factory=dict)
    _brought: set[str] = field(default_factory=set)

    def obtain(self, entry: Entry, source: Source, plugins: Mapping[str, str]) -> Row:
        """Make sure that `entry` is on disk, as cheaply as possible.

        Args:
            plugins: name -> digest where `source` comes from a plugin, else empty.

        Raises:
            GreatctlError: it could not be obtained; what was on disk before still is.
        """
        have = raw.originals(self.folder / entry.id, entry)
        asked = self.again and bool(source.hosts) and not (have and have.imported)
        if have and not asked:
            self._forget(entry)  # what a killed run had no time to drop
            return self._keep(entry, source, plugins, have)
        if not source.hosts:
            return Row.manual(entry)
        twin = self._twin(entry)
        try:
            row = self._ask(entry, source, plugins, have) if twin is None else self._share(entry, source, plugins, twin)
        except ByHand as reason:
            return Row.manual(entry, have.files if have else None, _words(reason))
        if row.status in ON_DISK:
            self._brought.add(entry.id)
        return row

    def bring_in(
        self,
        entry: Entry,
        source: Source,
        plugins: Mapping[str, str],
        path: Path,
        facts: Mapping[str, str],
    ) -> Row:
        """Copy a person's file in as the original of `entry`; it replaces an earlier one.

        Args:
            facts: `origin` and `rights` as the person told them; what is missing stays missing in the record.

        Raises:
            InputError: the file is not there, too large, or of a kind that cannot be read.
            IntegrityError: it is not what the entry describes.
        """
        try:
            size = path.stat().st_size
            data = path.read_bytes() if size <= _LARGEST_IMPORT else b""
        except OSError as error:
            raise InputError(
                f"{path} cannot be imported",
                why=error.strerror or str(error),
                fix="give --import the path of a file",
            ) from error
        if size > _LARGEST_IMPORT:
            raise InputError(f"{path} cannot be imported", why=f"{size:,} bytes are more than a book has")
        files = {"original" + (path.suffix.lower() or ".txt"): data}
        return self._keep(entry, source, plugins, raw.Held(files, [], {"file": path.name, **facts}), noting={})

    def _ask(self, entry: Entry, source: Source, plugins: Mapping[str, str], have: raw.Held | None) -> Row:
        """Download, judge, and drop what was only needed for resuming."""
        held, etags = self._download(entry, source, plugins, have)
        try:
            if have and held.files == have.files:
                return self._keep(entry, source, plugins, have, noting=etags)
            return self._judge(entry, source, plugins, held, etags)
        finally:
            self._forget(entry)

    def _share(self, entry: Entry, source: Source, plugins: Mapping[str, str], twin: Entry) -> Row:
        """Take the originals of another work that came from the same address."""
        held = raw.originals(self.folder / twin.id, twin)
        assert held is not None  # `_twin` looked
        return self._judge(entry, source, plugins, held, self.ledger.etags(twin))

    def _twin(self, entry: Entry) -> Entry | None:
        """Another work with the same address that lies on disk, fresh enough for this run."""
        for other in self.works:
            same = other.id != entry.id and raw.address(other) == raw.address(entry) is not None
            if same and (other.id in self._brought or not self.again):
                held = raw.originals(self.folder / other.id, other)
                if held and not held.imported:
                    return other
        return None

    def _judge(
        self,
        entry: Entry,
        source: Source,
        plugins: Mapping[str, str],
        held: raw.Held,
        etags: Mapping[str, str | None],
    ) -> Row:
        """Keep what was downloaded, or hold it back where it differs from what was first seen."""
        document = read(entry, source, held.files, plugins)
        expected = self.ledger.expected(entry)
        if expected is not None and expected != facts_of(held.files) and not self.update:
            return self._changed(entry, held.files)
        return self._keep(entry, source, plugins, held, document, noting=etags)

    def _keep(
        self,
        entry: Entry,
        source: Source,
        plugins: Mapping[str, str],
        held: raw.Held,
        document: Document | None = None,
        *,
        noting: Mapping[str, str | None] | None = None,
    ) -> Row:
        """Seal the folder, unless just that is there, intact.

        The ledger is written first, once the document proved readable: so a kill in between costs no fact, for the
        next run finds the download and comes here again. `noting` are the ETags to note; None = only what was never
        noted.
        """
        final = self.folder / entry.id
        wanted = raw.identity(entry, facts_of(held.files), held.chain, plugins, held.brought)
        sealed = raw.intact(final)
        up_to_date = sealed is not None and sealed.fingerprint == wanted.fingerprint
        if not up_to_date:
            document = document or read(entry, source, held.files, plugins, brought=held.imported)
        if noting is not None or self.ledger.expected(entry) is None:
            self.ledger.note(entry, held.files, noting)
        if document is None or up_to_date:
            return Row.of(entry, "up-to-date", held.files)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        raw.seal(final, wanted, held.files, document, {**self.noted, "retrieved": now})
        return Row.of(entry, "fetched", held.files)

    def _changed(self, entry: Entry, files: Mapping[str, bytes]) -> Row:
        """The row for a healthy file that is not the one first seen; the old one stays."""
        have = raw.originals(self.folder / entry.id, entry)
        old = have.files if have else None
        what = differences(old, files) if old else "the version first seen is not on disk any more"
        why = f"changed at its source: {what}; to take the new one: greatctl fetch --update --source {entry.id}"
        return Row.of(entry, "changed", old, why)

    def _download(
        self, entry: Entry, source: Source, plugins: Mapping[str, str], have: raw.Held | None
    ) -> tuple[raw.Held, dict[str, str | None]]:
        """Every file of an entry and their ETags (by name). What came before a failure is kept for resuming."""
        parts = self.folder / DOWNLOADS / entry.id
        resources = locate(entry, source, plugins, lambda url: self.client.get(url, source.hosts, parts))
        etags = dict(self.ledger.etags(entry)) if have else {}
        files: dict[str, bytes] = {}
        chain = [entry.url] if entry.url else []
        for resource in resources:
            name = resource.filename
            old = have.files.get(name) if have and self.update else None
            files[name], etags[name], hops = self._one(entry, source, resource, parts, old, etags.get(name))
            chain += [hop for hop in hops if hop not in chain]
        return raw.Held(files, chain), etags

    def _one(
        self, entry: Entry, source: Source, resource: Resource, parts: Path, old: bytes | None, etag: str | None
    ) -> tuple[bytes, str | None, Sequence[str]]:
        """(bytes, ETag, addresses) of one file; `old`, seen with `etag`, is not sent again if it is still the one."""

        def tell(done: int, total: int, already: int) -> None:
            self.run.progress(entry.id, done, total, "B", already=already)
            self.run.stop_here()

        known = old if self.ledger.saw(entry, resource.filename, old) else None
        part = parts / f"{resource.filename}.part"
        got = self.client.download(
            resource.url,
            part,
            source.hosts,
            max_bytes=resource.max_bytes,
            unless=etag if known is not None and not mismatch(resource, known) else None,
            progress=tell,
        )
        if got.unchanged and known is not None:
            return known, got.etag, got.chain
        data = part.read_bytes()
        try:
            verify(resource, data)
        except IntegrityError:
            self._forget(entry)
            raise
        return data, got.etag, got.chain

    def _forget(self, entry: Entry) -> None:
        shutil.rmtree(self.folder / DOWNLOADS / entry.id, ignore_errors=True)


def _words(error: GreatctlError) -> str:
    return f"{error.message} ({error.why})" if error.why else error.message
