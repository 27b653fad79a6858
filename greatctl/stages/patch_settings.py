"""Which settings of `greatctl patch` go together, and with which model and SAE; refused before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .. import patching
from ..errors import InputError, ManifestError, UsageError
from .models import slug

if TYPE_CHECKING:
    from ..model.loading import ModelInfo
    from .context import Context
    from .patch import Config
    from .saes import Sae

__all__ = ["directions_of", "metrics_of", "must_fit"]


def metrics_of(ctx: Context, config: Config) -> list[str]:
    """The metrics that were named, each once.

    Raises:
        UsageError: one is not known (with the nearest names), or its plugin failed.
    """
    metrics = list(dict.fromkeys(config.metric))
    for name in metrics:
        if name not in ctx.plugins.registry.names("metrics"):
            ctx.plugins.registry.get("metrics", name)
    return metrics


def directions_of(config: Config) -> Sequence[str]:
    """The directions to run.

    Raises:
        UsageError: settings that do not go together.
    """
    inside = config.site not in patching.STREAM_SITES
    guessed = config.method != "exact"
    for wrong, what, why, fix in (
        (
            config.corruption != "counterpart" and config.direction == "denoising",
            f"--corruption {config.corruption} cannot be denoised",
            "an ablation replaces values of the clean run, so there is no corrupted run to restore",
            "leave --direction out, or use --direction noising",
        ),
        (
            config.layer_window is not None and inside,
            f"--layer-window does not go with --site {config.site}",
            "a head, neuron or latent of a number is another one in the next layer",
            "use a site of the stream: " + ", ".join(patching.STREAM_SITES),
        ),
        (
            bool(config.latent or config.sae) and config.site != "latents",
            f"--sae and --latent do not go with --site {config.site}",
            "they name what --site latents patches",
            "use --site latents",
        ),
        (
            bool(config.edge) and config.site != "edges",
            f"--edge does not go with --site {config.site}",
            "it names what --site edges patches",
            "use --site edges",
        ),
        (
            guessed and config.layer_window is not None,
            f"--layer-window does not go with --method {config.method}",
            "a gradient belongs to one layer; windows of them would be sums without a meaning of their own",
            "use --method exact",
        ),
        (
            config.method == "attribution-drop" and config.site in ("edges", "latents"),
            f"--method attribution-drop does not go with --site {config.site}",
            "it leaves out blocks of the model, for sites of its own",
            "use attribution, eap-ig, or another --site",
        ),
        (
            config.corruption != "counterpart" and (config.method == "eap-ig" or (guessed and config.site == "edges")),
            f"--corruption {config.corruption} does not go with --method {config.method} here",
            "the way of the gradients leads to the other prompt",
            "use --method exact, or at a single site attribution or eap-ig-activations",
        ),
    ):
        if wrong:
            raise UsageError(what, why=why, fix=fix)
    if config.corruption != "counterpart":
        return ("noising",)
    return patching.DIRECTIONS if config.direction == "both" else (config.direction,)


def must_fit(config: Config, info: ModelInfo, sae: Sae | None) -> None:
    """Hold the SAE and the window against the model.

    Raises:
        InputError: the SAE is of another model, or is no autoencoder of one activation.
        ManifestError: there are fewer layers than the window asks for, or latents than were named; like every number
            that is out of range, wherever it came from.
    """
    if config.layer_window and config.layer_window > info.n_layers:
        raise ManifestError(f"--layer-window {config.layer_window} is too wide", why=f"{info.n_layers} layers")
    if sae is None:
        return
    other = sae.revision != info.revision if sae.revision else sae.model and slug(sae.model) != slug(info.name)
    if other or sae.d_in != info.d_model:
        said = f"revision {sae.revision[:12]}" if sae.revision else f"width {sae.d_in}"
        mine = f"revision {info.revision[:12]}" if sae.revision else f"width {info.d_model}"
        raise InputError(
            f"the SAE {sae.path.name} was not trained on {info.name}",
            why=f"it is of {sae.model or 'a model it does not name'}, {said}; this is {mine}",
            fix=f"use --model {sae.model}" if sae.model else "name another SAE with --sae",
            code="another-model",
        )
    if sae.hook_point is None:
        fix = "name an SAE whose cfg.json has metadata.hook_name"
        raise InputError(f"the SAE {sae.path.name} does not say where it reads", why="no hook point", fix=fix)
    for latent in config.latent:
        if not 0 <= latent < sae.d_sae:
            why = f"{sae.path.name} has {sae.d_sae:,} latents, 0 to {sae.d_sae - 1}"
            raise ManifestError(f"there is no latent {latent}", why=why, fix="use --latent with one of its numbers")
