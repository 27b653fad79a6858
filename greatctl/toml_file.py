"""Reading a TOML file that a person wrote, with errors that show the place.

Limits come first (a regular file, 5 MB, UTF-8 with or without BOM), then tomli. What comes back keeps the
positions of all keys, so that later checks can point at them.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tomli

from .errors import ManifestError
from .toml_positions import Positions, line_at, shown

__all__ = ["LIMIT", "TomlFile", "read"]

LIMIT = 5 * 2**20
"""Largest file that is read, in bytes."""


@dataclass(frozen=True)
class TomlFile:
    """A parsed file: its path, its text (no BOM, `\\n` line ends) and its content."""

    path: Path
    text: str
    data: dict[str, Any]

    @cached_property
    def positions(self) -> Positions:
        """Line and column of every header and key."""
        return Positions(self.text)

    def where(self, *path: str | int) -> str:
        """`file:line:column` of a key or table."""
        line, column = self.positions.at(path)
        return f"{self.path}:{line}:{column}"


def read(path: Path) -> TomlFile:
    """Read and parse a TOML file.

    Raises:
        ManifestError: it is missing, no regular file, unreadable, larger than 5 MB, not UTF-8 or not TOML.
    """
    path = Path(path)
    text = _decode(path, _bytes(path))
    try:
        return TomlFile(path, text, tomli.loads(text))
    except RecursionError:
        raise ManifestError(
            f"{path.name} is nested too deeply",
            why="its brackets go hundreds of levels down",
            where=str(path),
        ) from None
    except ValueError as error:
        line, column = getattr(error, "lineno", 1), getattr(error, "colno", 1)
        raise ManifestError(
            f"syntax error in {path.name}, line {line}: {line_at(text, line)}",
            why=shown(getattr(error, "msg", error), 200),
            fix=f"mend line {line}; TOML is described at https://toml.io",
            where=f"{path}:{line}:{column}",
        ) from None


def _bytes(path: Path) -> bytes:
    """The file's bytes, never more than the limit and never from a pipe or a device."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise ManifestError(f"{path.name} is {kind}", why="a TOML file is expected here", where=str(path))
        with path.open("rb") as file:
            raw = file.read(LIMIT + 1)
    except FileNotFoundError:
        raise ManifestError(
            f"there is no {path.name}",
            why="the file does not exist",
            where=str(path),
            fix="`greatctl init` writes the packaged sources.toml into a folder",
        ) from None
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path.name} cannot be read", why=shown(error, 200), where=str(path)) from None
    if len(raw) > LIMIT:
        raise ManifestError(
            f"{path.name} is larger than {LIMIT // 2**20} MB",
            why="no list of sources is that long",
            where=str(path),
            fix="check that this is the right file",
        )
    return raw


def _decode(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - (raw.rfind(b"\n", 0, error.start) + 1) + 1
        raise ManifestError(
            f"{path.name} is not UTF-8",
            why=f"byte 0x{raw[error.start]:02x} on line {line} cannot be decoded",
            fix="save the file as UTF-8",
            where=f"{path}:{line}:{column}",
        ) from None
