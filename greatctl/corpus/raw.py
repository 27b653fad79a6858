"""The folder of one source: what came, what was kept, what was cut.

    data/raw/<id>/  original.EXT  text.txt  removed.txt  metadata.json  (+ artifact.json, run.json)

Its identity holds the hash of the original and the version of the cleaning rules. So a changed rule or span
cleans the file on disk again, with no download; and nothing in the folder but run.json knows when or through
which mirror it came. `Ledger` is sources.lock.json: the hash with which each address was first seen, by which
later changes are noticed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, IntegrityError
from ..extend.contracts import Document
from ..store.artifact import Artifact, Identity, load, work
from ..store.files import sha256_bytes, write_bytes, write_json, write_text
from .clean import VERSION

if TYPE_CHECKING:
    from ..manifest import Entry

__all__ = ["LEDGER", "Held", "Ledger", "address", "facts", "identity", "intact", "originals", "seal", "text_bytes"]

LEDGER = "sources.lock.json"
# fmt: off
_FACTS = (
    "id", "kind", "role", "character", "unit", "title", "author", "year", "first_published", "edition",
    "rights", "rights_note", "contamination", "where", "url", "pg", "ia", "file", "text_from",
    "text_from_nth", "text_to", "text_to_nth", "era", "genre", "topic", "translated", "split", "matches",
    "extra",
)
# fmt: on
_WHERE = ("kind", "url", "ia", "file", "extra")
"""What says where a work's bytes are; originals of another address are not a work's own."""


@dataclass(frozen=True)
class Held:
    """The originals of a work.

    Attributes:
        files: name -> bytes.
        chain: the addresses that led to them, canonical; empty for an import.
        brought: what a person said of a file that they imported (file, origin, rights); None for a download.
    """

    files: Mapping[str, bytes]
    chain: Sequence[str]
    brought: Mapping[str, str] | None = None

    @property
    def imported(self) -> bool:
        """Whether a person brought them."""
        return not self.chain


def address(entry: Entry) -> str | None:
    """One line that says where a work's bytes come from, with the kind that reads them; None for a manual source."""
    where = {name: value for name in _WHERE if (value := getattr(entry, name))}
    return json.dumps(where, sort_keys=True) if entry.url or entry.ia else None


def facts(entry: Entry) -> dict[str, Any]:
    """What the manifest says of an entry that its documents carry (JSON values)."""
    return {name: getattr(entry, name, None) for name in _FACTS}


def identity(
    entry: Entry,
    files: Mapping[str, str],
    chain: Sequence[str],
    plugins: Mapping[str, str] | None = None,
    brought: Mapping[str, str] | None = None,
) -> Identity:
    """The identity of a source folder.

    Args:
        files: file name -> sha256 of each original.
        chain: the addresses that led to it, canonical; empty for an import.
        plugins: name -> digest of the plugin that reads it.
        brought: what a person told of an import (file, origin, rights).
    """
    config = {"entry": facts(entry), "files": dict(files), "url_chain": list(chain), "cleaning": VERSION}
    if brought is not None:
        config["import"] = dict(brought)
    return Identity("fetch", config, plugins=dict(plugins or {}))


def intact(final: Path) -> Artifact | None:
    """The sealed folder at `final` if every output is as it was sealed, else None."""
    try:
        return load(final).check()
    except (InputError, IntegrityError):
        return None


def originals(final: Path, entry: Entry) -> Held | None:
    """The original files of `entry` that lie intact in `final`; None if missing, damaged or of another address."""
    try:
        config = load(final).config
        if any(config["entry"].get(name) != getattr(entry, name) for name in _WHERE):
            return None
        files = {name: (final / name).read_bytes() for name in config["files"]}
        held = Held(files, list(config["url_chain"]), config.get("import"))
    except (InputError, IntegrityError, OSError, KeyError, TypeError):
        return None
    whole = all(sha256_bytes(data) == config["files"][name] for name, data in files.items())
    return held if whole and files else None


