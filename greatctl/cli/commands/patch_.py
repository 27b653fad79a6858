"""`greatctl patch`: which layer and position carries the difference, causally."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Option

from ..options import stage_command

EXAMPLES = (
    "greatctl patch --model bundled",
    "greatctl patch --metric logit-diff --metric kl --pairs composure",
    "greatctl patch --pairs my-pairs.toml --direction denoising --site resid_post",
    'greatctl patch --clean "The captain was calm and" --corrupted "The captain was afraid and" '
    '--answer " strong" --wrong-answer " weak"',
)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @stage_command(app, "patch", EXAMPLES)
    def patch(
        metric: Annotated[
            list[str] | None, Option(metavar="NAME", help="logit-diff (default), prob, prob-diff, kl, …")
        ] = None,
        pairs: Annotated[
            str | None, Option(metavar="NAME_OR_FILE", help="greatness (default), composure, ambition, a file.")
        ] = None,
        clean: Annotated[str | None, Option(metavar="TEXT", help="One pair by hand: the target prompt.")] = None,
        corrupted: Annotated[str | None, Option(metavar="TEXT", help="The baseline prompt, equally long.")] = None,
        answer: Annotated[str | None, Option(metavar="TOKEN", help="What the target makes likelier.")] = None,
        wrong_answer: Annotated[str | None, Option(metavar="TOKEN", help="What it is weighed against.")] = None,
        site: Annotated[
            str | None, Option(help="resid_pre (default), resid_mid, resid_post, attn_out, mlp_out.")
        ] = None,
        direction: Annotated[str | None, Option(help="denoising, noising or both (default).")] = None,
        method: Annotated[str | None, Option(help="exact.")] = None,
        min_gap: Annotated[
            float | None, Option(help="Refuse pairs whose two runs differ by less (default 0.01).")
        ] = None,
        batch_cells: Annotated[int | None, Option(help="Cells a forward pass; bounds the memory.")] = None,
        model: Annotated[str | None, Option(metavar="NAME_OR_DIR", help="Default: the model of the tokens.")] = None,
        name: Annotated[str | None, Option(help="Folder under results/patches (default PAIRS-SITE).")] = None,
    ) -> None:
        """Patch the residual stream between matched prompts, over every layer and position."""
