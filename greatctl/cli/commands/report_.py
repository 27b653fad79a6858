"""`greatctl report`: everything on one page that opens without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from ..options import stage_command

EXAMPLES = (
    "greatctl report",
    "greatctl report --open",
    "greatctl report --output greatness.html",
    "greatctl report --format md --output findings.md",
)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @stage_command(app, "report", EXAMPLES)
    def report(
        open_browser: Annotated[bool, Option("--open", help="Open it in the browser.")] = False,
        output: Annotated[Path | None, Option("--output", metavar="FILE", help="Also write a copy here.")] = None,
        latents: Annotated[int | None, Option(help="Latents with a page of their own (default 24).")] = None,
        format: Annotated[str | None, Option("--format", help="html (default), md or json.")] = None,
    ) -> None:
        """Write one self-contained HTML file: corpus, training, features, contrasts, patch maps, provenance."""
