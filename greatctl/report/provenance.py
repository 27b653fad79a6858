"""Where every number comes from: each artifact with its settings and their origins, its inputs, and its files' hashes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..store.artifact import Artifact
from .tables import metadata
from .view import Block, Prose, Record, Table

__all__ = ["section"]

_WORDS = (
    "A fingerprint says what was asked for: stage, settings, inputs, plugins and the model's revision. Every file's sha256 "
    "says what came out; `greatctl verify` hashes them again. Numbers on this page name the artifact that they come from."
)


def section(artifacts: Iterable[Artifact], sources: Mapping[str, Artifact], root: Path) -> list[Block]:
    """A record for each artifact, the texts as they were fetched, and the versions of the packages.

    Args:
        sources: source id -> what `fetch` kept of it.
        root: the project's folder; paths are shown relative to it.
    """
    given = list({artifact.fingerprint: artifact for artifact in artifacts}.values())
    blocks: list[Block] = [Prose(_WORDS), *(_record(artifact, root) for artifact in given)]
    if sources:
        blocks.append(_fetched(sources))
    versions = {json.dumps(a.record.get("versions") or {}, sort_keys=True) for a in given}
    for text in sorted(versions):
        used = ", ".join(f"{name} {version}" for name, version in json.loads(text).items())
        blocks.append(Prose(f"Made with {used}.", quiet=True))
    return blocks


def _record(artifact: Artifact, root: Path) -> Record:
    record = artifact.record
    facts = [("seed", record.get("seed")), ("model revision", record.get("model_revision"))]
    facts += [(f"plugin {name}", digest) for name, digest in _of(record, "plugins").items()]
    origins = _of(record, "origins")
    settings = [(str(k), _said(v), str(origins.get(k, ""))) for k, v in artifact.config.items()]
    return Record(
        stage=artifact.stage,
        path=_relative(artifact.path, root),
        fingerprint=artifact.fingerprint,
        facts=[(name, str(value)) for name, value in facts if value is not None],
        settings=settings,
        inputs=[(name, str(value)) for name, value in _of(record, "inputs").items()],
        files=[(str(row["path"]), int(row["bytes"]), str(row["sha256"])) for row in artifact.outputs],
    )


def _of(record: Mapping[str, object], key: str) -> dict[str, object]:
    value = record.get(key)
    return dict(value) if isinstance(value, Mapping) else {}


def _said(value: object) -> str:
    """A setting as text, whole."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _fetched(sources: Mapping[str, Artifact]) -> Table:
    rows = []
    for name, artifact in sources.items():
        facts = metadata(artifact.path)
        text = facts.get("text") or {}
        rows.append([name, facts.get("url") or "", facts.get("rights"), text.get("bytes"), text.get("sha256"),
                     artifact.fingerprint])  # fmt: skip
    headers = ["source", "from", "rights", "bytes kept", "sha256 of the text", "fingerprint"]
    return Table(headers, rows, numeric=[3], caption="The texts as they were fetched", folded=True)


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
