"""`greatctl tokenize`: clean texts into windows of tokens."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Option

from ..options import stage_command

EXAMPLES = (
    "greatctl tokenize --model bundled",
    "greatctl tokenize --character darwin --window 512",
    "greatctl tokenize --export pt",
    "greatctl tokenize --texts web --worker 1/8",
)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @stage_command(app, "tokenize", EXAMPLES)
    def tokenize(
        model: Annotated[str | None, Option(metavar="NAME_OR_DIR", help="Model whose tokenizer is used.")] = None,
        window: Annotated[int | None, Option(help="Tokens a window, the BOS included (default 256).")] = None,
        character: Annotated[list[str] | None, Option(metavar="ID", help="Only this character (repeatable).")] = None,
        overlap: Annotated[
            str | None, Option(metavar="remove|keep", help="Passages that two works share (default: remove).")
        ] = None,
        max_tokens_per_character: Annotated[
            int | None, Option(metavar="N", help="Tokens that one character may bring (default 400,000; 0 = all).")
        ] = None,
        texts: Annotated[
            str | None, Option(metavar="DIR", help="Read a folder of text files instead of the sources.")
        ] = None,
        worker: Annotated[str | None, Option(metavar="I/N", help="Make only every Nth part.")] = None,
        export: Annotated[str | None, Option(metavar="FORMAT", help="Also write pt, datasets or parquet.")] = None,
    ) -> None:
        """Cut every text on disk into fixed windows of tokens, with spans back to the text."""
