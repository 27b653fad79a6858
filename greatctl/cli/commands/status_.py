"""`greatctl status`: the state of every artifact, and the reason where it is not good."""

from __future__ import annotations

import typer

from ..help import Command
from ..options import JsonFlag, Root, epilog

EXAMPLES = ("greatctl status", "greatctl -C greatctl-demo status --json")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @app.command("status", cls=Command, epilog=epilog(EXAMPLES), rich_help_panel="Around the stages")
    def status(ctx: typer.Context, as_json: JsonFlag = False) -> None:
        """Show each artifact with its state: up to date, stale (and the first reason), damaged or missing."""
        from ...stages.context import STAGES
        from ...stages.status import survey
        from ..next_step import command
        from ..output import document, print_document, print_result, stdout
        from ..session import open_project
        from ..text import literal
        from ..views.status import render_status

        root: Root = ctx.obj or Root()
        project = open_project(root, quiet=as_json)
        rows = survey(project, paths=root.plugins)
        if as_json:
            print_document(document("status", None, {"artifacts": rows}))
        else:
            print_result(render_status(rows))
            undone = next(
                (row["stage"] for row in rows if row["state"] != "up-to-date" and row["stage"] in STAGES), None
            )
            if undone:
                stdout().print(
                    literal("next  ", "dim").append_text(literal(command(root, str(undone)))), soft_wrap=True
                )
