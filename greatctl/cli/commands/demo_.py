"""`greatctl demo`: the whole chain, offline, in two minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..help import Command
from ..options import Common, JsonFlag, QuietFlag, Root, epilog

EXAMPLES = ("greatctl demo", "greatctl demo /tmp/first-look", "greatctl -C greatctl-demo status")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @app.command("demo", cls=Command, epilog=epilog(EXAMPLES), rich_help_panel="Around the stages")
    def demo(
        ctx: typer.Context,
        folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where the project is made.")] = Path(
            "greatctl-demo"
        ),
        as_json: JsonFlag = False,
        quiet: QuietFlag = False,
    ) -> None:
        """Run every stage on the bundled model and texts, with no network, and say what came out."""
        from ..chain import run_demo
        from ..output import document, print_document, print_result
        from ..views.chain import render_demo

        summary = run_demo(ctx.obj or Root(), folder, Common(as_json=as_json, quiet=quiet))
        if as_json:
            print_document(document("demo", Path(str(summary["report"])), summary))
        else:
            print_result(render_demo(summary))
