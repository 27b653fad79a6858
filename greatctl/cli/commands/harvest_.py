"""`greatctl harvest`: read the windows with the frozen model and keep the residual stream."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Option

from ..options import stage_command

EXAMPLES = (
    "greatctl harvest",
    "greatctl harvest --layer 16 --dtype bfloat16",
    "greatctl harvest --device cuda --compile on",
    "greatctl harvest --hook-point blocks.15.hook_resid_post --hook-point blocks.20.hook_resid_post",
)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @stage_command(app, "harvest", EXAMPLES)
    def harvest(
        model: Annotated[str | None, Option(metavar="NAME_OR_DIR", help="Default: the model of the tokens.")] = None,
        hook_point: Annotated[list[str] | None, Option(metavar="NAME", help="Where to read (repeatable).")] = None,
        layer: Annotated[int | None, Option(help="Short for blocks.N.hook_resid_post.")] = None,
        dtype: Annotated[str | None, Option(help="float32, bfloat16, float16 or auto.")] = None,
        batch_size: Annotated[int | None, Option(help="Windows a forward pass.")] = None,
        compile: Annotated[str | None, Option(help="Fuse and compile the blocks: auto (CUDA), on or off.")] = None,
        shard_windows: Annotated[int | None, Option(help="Windows a shard (default 256).")] = None,
        worker: Annotated[
            str | None, Option(metavar="I/N", help="Make every Nth shard only; then harvest seals.")
        ] = None,
        engine: Annotated[str | None, Option(help="auto, lean or transformer-lens.")] = None,
    ) -> None:
        """Run the frozen model over every window and store the activations of one or more hook points."""
