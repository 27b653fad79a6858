"""`greatctl verify`: hash every artifact."""

from __future__ import annotations

import typer

from ..help import Command
from ..options import JsonFlag, Root, epilog

EXAMPLES = ("greatctl verify", "greatctl -C greatctl-demo verify --json")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @app.command("verify", cls=Command, epilog=epilog(EXAMPLES), rich_help_panel="Around the stages")
    def verify(ctx: typer.Context, as_json: JsonFlag = False) -> None:
        """Hash every output of every artifact; one changed bit ends with exit code 6 and the file's name."""
        from ...errors import IntegrityError
        from ...stages.status import damage
        from ..output import document, print_document, stdout
        from ..session import open_project
        from ..text import literal

        root: Root = ctx.obj or Root()
        checked, found = damage(open_project(root, quiet=as_json))
        if found:
            raise IntegrityError(
                f"{len(found)} of {checked} artifacts are damaged: {found[0]}",
                why="; ".join(found[:10]),
                fix="run the stage of each again: it redoes what is damaged",
                where=found[0].split(" (")[0],
            )
        if as_json:
            print_document(document("verify", None, {"artifacts": checked, "damaged": []}))
        else:
            stdout().print(literal(f"{checked} artifacts, every file as it was sealed"))
