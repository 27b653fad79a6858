"""What can go wrong, in one place.

Every error that a person can cause carries *what* happened, *why*, and a *fix* that can be copied, together with a stable
code and the exit code that the command line ends with. Library code raises these; only `greatctl.cli` prints them.
Standard library only: this file is the ground floor.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar

__all__ = [
    "AccessError",
    "BugError",
    "GreatctlError",
    "InputError",
    "IntegrityError",
    "InterruptedRun",
    "LockedError",
    "ManifestError",
    "NetworkError",
    "PluginError",
    "ResourceError",
    "StageError",
    "UsageError",
    "did_you_mean",
    "nearest",
]


class GreatctlError(Exception):
    """Base of every error that greatctl raises on purpose.

    Args:
        message: one sentence that names the thing ("character 'darwn' is not in the manifest").
        why: why this is an error, or what caused it.
        fix: a command or an edit that mends it.
        where: file, `file:line:column`, or URL.
        code: stable kebab-case name; defaults to the class's.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1

    def __init__(
        self, message: str, *, why: str = "", fix: str = "", where: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.why = why
        self.fix = fix
        self.where = where
        self.name = code or type(self).code

    def to_json(self) -> dict[str, object]:
        """The error object of the `--json` document: code, message, why, fix, where."""
        return {
            "code": self.name,
            "message": self.message,
            "why": self.why,
            "fix": self.fix,
            "where": self.where,
        }


class StageError(GreatctlError):
    """A stage ran and failed (exit 1)."""

    code = "stage-failed"
    exit_code = 1


class UsageError(GreatctlError):
    """The words on the command line or in the environment are off (exit 2)."""

    code = "usage"
    exit_code = 2


class ManifestError(GreatctlError):
    """sources.toml or a setting is invalid (exit 3)."""

    code = "manifest"
    exit_code = 3


class AccessError(GreatctlError):
    """A model is gated, or a token is missing or wrong (exit 4)."""

    code = "access"
    exit_code = 4


class InputError(GreatctlError):
    """An input that an earlier stage makes is missing or out of date (exit 5)."""

    code = "input"
    exit_code = 5


class IntegrityError(GreatctlError):
    """Bytes are not what was recorded: a hash, a shard, a schema (exit 6)."""

    code = "integrity"
    exit_code = 6


class NetworkError(GreatctlError):
    """The network failed after retries, or an address is not permitted (exit 7)."""

    code = "network"
    exit_code = 7


class PluginError(GreatctlError):
    """A plugin failed or broke its contract, and the run needs it (exit 8)."""

    code = "plugin"
    exit_code = 8


class ResourceError(GreatctlError):
    """Out of disk, memory or GPU memory, or a device is not there (exit 9)."""

    code = "resource"
    exit_code = 9


class LockedError(GreatctlError):
    """Another process works on the same artifact (exit 10)."""

    code = "locked"
    exit_code = 10


class BugError(GreatctlError):
    """Something that should not happen did (exit 70)."""

    code = "bug"
    exit_code = 70


class InterruptedRun(GreatctlError):
    """The run was asked to stop and stopped after a checkpoint (exit 130 for SIGINT, 143 for SIGTERM)."""

    code = "interrupted"

    def __init__(self, signal_number: int, *, fix: str = "") -> None:
        super().__init__(
            "stopped on request; what was finished is kept",
            why=f"signal {signal_number} was received",
            fix=fix or "run the same command again: it resumes at the last checkpoint",
        )
        self.signal_number = signal_number

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        """128 + the signal's number, as shells expect."""
        return 128 + self.signal_number


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """Up to three known names that look like `name`, best first."""
    known = list(names)
    folded = {n.casefold(): n for n in known}
    hits = difflib.get_close_matches(name.casefold(), list(folded), n=3, cutoff=0.5)
    inside = [n for n in known if name and name.casefold() in n.casefold()]
    return list(dict.fromkeys([folded[h] for h in hits] + inside))[:3]


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A fix sentence for an unknown name: the nearest names, or all of them when nothing is near."""
    known = sorted(names)
    close = nearest(name, known)
    if close:
        return "did you mean " + " or ".join(repr(n) for n in close) + "?"
    return "known names: " + ", ".join(known[:20]) if known else "none is known here"
