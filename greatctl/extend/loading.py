"""Finding and importing plugins, one by one and without trust in their manners.

A `Candidate` is a plugin that was found and not yet run. Finding never imports: a broken distribution, file
or entry point spoils nothing but itself. `pluggy.load_setuptools_entrypoints` is not used, since one bad
entry point there ends the program and of two with the same name one is dropped in silence.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from ..errors import GreatctlError, UsageError

__all__ = [
    "Candidate",
    "Loaded",
    "code_digest",
    "describe",
    "forget",
    "from_path",
    "in_folder",
    "installed",
    "stdout_to_stderr",
]

GROUP = "greatctl"


@dataclass(frozen=True)
class Loaded:
    """A plugin that was imported: the object that holds its hooks, the sha256 that stands for its code, and
    the package that its relative targets (".module:Class") start from."""

    plugin: object
    version: str | None
    digest: str | None
    package: str | None = None


@dataclass(frozen=True)
class Candidate:
    """A plugin that was found and not yet run.

    Attributes:
        name: the entry point's name, or the file's as a slug.
        origin: `builtin`, `installed: DISTRIBUTION VERSION`, or the path.
        load: imports it; may raise anything.
        modules: prefix of the modules to forget when it fails; empty for installed ones, whose modules others
            may share.
    """

    name: str
    origin: str
    load: Callable[[], Loaded]
    modules: str
    version: str | None = None


def installed() -> list[Candidate]:
    """Entry points of the group `greatctl`, sorted by distribution and name. A file that cannot be read is a
    candidate too, whose loading says so."""
    found: dict[str, list[Candidate]] = {}
    for distribution in metadata.distributions():
        text = distribution.read_text("entry_points.txt")
        if not text or GROUP not in text:
            continue
        name, version = _identity(distribution)
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key not in found:  # the first on the path is the one that Python imports
            found[key] = _of_distribution(distribution, name, version)
    return [candidate for key in sorted(found) for candidate in found[key]]


def _identity(distribution: metadata.Distribution) -> tuple[str, str]:
    fields = distribution.metadata
    return str(fields["Name"] or "unnamed"), str(fields["Version"] or "?")


def _of_distribution(distribution: metadata.Distribution, name: str, version: str) -> list[Candidate]:
    origin = f"installed: {name} {version}"
    try:
        points = [point for point in distribution.entry_points if point.group == GROUP]
    except Exception as error:  # entry_points.txt is foreign text, and its parser raises what it likes
        return [Candidate(_slug(name), origin, _raiser(error), "", version)]
    return [
        Candidate(p.name, origin, _entry_point_loader(p, name, version), "", version)
        for p in sorted(points, key=lambda point: point.name)
    ]


def _raiser(error: Exception) -> Callable[[], Loaded]:
    def load() -> Loaded:
        raise error

    return load


def _entry_point_loader(point: metadata.EntryPoint, distribution: str, version: str) -> Callable[[], Loaded]:
    def load() -> Loaded:
        plugin = point.load()
        module = sys.modules[point.module]
        top = sys.modules[point.module.partition(".")[0]]
        file = Path(top.__file__ or module.__file__ or "")  # a namespace package has no file of its own
        code = code_digest(file.parent if file.name == "__init__.py" else file)
        digest = hashlib.sha256(f"{distribution}\n{version}\n{code}".encode()).hexdigest()
        return Loaded(plugin, version, digest, module.__package__)

    return load


def in_folder(folder: Path) -> list[Candidate]:
    """`*.py` and `*/__init__.py` of a folder by name, without tests and names that begin with '_' or '.'."""
    if not folder.is_dir():
        return []
    found = [*folder.glob("*.py"), *(path.parent for path in folder.glob("*/__init__.py"))]
    others = ("_", ".", "test_", "conftest.")
    return [_local(path) for path in sorted(found) if not path.name.startswith(others)]


def from_path(path: str) -> list[Candidate]:
    """The plugin at a path: a file, a package folder, or every plugin of a plain folder.

    Raises:
        UsageError: nothing is there.
    """
    place = Path(path)
    if not place.exists():
        raise UsageError(
            f"--plugin {path}: no such file or folder",
            why="relative paths start at the current folder",
            fix="check the path",
        )
    if place.is_dir() and not (place / "__init__.py").exists():
        return in_folder(place)
    return [_local(place)]


def _local(path: Path) -> Candidate:
    path = path.resolve()
    name = _slug(path.stem if path.is_file() else path.name)
    mark = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    module = f"greatctl_local_{name.replace('-', '_')}_{mark}"
    return Candidate(name, str(path), lambda: _load_file(path, module), module)


class _Source(SourceFileLoader):
    """Runs the file as it is now: a cached .pyc is trusted by size and second, and an edit may keep both."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def _load_file(path: Path, name: str) -> Loaded:
    package = path.is_dir()
    file = path / "__init__.py" if package else path
    spec = importlib.util.spec_from_file_location(
        name,
        file,
        loader=_Source(name, str(file)),
        submodule_search_locations=[str(path)] if package else None,
    )
    assert spec is not None and spec.loader is not None  # both were just given
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: relative imports and dataclasses look themselves up here
    digest = code_digest(path)
    spec.loader.exec_module(module)
    version = getattr(module, "__version__", None)
    return Loaded(module, None if version is None else str(version), digest, module.__package__)


def code_digest(path: Path) -> str:
    """sha256 of a file, or of the names and bytes of a folder's files (caches and hidden files left out)."""
    if not path.is_dir():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    total = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        parts = file.relative_to(path).parts
        if file.is_file() and not any(part == "__pycache__" or part.startswith(".") for part in parts):
            total.update("/".join(parts).encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "plugin"


def forget(prefix: str, before: frozenset[str]) -> None:
    """Drop the modules of a failed plugin that were not there before it (none for an empty prefix)."""
    for name in [n for n in sys.modules if n not in before and (n == prefix or n.startswith(prefix + "."))]:
        del sys.modules[name]


def describe(error: BaseException) -> str:
    """A failure in one line: type, words, and file:line of the innermost frame."""
    if isinstance(error, GreatctlError):
        return f"{error.message} ({error.why})" if error.why else error.message
    words = " ".join(str(error).split())
    text = f"{type(error).__name__}: {words}" if words else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    if frames and not isinstance(error, SyntaxError):  # a syntax error names its own file and line
        text += f" ({frames[-1].filename}:{frames[-1].lineno})"
    return text


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """What foreign code prints goes to stderr, from Python or from below it: stdout belongs to the result."""
    try:
        saved = os.dup(1)
    except OSError:  # stdout is closed: nothing to protect
        saved = None
    if saved is not None:
        _flush()
        with contextlib.suppress(OSError):  # stderr is closed
            os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if saved is not None:
            _flush()
            os.dup2(saved, 1)
            os.close(saved)


def _flush() -> None:
    for stream in (sys.stdout, sys.__stdout__):
        if stream is not None:
            # Closed, or its reader is gone: whoever writes the result will say so.
            with contextlib.suppress(ValueError, OSError):
                stream.flush()
