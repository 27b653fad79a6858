"""The command that people run next, as they would have to type it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .options import Root

if TYPE_CHECKING:
    from ..stages.context import Result

__all__ = ["command", "next_step"]

_AFTER = {"tokenize": "harvest", "harvest": "train", "train": "interpret", "patch": "report", "report": "report --open"}


def command(root: Root, words: str) -> str:
    """`greatctl WORDS` with the folders that this call was given."""
    folders = {"-C": root.project, "--data-dir": root.data_dir, "--results-dir": root.results_dir}
    given = (f"{flag} {shlex.quote(str(folder))}" for flag, folder in folders.items() if folder is not None)
    return " ".join(["greatctl", *given, words])


def next_step(result: Result, root: Root, flags: Mapping[str, Any]) -> str:
    """What to run after a stage; nothing where nothing is obvious, as after a worker's part or an opened report."""
    words = _reading(result, flags) if result.stage == "interpret" else _AFTER.get(result.stage, "")
    if result.stage == "fetch":
        words = "" if flags.get("audit") else ("fetch" if flags.get("estimate") else "tokenize")
    elif result.artifact is None and result.stage != "interpret":
        words = ""
    if result.stage == "report" and flags.get("open_browser"):
        words = ""
    return command(root, words) if words else ""


def _reading(result: Result, flags: Mapping[str, Any]) -> str:
    """From a snippet to its strongest latent, from a latent to steering with it, from hypotheses to patching."""
    sae = f" --sae {shlex.quote(str(flags['sae']))}" if flags.get("sae") else ""
    if "text" in flags:
        top: Any = result.summary.get("top") or []
        strongest = max(top, key=lambda row: row["activation"], default=None)
        return f"interpret{sae} --latent {strongest['latent']}" if strongest else ""
    if "latent" in flags:
        return f"steer{sae} --latent {flags['latent']}"
    return "patch"
