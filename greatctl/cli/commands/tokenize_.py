"""`greatctl tokenize`: clean texts into windows of tokens."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Option

from ..options import stage_command

EXAMPLES = (
    "greatctl tokenize",
    "greatctl tokenize --model bundled",
    "greatctl tokenize --character darwin --window 512",
    "greatctl tokenize --export pt",
)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @stage_command(app, "tokenize", EXAMPLES)
    def tokenize(
        model: Annotated[str | None, Option(metavar="NAME_OR_DIR", help="Model whose tokenizer is used.")] = None,
        window: Annotated[int | None, Option(help="Tokens a window, the BOS included (default 256).")] = None,
        character: Annotated[list[str] | None, Option(metavar="ID", help="Only this character (repeatable).")] = None,
        export: Annotated[str | None, Option(metavar="FORMAT", help="Also write pt, datasets or parquet.")] = None,
    ) -> None:
        """Cut every text on disk into fixed windows of tokens, with spans back to the text."""
