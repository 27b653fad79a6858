"""Sealed folders: what a stage made, from what, and whether it is still so.

A stage works in a hidden sibling (`.NAME.partial`) and *seals* it: `artifact.json` is written last, and the folder is
renamed to its final name. So a folder under its final name is always whole, and a killed stage finds its work again,
also when the kill falls into the sealing itself.

The fingerprint says what was asked for (stage, config, inputs, plugins, model revision); the hashes say what came out.
Times, rates, host and the summary live in `run.json`, which alone may differ between two equal runs.
"""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ..errors import GreatctlError, InputError, IntegrityError
from ..settings import Origins
from .files import (
    canonical_json,
    disk_errors,
    make_dir,
    read_bytes,
    sha256_bytes,
    sha256_file,
    sweep,
    write_json,
    write_text,
)
from .identity import Identity, difference
from .lock import hold
from .swap import RECORD, RUN, WORK, note, partial_of, read_json, settle, swap, tidy, wanted

__all__ = ["Artifact", "Identity", "Work", "current", "difference", "load", "newest", "sealed_under", "touch", "work"]

SCHEMA = 1
_PACKAGES = ("greatctl", "torch", "transformers", "transformer-lens", "safetensors", "tokenizers", "pyarrow")


@dataclass(frozen=True)
class Artifact:
    """A sealed folder, opened. `record` is artifact.json, `run` is run.json."""

    path: Path
    record: Mapping[str, object]
    run: Mapping[str, object]

    @property
    def fingerprint(self) -> str:
        """The fingerprint it was sealed with."""
        return str(self.record["fingerprint"])

    @property
    def stage(self) -> str:
        """The stage that made it."""
        return str(self.record["stage"])

    @property
    def config(self) -> dict:
        """The full config it was made with."""
        return dict(self.record["config"])  # type: ignore[call-overload]

    @property
    def summary(self) -> dict:
        """The summary of the run that made it."""
        return dict(self.run.get("summary", {}))  # type: ignore[call-overload]

    @property
    def outputs(self) -> list[dict]:
        """Rows `{path, bytes, sha256}`, sorted by path (relative, with `/`)."""
        return list(self.record["outputs"])  # type: ignore[call-overload]

    def damaged(self, *, deep: bool = False) -> list[str]:
        """Outputs that are missing or changed, each with a word why.

        A file whose size, inode and times are as noted is taken as intact; anything else is hashed. `deep` hashes every
        file. Where all are intact, what was seen is noted in run.json, so that a copied project is hashed once.
        """
        stamps, seen, found = self.run.get("stamps"), {}, []
        known = stamps if isinstance(stamps, dict) else {}
        for row in self.outputs:
            name, path = row["path"], self.path / row["path"]
            if not path.is_file():
                found.append(f"{name} (missing)")
                continue
            seen[name] = _stamp(path)  # before hashing: a change meanwhile shows the next time
            if seen[name][0] != row["bytes"]:
                found.append(f"{name} ({seen[name][0]:,} bytes instead of {row['bytes']:,})")
            elif (deep or known.get(name) != seen[name]) and sha256_file(path) != row["sha256"]:
                found.append(f"{name} (content differs from its sha256)")
        if not found and seen != known:
            _note_run(self.path, stamps=seen)
        return found

    def check(self) -> Artifact:
        """Return self if every output is intact.

        Raises:
            IntegrityError: naming the damaged files.
        """
        damaged = self.damaged()
        if damaged:
            raise IntegrityError(
                f"{self.path / damaged[0].split(' (')[0]} is damaged",
                why="; ".join(damaged[:5]),
                fix=f"run `greatctl {self.stage}` again: it redoes what is damaged",
                where=str(self.path),
            )
        return self


