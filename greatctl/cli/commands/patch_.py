"""`greatctl patch`: which layer, head, neuron, latent or edge carries the difference, and at which place, causally."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from ..options import stage_command

EXAMPLES = (
    "greatctl patch --model bundled --metric logit-diff --metric kl --pairs composure",
    "greatctl patch --site edges --method attribution --verify 20",
    "greatctl patch --site latents --top 20",
    'greatctl patch --clean "The captain was calm and" --corrupted "The captain was angry and" '
    '--answer " strong" --wrong-answer " weak"',
)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @stage_command(app, "patch", EXAMPLES)
    def patch(
        metric: Annotated[
            list[str] | None, Option(metavar="NAME", help="logit-diff (default), prob, log-prob, kl, js, rank, …")
        ] = None,
        pairs: Annotated[
            str | None,
            Option(metavar="NAME_OR_FILE", help="greatness (default), composure, ambition, copying, a file."),
        ] = None,
        clean: Annotated[str | None, Option(metavar="TEXT", help="One pair by hand: the target prompt.")] = None,
        corrupted: Annotated[str | None, Option(metavar="TEXT", help="The baseline prompt, equally long.")] = None,
        answer: Annotated[str | None, Option(metavar="TOKEN", help="What the target makes likelier.")] = None,
        wrong_answer: Annotated[str | None, Option(metavar="TOKEN", help="What it is weighed against.")] = None,
        site: Annotated[
            str | None,
            Option(
                help="resid_pre (default), …_mid, …_post, attn_out, mlp_out, z, q, k, v, pattern, mlp_post, latents, edges."
            ),
        ] = None,
        sae: Annotated[
            str | None, Option(metavar="NAME_OR_DIR", help="For --site latents (default: the newest SAE).")
        ] = None,
        latent: Annotated[list[int] | None, Option(metavar="N", help="Patch this latent (repeatable).")] = None,
        edge: Annotated[
            list[str] | None, Option(metavar="NAME", help="For --site edges: a0.*->a1.kv0.k and the like (repeatable).")
        ] = None,
        top: Annotated[
            int | None, Option(help="Most promising neurons, latents or edges to list (default 50).")
        ] = None,
        positions: Annotated[
            str | None,
            Option(help="each (default in the stream), spans, or all (default inside of blocks and of edges)."),
        ] = None,
        direction: Annotated[str | None, Option(help="denoising, noising or both (default).")] = None,
        corruption: Annotated[
            str | None, Option(help="counterpart (default), or to noise with: zero, mean, resample.")
        ] = None,
        layer_window: Annotated[int | None, Option(help="Also patch windows of so many layers.")] = None,
        method: Annotated[
            str | None,
            Option(help="exact (default), or estimates: attribution, …-qk, …-drop, eap-ig, eap-ig-activations."),
        ] = None,
        steps: Annotated[int | None, Option(help="Steps of eap-ig (default 5).")] = None,
        verify: Annotated[
            int | None,
            Option(help="Of estimates run so many of the strongest, and as many others, exactly (default 20)."),
        ] = None,
        circuit: Annotated[
            bool, Option("--circuit", help="Find a small set that carries the effect, and test it.")
        ] = False,
        circuit_kind: Annotated[str | None, Option(help="edges (default), nodes, or latents of all SAEs.")] = None,
        circuit_size: Annotated[int | None, Option(help="So many of them (default: as few as will do).")] = None,
        circuit_file: Annotated[
            Path | None, Option(metavar="FILE", help="Test this circuit.json, edited or not, instead.")
        ] = None,
        selection: Annotated[
            str | None, Option(help="threshold (default): the largest scores; greedy: less what is not needed.")
        ] = None,
        random_sets: Annotated[int | None, Option(help="Sets of equal size to compare with (default 200).")] = None,
        min_gap: Annotated[
            float | None, Option(help="Refuse pairs whose two runs differ by less (default 0.01).")
        ] = None,
        batch_cells: Annotated[int | None, Option(help="Cells a forward pass (default: what fits).")] = None,
        model: Annotated[str | None, Option(metavar="NAME_OR_DIR", help="Default: the model of the tokens.")] = None,
        name: Annotated[str | None, Option(help="Folder under results/patches (default PAIRS-SITE).")] = None,
    ) -> None:
        """Patch the stream, heads, neurons, latents or edges between matched prompts, over every layer and place."""
