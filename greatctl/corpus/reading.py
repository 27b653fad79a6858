"""Calling into a source, and holding what came against what is known of it.

A source may be a plugin's, so whatever it raises is told as the plugin's fault, and whatever it names or returns is
checked before it is used.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, TypeVar

from ..errors import GreatctlError, IntegrityError, PluginError
from ..extend.contracts import Document, Resource, Source
from ..store.files import sha256_bytes
from .manual import Manual

if TYPE_CHECKING:
    from ..manifest import Entry

__all__ = ["differences", "facts_of", "locate", "mismatch", "read", "verify"]

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_OURS = ("text.txt", "removed.txt", "metadata.json", "artifact.json", "run.json", "work.json")

T = TypeVar("T")


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


def read(
    entry: Entry, source: Source, files: Mapping[str, bytes], plugins: Mapping[str, str], *, brought: bool = False
) -> Document:
    """The document in `files`; a person's file that is no plain text is read as a manual source's.

    Raises:
        GreatctlError: what the source raises.
        PluginError: the source's code failed, or gave no document with text.
    """
    if brought and not all(PurePosixPath(name).suffix == ".txt" for name in files):
        return Manual().read(entry, files)
    document = _guarded(entry, plugins, lambda: source.read(entry, files))
    if not isinstance(document, Document) or not isinstance(document.text, str) or not document.text.strip():
        raise PluginError(
            f"source kind {entry.kind!r} gave no document for {entry.id!r}",
            why=f"read() returned {type(document).__name__} instead of a Document with text",
            fix="mend the plugin's read()",
        )
    return document


def verify(resource: Resource, data: bytes) -> None:
    """Hold a download against the facts that are known of it.

    Raises:
        IntegrityError: size or a hash is another.
    """
    if why := mismatch(resource, data):
        raise IntegrityError(
            f"{resource.filename} is not the file that its record describes",
            why=why,
            fix="run the same command again; if it stays so, record or file is broken at the source",
            where=resource.url,
        )


def mismatch(resource: Resource, data: bytes) -> str:
    """The first fact of `resource` that `data` does not meet, in words; empty where it meets all."""
    if resource.size not in (None, len(data)):
        return f"size is {len(data):,}, should be {resource.size:,}"
    for name in ("md5", "sha1", "sha256"):
        wanted = getattr(resource, name)
        found = hashlib.new(name, data, usedforsecurity=False).hexdigest() if wanted else None
        if wanted != found:
            return f"{name} is {found}, should be {wanted}"
    return ""


def facts_of(files: Mapping[str, bytes]) -> dict[str, str]:
    """File name -> sha256."""
    return {name: sha256_bytes(data) for name, data in files.items()}


def differences(old: Mapping[str, bytes], new: Mapping[str, bytes]) -> str:
    """What became of a work at its source: sizes, hashes, and how many lines came and went."""
    changed = [name for name in new if old.get(name) != new[name]]
    gone = [name for name in old if name not in new]
    before = Counter(line for name in old for line in old[name].splitlines())
    after = Counter(line for name in new for line in new[name].splitlines())
    came, went = after - before, before - after
    example = next((line.decode("utf-8", "replace").strip() for line in came if line.strip()), "")
    sizes = f"{_total(old):,} -> {_total(new):,} bytes, sha256 {_digest(old)[:12]} -> {_digest(new)[:12]}"
    lines = f"{came.total():,} lines came and {went.total():,} went"
    parts = f" in {len(changed) + len(gone)} of {len(new)} files" if len(new) > 1 else ""
    return f"{sizes}, {lines}{parts}" + (f", such as {example[:60]!r}" if example else "")


def _total(files: Mapping[str, bytes]) -> int:
    return sum(map(len, files.values()))


def _digest(files: Mapping[str, bytes]) -> str:
    return hashlib.sha256(b"".join(files.values())).hexdigest()


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