def load(path: Path) -> Artifact:
    """Open a sealed folder.

    Raises:
        InputError: there is no sealed artifact, or it is of a newer schema.
        IntegrityError: artifact.json was changed or cannot be read.
    """
    record_path = path / RECORD
    try:
        raw = read_bytes(record_path)
    except FileNotFoundError:
        raise InputError(f"{path} is not a finished artifact", why=f"there is no {RECORD} in it") from None
    except ValueError:
        raw = b""
    broken = IntegrityError(
        f"{record_path} is damaged",
        why="it is not what greatctl wrote",
        fix="run its stage again with --force",
        where=str(record_path),
    )
    try:
        record = json.loads(raw)
        if isinstance(record, dict) and isinstance(schema := record.get("schema"), int) and schema > SCHEMA:
            raise InputError(
                f"{path} was made by a newer greatctl",
                why=f"schema {schema}, known is {SCHEMA}",
                fix="upgrade greatctl",
            )
        body = {k: v for k, v in record.items() if k != "digest"}
        intact = record["digest"] == _digest(body) and raw == _render(record)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise broken from None
    if not intact:
        raise broken
    return Artifact(path, record, read_json(path / RUN))


def current(final: Path, identity: Identity) -> tuple[Artifact | None, str]:
    """The artifact at `final` if it is up to date, else None and the first reason why it is not."""
    if not (final / RECORD).exists():
        return None, "not made yet"
    try:
        artifact = load(final)
    except (InputError, IntegrityError) as error:
        return None, error.message
    if artifact.fingerprint != identity.fingerprint:
        return None, difference(artifact.record, identity.record())
    damaged = artifact.damaged()
    if damaged:
        return None, "damaged: " + damaged[0]
    tidy(final)
    return artifact, ""


class Work:
    """A folder being made. Write into `path`, then `seal`."""

    def __init__(self, final: Path, identity: Identity, origins: Mapping[str, str], resumed: bool) -> None:
        self.final = final
        self.path = partial_of(final)
        self.identity = identity
        self.origins = origins
        self.resumed = resumed

    def seal(
        self,
        summary: Mapping[str, object],
        *,
        hashes: Mapping[str, tuple[int, str]] | None = None,
        discard: Sequence[str] = (),
        **run: object,
    ) -> Artifact:
        """Hash the outputs, write run.json and artifact.json, and swap the folder in.

        Args:
            summary: the stage's `--json` summary (kept in run.json).
            hashes: relative path -> (bytes, sha256) of files whose hash is already known.
            discard: folders (checkpoints, say) that are no outputs; removed once the artifact is in its place.
            run: more for run.json (seconds, rates, host).
        """
        with disk_errors(self.path):
            sweep(self.path)
            outputs, stamps = self._outputs(hashes or {}, discard)
            note(self.path, self.identity.fingerprint, discard)
            sequence = _next_sequence(self.final)
            write_json(self.path / RUN, {**run, "summary": dict(summary), "stamps": stamps, "sequence": sequence})
            write_text(self.path / RECORD, self._record(outputs))
            swap(self.final)
            tidy(self.final)
            return load(self.final)

    def _outputs(
        self, known: Mapping[str, tuple[int, str]], discard: Sequence[str]
    ) -> tuple[list[dict[str, object]], dict[str, list[int]]]:
        """Rows and stamps of every file that is kept."""
        rows, stamps = [], {}
        for path in sorted(p for p in self.path.rglob("*") if p.is_file()):
            name = path.relative_to(self.path).as_posix()
            if name in (RECORD, RUN, WORK) or name.split("/")[0] in discard:
                continue
            size, digest = known.get(name) or (path.stat().st_size, sha256_file(path))
            rows.append({"path": name, "bytes": size, "sha256": digest})
            stamps[name] = _stamp(path)
        return rows, stamps

    def _record(self, outputs: Sequence[Mapping[str, object]]) -> str:
        """The text of artifact.json."""
        body = {
            "schema": SCHEMA,
            **self.identity.record(),
            "fingerprint": self.identity.fingerprint,
            "origins": dict(self.origins),
            "given": self.origins.given if isinstance(self.origins, Origins) else {},
            "outputs": outputs,
            "seed": self.identity.config.get("seed"),
            "versions": versions(),
        }
        return _render({**body, "digest": _digest(body)}).decode()