def seal(
    final: Path,
    wanted: Identity,
    files: Mapping[str, bytes],
    document: Document,
    noted: Mapping[str, object],
) -> Artifact:
    """Write a source folder and swap it in whole. `noted` goes to run.json (when, mirror, settings).

    None of the stage's settings changes the bytes, so none is recorded in artifact.json.
    """
    text = document.text.encode("utf-8")
    cut: dict[str, int] = {}
    for piece in document.removed:
        cut[piece.rule] = cut.get(piece.rule, 0) + len(piece.text.encode("utf-8"))
    meta = {
        **wanted.config["entry"],  # type: ignore[dict-item]
        "url_chain": wanted.config["url_chain"],
        "files": [{"name": n, "bytes": len(d), "sha256": sha256_bytes(d)} for n, d in files.items()],
        "text": {"bytes": len(text), "sha256": sha256_bytes(text)},
        "cleaning": VERSION,
        "removed_bytes": cut,
        "document": dict(document.metadata),
    }
    if "import" in wanted.config:
        meta["import"] = wanted.config["import"]
    pieces = [f"=== {p.rule} ({len(p.text.encode('utf-8')):,} bytes)\n{p.text}\n" for p in document.removed]
    with work(final, wanted, fresh=True) as w:
        for name, data in files.items():
            write_bytes(w.path / name, data)
        write_bytes(w.path / "text.txt", text)
        write_text(w.path / "removed.txt", "\n".join(pieces))
        write_json(w.path / "metadata.json", meta)
        summary = {"source": final.name, "bytes": sum(map(len, files.values())), "text_bytes": len(text)}
        return w.seal(summary, noted=dict(noted))


def text_bytes(final: Path) -> int | None:
    """Size of the clean text on disk, None where there is no sealed folder."""
    try:
        load(final)
        return (final / "text.txt").stat().st_size
    except (InputError, IntegrityError, OSError):
        return None


class Ledger:
    """sources.lock.json: id -> {url, files: {name: {bytes, sha256, etag}}}."""

    def __init__(self, path: Path) -> None:
        """Read it; absent = empty.

        Raises:
            IntegrityError: the file is not what greatctl wrote.
        """
        self.path = path
        self._rows: dict[str, dict[str, Any]] = {}
        if path.exists():
            try:
                rows = json.loads(path.read_bytes())["sources"]
                self._rows = {id: {"url": row["url"], "files": dict(row["files"])} for id, row in rows.items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise IntegrityError(
                    f"{path} cannot be read",
                    why=f"it is not what greatctl wrote ({error})",
                    fix="restore it from version control, or remove it: the next fetch writes what it sees",
                    where=str(path),
                ) from error

    def expected(self, entry: Entry) -> dict[str, str] | None:
        """File name -> sha256 as first seen at the entry's address; None when it was never seen there."""
        row = self._rows.get(entry.id)
        if row is None or row["url"] != _known_as(entry):
            return None
        return {name: facts["sha256"] for name, facts in row["files"].items()}

    def saw(self, entry: Entry, name: str, data: bytes | None) -> bool:
        """Whether these bytes are the ones that are written down for a file of the entry."""
        return data is not None and (self.expected(entry) or {}).get(name) == sha256_bytes(data)

    def etags(self, entry: Entry) -> dict[str, str | None]:
        """File name -> ETag as noted at the entry's address."""
        seen = self._rows[entry.id]["files"] if self.expected(entry) is not None else {}
        return {name: facts.get("etag") for name, facts in seen.items()}

    def note(self, entry: Entry, files: Mapping[str, bytes], etags: Mapping[str, str | None] | None = None) -> None:
        """Write down what was seen, unless just that is written there already."""
        seen = {name: sha256_bytes(data) for name, data in files.items()}
        known = self.etags(entry)
        if self.expected(entry) == seen and all(known.get(name) == tag for name, tag in (etags or {}).items()):
            return
        rows = {
            name: {"bytes": len(data), "sha256": seen[name], "etag": (etags or {}).get(name)}
            for name, data in files.items()
        }
        self._rows[entry.id] = {"url": _known_as(entry), "files": rows}
        write_json(self.path, {"schema": 1, "sources": self._rows})


def _known_as(entry: Entry) -> str | None:
    """The address under which the ledger knows an entry."""
    return entry.url or (f"https://archive.org/details/{entry.ia}" if entry.ia else None)
