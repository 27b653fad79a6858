"""Where results and errors go: the result alone on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from .text import paragraphs, visible

if TYPE_CHECKING:
    from ..errors import GreatctlError

__all__ = ["document", "hanging", "print_document", "print_error", "print_result", "stderr", "stdout"]


def stdout() -> Console:
    """A console on stdout; where it is no terminal 100 columns or $COLUMNS. Below 60 a table would be splinters, so the
    terminal wraps its lines instead.
    """
    known = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit()
    console = Console(file=sys.stdout, highlight=False, width=None if known else 100)
    console.width = max(console.width, 60)
    return console


def stderr() -> Console:
    """A console on stderr. On a terminal lines break between words, in a log they stay whole."""
    console = Console(file=sys.stderr, highlight=False)
    console.soft_wrap = not console.is_terminal
    return console


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
    where = visible(f"{error.where}: ") if error.where and error.where not in error.message else ""
    console = stderr()
    console.print(hanging(Text("error: ", "bold red"), Text.assemble((where, "dim"), visible(error.message)), console))
    for label, words in (("why", error.why), ("fix", error.fix)):
        if words:
            console.print(hanging(Text(f"  {label}: ", "bold"), paragraphs(words), console))
    console.print(Text(f"  [{error.name}]", "dim"))


def hanging(label: Text, words: Text, console: Console) -> RenderableType:
    """A label and its words; on a terminal every further line begins below the first word."""
    if not console.is_terminal:
        lines = words.split("\n")
        return Text("\n" + " " * label.cell_len).join([Text.assemble(label, lines[0]), *lines[1:]])
    view = Table.grid(padding=0)
    view.add_column(width=label.cell_len, no_wrap=True)
    view.add_column(overflow="fold")
    view.add_row(label, words)
    return view
