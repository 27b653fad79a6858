"""`greatctl interpret`: what the latents respond to, and whether that separates characters from controls."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Option

from ..options import stage_command

EXAMPLES = (
    "greatctl interpret",
    'greatctl interpret --text "He kept his head when all about him were losing theirs." --top-k 5',
    "greatctl interpret --latent 118",
    "greatctl interpret --labeler http://127.0.0.1:8000/v1 --labeler-model qwen3-8b",
)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @stage_command(app, "interpret", EXAMPLES)
    def interpret(
        text: Annotated[
            str | None, Option(metavar="SNIPPET", help="Show the top latents of each token of a snippet.")
        ] = None,
        top_k: Annotated[int | None, Option(help="Latents a token with --text (default 10).")] = None,
        sae: Annotated[str | None, Option(metavar="NAME_OR_DIR", help="Default: the newest.")] = None,
        latent: Annotated[list[int] | None, Option(metavar="N", help="Print one latent as a page.")] = None,
        unit: Annotated[
            str | None, Option(help="author (default), or subject where one author wrote everything.")
        ] = None,
        examples: Annotated[int | None, Option(help="Passages kept of each latent (default 10).")] = None,
        candidates: Annotated[int | None, Option(help="Latents written down as hypotheses (default 64).")] = None,
        concept: Annotated[
            list[str] | None,
            Option(metavar="NAME_OR_FILE", help="greatness (default), ambition, composure, all, or a TOML file."),
        ] = None,
        labeler: Annotated[
            str | None,
            Option(metavar="URL|hf:NAME", help="Who names latents: an OpenAI-compatible server or a local model."),
        ] = None,
        labeler_model: Annotated[
            str | None, Option(metavar="NAME", help="The model that the server is asked for.")
        ] = None,
        labels: Annotated[int | None, Option(metavar="N", help="Latents to name (default 24).")] = None,
        export: Annotated[str | None, Option(help="neuronpedia: the latents as JSON for other tools.")] = None,
        causal: Annotated[
            int | None, Option(metavar="N", help="Latents a concept changed in the running model (default 6).")
        ] = None,
    ) -> None:
        """Read latents: a snippet token by token, one latent as a page, or all of them against the controls."""
