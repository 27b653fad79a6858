"""`greatctl doctor`: is this machine fit for the work?"""

from __future__ import annotations

import typer

from ..help import Command
from ..options import JsonFlag, Root, epilog

EXAMPLES = ("greatctl doctor", "greatctl --data-dir /mnt/disk/greatctl doctor --json")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @app.command("doctor", cls=Command, epilog=epilog(EXAMPLES), rich_help_panel="Around the stages")
    def doctor(ctx: typer.Context, as_json: JsonFlag = False) -> None:
        """Check Python, packages, GPU, disk, model access, file locks and cloud-synced folders."""
        from ...stages.doctor import examine
        from ..output import document, print_document, print_result
        from ..session import open_project
        from ..views.status import render_checks

        root: Root = ctx.obj or Root()
        checks = examine(open_project(root, quiet=True), offline=root.offline)
        failed = any(check["state"] == "failed" for check in checks)
        if as_json:
            print_document(document("doctor", None, {"checks": checks, "healthy": not failed}))
        else:
            print_result(render_checks(checks))
        raise typer.Exit(1 if failed else 0)
