"""Sealed folders: what a stage made, from what, and whether it is still so.

A stage works in a hidden sibling (`.NAME.partial`) and *seals* it: `artifact.json` is written last, and the folder is
renamed to its final name. So a folder under its final name is always whole, and a killed stage finds its work again.
The fingerprint says what was asked for (stage, config, inputs, plugins, model revision); the hashes say what came out.
Times, rates, host and the summary live in `run.json`, which alone may differ between two equal runs.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from ..errors import InputError, IntegrityError
from ..settings import Origins
from .files import canonical_json, fsync_dir, make_dir, sha256_bytes, sha256_file, sweep, write_json, write_text
from .lock import hold

__all__ = ["Artifact", "Identity", "Work", "current", "load", "newest", "sealed_under", "touch", "work"]

SCHEMA = 1
RECORD, RUN, WORK = "artifact.json", "run.json", "work.json"
_PACKAGES = ("greatctl", "torch", "transformers", "transformer-lens", "safetensors", "tokenizers", "pyarrow")


@dataclass(frozen=True)
class Identity:
    """What was asked for. Equal identities give equal outputs; no time, path or host belongs in here.

    Attributes:
        stage: the stage's name.
        config: every setting that changes the outputs (JSON values), the seed included.
        inputs: name -> fingerprint of each input artifact.
        plugins: name -> digest of each plugin item used (built-ins are not listed).
        model_revision: hash or commit of the model's weights, where one is used.
    """

    stage: str
    config: Mapping[str, object]
    inputs: Mapping[str, str] = field(default_factory=dict)
    plugins: Mapping[str, str] = field(default_factory=dict)
    model_revision: str | None = None

    def record(self) -> dict[str, object]:
        """The identity as JSON values."""
        return {
            "stage": self.stage,
            "config": dict(self.config),
            "inputs": dict(self.inputs),
            "plugins": dict(self.plugins),
            "model_revision": self.model_revision,
        }

    @property
    def fingerprint(self) -> str:
        """sha256 of the canonical JSON of the identity."""
        return sha256_bytes(canonical_json(self.record()).encode())


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

        A file whose size, inode and times are as at sealing is taken as intact; anything else is hashed. `deep` hashes
        every file.
        """
        stamps = self.run.get("stamps", {})
        found = []
        for row in self.outputs:
            path = self.path / row["path"]
            if not path.is_file():
                found.append(f"{row['path']} (missing)")
            elif path.stat().st_size != row["bytes"]:
                found.append(f"{row['path']} ({path.stat().st_size:,} bytes instead of {row['bytes']:,})")
            elif not deep and stamps.get(row["path"]) == _stamp(path):  # type: ignore[union-attr]
                continue
            elif sha256_file(path) != row["sha256"]:
                found.append(f"{row['path']} (content differs from its sha256)")
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
        raw = record_path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} is not a finished artifact", why=f"there is no {RECORD} in it") from None
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
    try:
        run = json.loads((path / RUN).read_bytes())
    except (OSError, ValueError):
        run = {}
    return Artifact(path, record, run if isinstance(run, dict) else {})


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
    return (None, "damaged: " + damaged[0]) if damaged else (artifact, "")


def difference(old: Mapping, new: Mapping) -> str:
    """The first difference between two identities, in words ("config.k 64 -> 32")."""
    for part in ("stage", "config", "inputs", "plugins", "model_revision"):
        before, after = old.get(part), new.get(part)
        if before == after:
            continue
        if not (isinstance(before, Mapping) and isinstance(after, Mapping)):
            return f"{part} {before} -> {after}"
        for key in sorted({*before, *after}):
            if before.get(key) != after.get(key):
                if part in ("inputs", "plugins"):
                    return f"{part}.{key} changed"
                return f"{part}.{key} {before.get(key)} -> {after.get(key)}"
    return "the fingerprint differs"


