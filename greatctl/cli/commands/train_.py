"""`greatctl train`: fit a sparse autoencoder to harvested activations."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Option

from ..options import stage_command

EXAMPLES = (
    "greatctl train",
    "greatctl train --arch relu --l1-coefficient 3 --name seed-recipe",
    "greatctl train --sweep arch=topk,batchtopk --sweep k=16,32,64",
    "greatctl train --name seed-recipe --arch relu --l1-coefficient 3 --export pth",
)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @stage_command(app, "train", EXAMPLES)
    def train(
        arch: Annotated[
            str | None,
            Option(
                metavar="NAME",
                help="batchtopk (default), topk, matryoshka, jumprelu, gated, relu, transcoder, skip-transcoder, "
                "or a plugin's.",
            ),
        ] = None,
        expansion: Annotated[int | None, Option(help="d_sae as a multiple of d_model (default 8).")] = None,
        d_sae: Annotated[int | None, Option(help="Number of latents, instead of --expansion.")] = None,
        k: Annotated[
            int | None,
            Option(
                help="Active latents a token: exact for topk, on average for batchtopk, matryoshka and the transcoders, "
                "a target for jumprelu, relu and gated."
            ),
        ] = None,
        l1_coefficient: Annotated[float | None, Option(help="Weight of the L1 penalty (relu, gated).")] = None,
        steps: Annotated[int | None, Option(help="Length of the run in steps.")] = None,
        tokens: Annotated[int | None, Option(help="Length of the run in tokens.")] = None,
        epochs: Annotated[int | None, Option(help="Length of the run in passes over the data (default 4).")] = None,
        lr: Annotated[float | None, Option(help="Peak learning rate.")] = None,
        batch_size: Annotated[int | None, Option(help="Tokens a step.")] = None,
        hook_point: Annotated[
            str | None, Option(metavar="NAME", help="Which activations (default: the newest).")
        ] = None,
        target_hook_point: Annotated[
            str | None, Option(metavar="NAME", help="What a transcoder writes; harvest both sites in one command.")
        ] = None,
        stream: Annotated[bool, Option("--stream", help="Harvest while training; store no activations.")] = False,
        model: Annotated[
            str | None, Option(metavar="NAME_OR_DIR", help="With --stream: the model (default: the tokens').")
        ] = None,
        buffer_rows: Annotated[
            int | None, Option(help="With --stream: rows held and mixed (default 2^19, at most 4 GiB).")
        ] = None,
        option: Annotated[
            list[str] | None,
            Option(metavar="KEY=VALUE", help="Any other setting of the architecture (repeatable)."),
        ] = None,
        controls: Annotated[
            bool, Option("--controls", help="Also train a frozen decoder, a random model and two other seeds.")
        ] = False,
        tensorboard: Annotated[
            bool, Option("--tensorboard", help="Also write TensorBoard files to results/logs/tensorboard.")
        ] = False,
        ce_windows: Annotated[
            int | None, Option(help="Held-out windows for the model's own loss; 0: do not measure.")
        ] = None,
        aux_coefficient: Annotated[
            float | None, Option(help="Weight of the dead-latent loss (topk, batchtopk).")
        ] = None,
        decoder_norm_weighted: Annotated[
            bool | None,
            Option(
                "--decoder-norm-weighted/--unit-norms",
                help="relu: weight the L1 penalty by decoder norms, which are then free (default), or keep them at 1.",
            ),
        ] = None,
        checkpoint_every: Annotated[int | None, Option(help="Steps between checkpoints.")] = None,
        resume: Annotated[bool, Option("--resume", help="Go on with a stopped run (the default).")] = False,
        name: Annotated[str | None, Option(help="Folder under results/saes (default ARCH-DSAE-kK-HOOK).")] = None,
        export: Annotated[
            str | None,
            Option(
                metavar="FORMAT",
                help="saelens, sparsify, dictionary_learning or pth; on a finished SAE only exports.",
            ),
        ] = None,
        sweep: Annotated[
            list[str] | None,
            Option(
                metavar="KEY=A,B",
                help="Several values of arch, k, lr, seed, d_sae, hook_point or an option (repeatable): every "
                "combination is trained in one walk over the activations.",
            ),
        ] = None,
        shuffle_seed: Annotated[int | None, Option(help="Seed of the shuffle alone (default: --seed).")] = None,
    ) -> None:
        """Train a sparse autoencoder; resumes to the bit, and is saved as a SAELens folder."""
