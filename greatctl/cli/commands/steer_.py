"""`greatctl steer`: text with and without a latent, beside what would pass for it."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Option

from ..options import stage_command

EXAMPLES = (
    "greatctl steer --latent 118",
    'greatctl steer --latent 118 --strength 2 --prompt "The captain looked at his men and"',
    "greatctl steer --latent 118 --clamp 0 --tokens 20 --against random",
    "greatctl steer --latent 118 --strength -1 --temperature 0.7 --seed 3 --json",
)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @stage_command(app, "steer", EXAMPLES, panel="Around the stages")
    def steer(
        latent: Annotated[list[int] | None, Option(metavar="N", help="The latent to turn.")] = None,
        strength: Annotated[
            float | None, Option(help="Multiples of the latent's largest activation (default 2; below 0: away).")
        ] = None,
        clamp: Annotated[float | None, Option(help="Instead: hold the latent at this activation (0 ablates).")] = None,
        prompt: Annotated[
            list[str] | None, Option(metavar="TEXT", help="Text to continue (repeatable; default three).")
        ] = None,
        tokens: Annotated[int | None, Option(help="Tokens to write (default 40).")] = None,
        temperature: Annotated[float | None, Option(help="0 (default) always takes the likeliest token.")] = None,
        against: Annotated[
            list[str] | None, Option(metavar="NAME", help="diff-means, random, prompt (default: all), or none.")
        ] = None,
        plain: Annotated[str | None, Option(metavar="TEXT", help="What the plain prompt says before the text.")] = None,
        sae: Annotated[str | None, Option(metavar="NAME_OR_DIR", help="Default: the newest.")] = None,
        model: Annotated[str | None, Option(metavar="NAME_OR_DIR", help="Default: the SAE's model.")] = None,
    ) -> None:
        """Write text with a latent turned up, beside the difference in means, a random direction, and plain words."""
