"""`greatctl plugins`: what is loaded, from where, and what failed."""

from __future__ import annotations

import typer

from ..help import Command
from ..options import JsonFlag, Root, epilog

EXAMPLES = ("greatctl plugins", "greatctl --plugin my_metric.py plugins --json")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @app.command("plugins", cls=Command, epilog=epilog(EXAMPLES), rich_help_panel="Around the stages")
    def plugins(ctx: typer.Context, as_json: JsonFlag = False) -> None:
        """List every plugin with its version, its origin, what it gives, and why it failed where it did."""
        from ..output import document, print_document, print_result
        from ..session import open_plugins, open_project
        from ..views.plugins import render_plugins

        root: Root = ctx.obj or Root()
        loaded = open_plugins(root, open_project(root, quiet=True), quiet=True)
        rows = [plugin.to_json() for plugin in loaded.report]
        if as_json:
            print_document(document("plugins", None, {"plugins": rows}))
        else:
            print_result(render_plugins(rows))
