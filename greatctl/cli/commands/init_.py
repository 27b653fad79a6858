"""`greatctl init`: start a project with a copy of the packaged sources.toml."""

from __future__ import annotations

from pathlib import Path

import typer

from ..help import Command
from ..options import JsonFlag, Root, epilog

EXAMPLES = ("greatctl init", "greatctl -C my-study init")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @app.command("init", cls=Command, epilog=epilog(EXAMPLES), rich_help_panel="Around the stages")
    def init(ctx: typer.Context, as_json: JsonFlag = False) -> None:
        """Write sources.toml here (or under -C DIR); an existing one is left alone."""
        from ...errors import UsageError
        from ...manifest import packaged_path
        from ...store.files import make_dir, write_bytes
        from ..output import document, print_document, stdout
        from ..text import paragraphs

        root: Root = ctx.obj or Root()
        target = (root.project or Path()).absolute() / "sources.toml"
        if target.exists():
            raise UsageError(
                f"{target} exists already",
                why="init never overwrites a manifest",
                fix="edit it, or choose another folder with -C DIR",
                where=str(target),
            )
        make_dir(target.parent)
        write_bytes(target, packaged_path().read_bytes())
        if as_json:
            print_document(document("init", target, {"manifest": str(target)}))
        else:
            stdout().print(paragraphs(f"wrote {target}\nnext: greatctl fetch --estimate, then greatctl fetch"))
