"""`greatctl fetch`: get the primary texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from ..options import stage_command

EXAMPLES = (
    "greatctl fetch --estimate",
    "greatctl fetch --character darwin --control wood-common-objects",
    'greatctl fetch --import letters.pdf --source buffett-berkshire-letters --origin "the company\'s site"',
    "greatctl fetch --audit --json",
)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @stage_command(app, "fetch", EXAMPLES)
    def fetch(
        character: Annotated[list[str] | None, Option(metavar="ID", help="Only this character (repeatable).")] = None,
        control: Annotated[list[str] | None, Option(metavar="ID", help="Only this control (repeatable).")] = None,
        source: Annotated[list[str] | None, Option(metavar="ID", help="Only this source (repeatable).")] = None,
        mirror: Annotated[str | None, Option(metavar="URL", help="Take the bytes from here; paths stay.")] = None,
        import_file: Annotated[
            Path | None, Option("--import", metavar="FILE", help="Bring a manual source's text (with one --source).")
        ] = None,
        origin: Annotated[str | None, Option(metavar="TEXT", help="Where you got the imported file.")] = None,
        rights: Annotated[str | None, Option(metavar="TEXT", help="Under which rights you may use it.")] = None,
        audit: Annotated[bool, Option("--audit", help="Account for every byte of what is on disk.")] = False,
        estimate: Annotated[bool, Option("--estimate", help="Only say how much there is.")] = False,
        pace: Annotated[float | None, Option(help="Seconds between two requests to one host (default 2).")] = None,
        contact: Annotated[str | None, Option(help="Who you are, for the User-Agent: an address or a page.")] = None,
        timeout: Annotated[float | None, Option(help="Seconds without an answer before a retry.")] = None,
        deadline: Annotated[float | None, Option(help="Seconds after which a file is given up (default 900).")] = None,
        attempts: Annotated[int | None, Option(help="Failures in a row before a file is given up (default 4).")] = None,
        d_model: Annotated[int | None, Option(help="Width of the model, for the size of its activations.")] = None,
        update: Annotated[bool, Option("--update", help="Ask again, and accept texts that changed upstream.")] = False,
    ) -> None:
        """Fetch the primary texts of the manifest: polite, resumable, checked.

        Goes on past a failure; ends with 0 when all is on disk, 11 when something is missing (manual sources too).
        --import takes .txt, .html, .epub and .pdf. Proxies of the environment are not used; --mirror names another base.
        """