@contextlib.contextmanager
def work(
    final: Path, identity: Identity, *, origins: Mapping[str, str] | None = None, fresh: bool = False
) -> Iterator[Work]:
    """Lock `final` and open its work folder: resumed where a killed run of the same identity left it, else empty.

    A sealed artifact of the same identity (damaged, or sealed by a run that was killed before it was in its place) is
    reopened, so that only what is damaged is redone. An older artifact of another identity stays in place until `seal`
    replaces it. `fresh` starts from nothing.

    Raises:
        LockedError: another process works on it.
    """
    with hold(final):
        with disk_errors(final):
            resumed = _open(final, identity, fresh)
        yield Work(final, identity, origins or {}, resumed)


def _open(final: Path, identity: Identity, fresh: bool) -> bool:
    """Make the work folder ready; returns whether there is earlier work in it."""
    settle(final)
    partial = partial_of(final)
    if partial.exists() and (fresh or wanted(partial) != identity.fingerprint):
        shutil.rmtree(partial)
    if not fresh and not partial.exists() and _made_for(final, identity):
        final.rename(partial)  # still sealed, so that a kill right here is undone by `settle`
    resumed = partial.exists()
    make_dir(partial)
    note(partial, identity.fingerprint)
    (partial / RECORD).unlink(missing_ok=True)
    sweep(partial)
    return resumed


def touch(artifact: Artifact) -> None:
    """Note that `artifact` was asked for again, so that it is the newest of its kind (where the disk is writable)."""
    _note_run(artifact.path, sequence=_next_sequence(artifact.path))


def sealed_under(root: Path, stage: str | None = None) -> list[Artifact]:
    """Every readable sealed artifact below `root`, oldest first. "Old" is a counter, not a clock."""
    found = []
    for record in sorted(root.rglob(RECORD)) if root.is_dir() else []:
        if any(part.startswith(".") for part in record.relative_to(root).parts):
            continue
        try:
            artifact = load(record.parent)
        except (InputError, IntegrityError):
            continue
        if stage is None or artifact.stage == stage:
            found.append(artifact)
    return sorted(found, key=lambda a: (_sequence(a.run), a.path.as_posix()))


def newest(root: Path, stage: str) -> Artifact | None:
    """The artifact of `stage` below `root` that was made or asked for last."""
    found = sealed_under(root, stage)
    return found[-1] if found else None


def versions() -> dict[str, str]:
    """Versions of greatctl, Python and the packages whose numbers matter."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _render(record: Mapping[str, object]) -> bytes:
    return (canonical_json(record, indent=1) + "\n").encode()


def _digest(body: Mapping[str, object]) -> str:
    return sha256_bytes(canonical_json(body).encode())


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _note_run(folder: Path, **more: object) -> None:
    """Add to run.json what is convenient to know; a disk that cannot be written stays as it is."""
    with contextlib.suppress(GreatctlError, OSError, ValueError):
        write_json(folder / RUN, {**read_json(folder / RUN), **more})


def _sequence(run: Mapping[str, object]) -> int:
    value = run.get("sequence", 0)
    return value if isinstance(value, int) else 0


def _next_sequence(final: Path) -> int:
    """One more than any neighbour's: a folder beside `final`, or beside its parent (other models' activations)."""
    neighbours = final.absolute().parent.parent.glob(f"*/*/{RUN}")
    return 1 + max((_sequence(read_json(run)) for run in neighbours), default=0)


def _made_for(final: Path, identity: Identity) -> bool:
    try:
        return load(final).fingerprint == identity.fingerprint
    except (InputError, IntegrityError):
        return False