class Work:
    """A folder being made. Write into `path`, then `seal`."""

    def __init__(self, final: Path, identity: Identity, origins: Mapping[str, str], resumed: bool) -> None:
        self.final = final
        self.path = _partial(final)
        self.identity = identity
        self.origins = origins
        self.resumed = resumed

    def seal(
        self,
        summary: Mapping[str, object],
        *,
        hashes: Mapping[str, tuple[int, str]] | None = None,
        **run: object,
    ) -> Artifact:
        """Hash the outputs, write run.json and artifact.json, and swap the folder in.

        Args:
            summary: the stage's `--json` summary (kept in run.json).
            hashes: relative path -> (bytes, sha256) of files whose hash is already known.
            run: more for run.json (seconds, rates, host).
        """
        sweep(self.path)
        (self.path / WORK).unlink(missing_ok=True)
        files = sorted(p for p in self.path.rglob("*") if p.is_file() and p.name not in (RECORD, RUN))
        names = [p.relative_to(self.path).as_posix() for p in files]
        known = hashes or {}
        outputs = []
        for name, path in zip(names, files, strict=True):
            size, digest = known.get(name) or (path.stat().st_size, sha256_file(path))
            outputs.append({"path": name, "bytes": size, "sha256": digest})
        stamps = {name: _stamp(path) for name, path in zip(names, files, strict=True)}
        sequence = _next_sequence(self.final.parent)
        write_json(self.path / RUN, {**run, "summary": dict(summary), "stamps": stamps, "sequence": sequence})
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
        write_text(self.path / RECORD, _render({**body, "digest": _digest(body)}).decode())
        _swap(self.final)
        return load(self.final)


@contextmanager
def work(
    final: Path, identity: Identity, *, origins: Mapping[str, str] | None = None, fresh: bool = False
) -> Iterator[Work]:
    """Lock `final` and open its work folder: resumed where a killed run of the same identity left it, else empty.

    A sealed but damaged artifact of the same identity is reopened, so that only its damaged parts are redone. An older
    artifact of another identity stays in place until `seal` replaces it. `fresh` starts from nothing.

    Raises:
        LockedError: another process works on it.
    """
    with hold(final):
        _settle(final)
        partial = _partial(final)
        if fresh or _work_fingerprint(partial) != identity.fingerprint:
            shutil.rmtree(partial, ignore_errors=True)
        if not fresh and not partial.exists() and _same_but_damaged(final, identity):
            final.rename(partial)  # first, so that a kill in between is undone by _settle
            (partial / RECORD).unlink()
        resumed = partial.exists()
        make_dir(partial)
        write_json(partial / WORK, {"fingerprint": identity.fingerprint})
        sweep(partial)
        yield Work(final, identity, origins or {}, resumed)


def touch(artifact: Artifact) -> None:
    """Note that `artifact` was asked for again, so that it is the newest of its kind."""
    run = {**artifact.run, "sequence": _next_sequence(artifact.path.parent)}
    write_json(artifact.path / RUN, run)


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
    return sorted(found, key=lambda a: (_sequence(a), a.path.as_posix()))


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


def _partial(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")


def _old(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


def _render(record: Mapping[str, object]) -> bytes:
    return (canonical_json(record, indent=1) + "\n").encode()


def _digest(body: Mapping[str, object]) -> str:
    return sha256_bytes(canonical_json(body).encode())


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _sequence(artifact: Artifact) -> int:
    value = artifact.run.get("sequence", 0)
    return value if isinstance(value, int) else 0


def _next_sequence(siblings: Path) -> int:
    root = siblings.parent if siblings.parent.name == "activations" else siblings
    return 1 + max((_sequence(a) for a in sealed_under(root)), default=0)


def _work_fingerprint(partial: Path) -> str | None:
    try:
        return json.loads((partial / WORK).read_bytes())["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _same_but_damaged(final: Path, identity: Identity) -> bool:
    try:
        artifact = load(final)
        return artifact.fingerprint == identity.fingerprint and bool(artifact.damaged())
    except (InputError, IntegrityError):
        return False


def _swap(final: Path) -> None:
    old = _old(final)
    if final.exists():
        final.rename(old)
    _partial(final).rename(final)
    fsync_dir(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _settle(final: Path) -> None:
    """Finish or undo a swap that a kill interrupted."""
    old, partial = _old(final), _partial(final)
    if not final.exists() and (partial / RECORD).exists():
        partial.rename(final)
    if old.exists():
        if final.exists():
            shutil.rmtree(old)
        else:
            old.rename(final)
