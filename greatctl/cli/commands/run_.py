"""`greatctl run`: the chain, from the manifest."""

from __future__ import annotations

from typing import Annotated

import typer

from ..completion import completer
from ..help import Command
from ..options import COMMON, Common, JsonFlag, QuietFlag, Root, epilog

EXAMPLES = ("greatctl run", "greatctl run --from train", "greatctl run --from tokenize --to harvest --json")
_STAGES = completer("run", "start")
_FORCE, _DEVICE, _SEED = (COMMON[name][0] for name in ("force", "device", "seed"))


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @app.command("run", cls=Command, epilog=epilog(EXAMPLES), rich_help_panel="Around the stages")
    def run(
        ctx: typer.Context,
        start: Annotated[
            str, typer.Option("--from", metavar="STAGE", help="First stage.", autocompletion=_STAGES)
        ] = "fetch",
        end: Annotated[
            str, typer.Option("--to", metavar="STAGE", help="Last stage.", autocompletion=_STAGES)
        ] = "report",
        mirror: Annotated[str | None, typer.Option(metavar="URL", help="Fetch the bytes from here.")] = None,
        as_json: JsonFlag = False,
        quiet: QuietFlag = False,
        force: _FORCE = False,  # type: ignore[valid-type]
        seed: _SEED = None,  # type: ignore[valid-type]
        device: _DEVICE = None,  # type: ignore[valid-type]
    ) -> None:
        """Run the stages in order with the manifest's settings; what is up to date is skipped with a word.

        `train` also trains the companions (--controls), unless [train] says controls = false.
        """
        from ..chain import run_chain
        from ..output import document, print_document, print_result
        from ..views.chain import render_chain

        common = Common(as_json=as_json, quiet=quiet, force=force, seed=seed, device=device)
        flags = {"fetch": {"mirror": mirror}} if mirror else {}
        implied = {"train": {"controls": True}}
        results = run_chain(ctx.obj or Root(), start, end, flags, common, implied=implied)
        code = max((r.exit_code for r in results), default=0)
        if as_json:
            summary = {"stages": {r.stage: dict(r.summary) for r in results}}
            print_document(document("run", results[-1].artifact if results else None, summary))
        else:
            print_result(render_chain(results))
        raise typer.Exit(code)
