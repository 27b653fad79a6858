"""From a work folder to a sealed one and back, by renames that a kill at any instant cannot tear.

`NAME` is the sealed folder, `.NAME.partial` the one being made, `.NAME.old` the one being replaced. A work folder holds
work.json: for what it is made, and which of its folders are dropped once it is sealed. It is *sealed* from the moment
that artifact.json lies in it; everything that is only clearing up comes after that, so nothing that a rerun could still
use is gone before there is something better.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from .files import fsync_dir, read_bytes, write_json

__all__ = ["RECORD", "RUN", "WORK", "note", "partial_of", "read_json", "settle", "swap", "tidy", "wanted"]

RECORD, RUN, WORK = "artifact.json", "run.json", "work.json"


def partial_of(final: Path) -> Path:
    """The folder in which `final` is made."""
    return final.with_name(f".{final.name}.partial")


def read_json(path: Path) -> dict:
    """The JSON object in a file that we can do without; {} where there is none."""
    try:
        value = json.loads(read_bytes(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def note(folder: Path, fingerprint: str, discard: Sequence[str] = ()) -> None:
    """Write work.json."""
    write_json(folder / WORK, {"fingerprint": fingerprint, "discard": list(discard)})


def wanted(folder: Path) -> str | None:
    """The fingerprint that a work folder is made for."""
    return read_json(folder / WORK).get("fingerprint")


def tidy(final: Path) -> None:
    """Remove what the making of a sealed folder needed and what it replaced. What fails is tried again the next time."""
    if not (final / WORK).exists():
        return
    discard = read_json(final / WORK).get("discard", [])
    with contextlib.suppress(OSError):
        for name in discard if isinstance(discard, list) else []:
            inside = isinstance(name, str) and (final / name).parent == final and name != ".."
            if inside and (final / name).is_dir():
                shutil.rmtree(final / name)
        if _old(final).exists():
            shutil.rmtree(_old(final))
        (final / WORK).unlink()  # last: it says that there is something to do


def swap(final: Path) -> None:
    """Put the sealed work folder of `final` in its place; what lay there is kept until `tidy`."""
    old = _old(final)
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    partial_of(final).rename(final)
    fsync_dir(final.parent)


def settle(final: Path) -> None:
    """Finish or undo a swap that a kill interrupted."""
    old = _old(final)
    if (partial_of(final) / RECORD).exists():
        swap(final)
    elif old.exists() and not final.exists():
        old.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _old(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")
