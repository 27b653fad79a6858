"""Where results and errors go: the result alone on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.text import Text

from .text import paragraphs, visible

if TYPE_CHECKING:
    from ..errors import GreatctlError

__all__ = ["document", "print_document", "print_error", "print_result", "stderr", "stdout"]


def stdout() -> Console:
    """A console on stdout; 80 columns when it is not a terminal, so that tables stay tables."""
    return Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 100)


def stderr() -> Console:
    """A console on stderr."""
    return Console(file=sys.stderr, highlight=False, soft_wrap=True)


def document(stage: str, artifact: Path | None, summary: Mapping[str, object], **more: object) -> dict[str, object]:
    """The `--json` document of a success."""
    where = str(artifact.resolve()) if artifact else None
    return {"ok": True, "stage": stage, "artifact": where, "summary": dict(summary), **more}


def print_document(value: object) -> None:
    """Print one strict JSON document (no NaN) on stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=True, allow_nan=False, indent=2) + "\n")
    sys.stdout.flush()


def print_result(renderable: RenderableType) -> None:
    """Print a table or text for people on stdout."""
    stdout().print(renderable)


def print_error(error: GreatctlError, *, as_json: bool) -> None:
    """Say what, why and how to fix: as a JSON document on stdout, or in words on stderr."""
    if as_json:
        print_document({"ok": False, "error": error.to_json()})
        return
    text = Text()
    text.append("error: ", "bold red")
    text.append(visible(f"{error.where}: ") if error.where and error.where not in error.message else "", "dim")
    text.append(visible(error.message) + "\n")
    for label, words in (("why", error.why), ("fix", error.fix)):
        if words:
            text.append(f"  {label}: ", "bold")
            text.append_text(paragraphs(words.replace("\n", "\n       "))).append("\n")
    text.append(f"  [{error.name}]", "dim")
    stderr().print(text)
