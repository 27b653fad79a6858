"""What `interpret` gives beyond its tables when a person asks for it: labels from a labeler, and an export.

    greatctl interpret --labeler http://127.0.0.1:8000/v1 --labeler-model NAME
    greatctl interpret --export neuronpedia      results/exports/<SAE>/neuronpedia, no part of any artifact

Both read sealed tables and change nothing in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..store.artifact import Artifact
from ..store.tables import read_rows
from .context import Context
from .labels import Wanted, label, labels_by_latent
from .models import pick_device, resolve
from .saes import Sae, open_sae

__all__ = ["Made", "export_neuronpedia", "label_latents", "name_of", "names_of"]


@dataclass(frozen=True)
class Made:
    """Sealed feature tables and what they were made from; `meta` is the activations' meta.json."""

    features: Artifact
    sae: Sae
    activations: Artifact
    meta: Mapping[str, Any]


def label_latents(
    ctx: Context, made: Made, labeler: str, model: str | None, *, count: int, also: int | None, seed: int
) -> dict[str, object]:
    """Name the first `count` latents of the hypotheses (and the latent `also`); returns the labels' summary.

    Raises: as `greatctl.stages.labels.label`.
    """
    from ..corpus.windows import TokenStore
    from ..features.examples import Decoder
    from ..model.tokenizer import load_tokenizer
    from .label_exams import exams_of

    rows = read_rows(made.features.path / "hypotheses.parquet", ["latent"])
    latents = list(dict.fromkeys(row["latent"] for row in rows))[:count]
    if also is not None and also not in latents:
        latents.append(also)

    def exams(wanted: Sequence[int]) -> Mapping[int, Any]:
        device = pick_device(ctx.device)
        store = TokenStore(ctx.project.tokens / str(made.meta["tokens_name"]))
        tokenizer = load_tokenizer(resolve(str(made.meta["model"]))[0], offline=ctx.offline)
        decoder = Decoder(tokenizer, store.tokenizer["special_ids"])
        sae = open_sae(ctx, made.sae, device)
        return exams_of(made.features, made.activations, store, sae, decoder, wanted, device=device, seed=seed)

    artifact = label(ctx, made.features, Wanted(labeler, model, latents, seed), exams)
    ctx.run.notice(_said(artifact.summary))
    return {**artifact.summary, "path": str(artifact.path)}


def names_of(ctx: Context, features: Artifact, latents: Sequence[int]) -> dict[int, str]:
    """What each of these latents is called: by its labeler, else by the tokens it fires on and raises."""
    from ..features.names import fallback_names

    named = {latent: str(row["name"]) for latent, row in labels_by_latent(ctx.project, features).items()}
    return {latent: named.get(latent, name) for latent, name in fallback_names(features.path, latents).items()}


def name_of(ctx: Context, features: Artifact, latent: int) -> dict[str, object]:
    """`name` of a latent, and `label`: its row of labels.parquet, None where nobody named it."""
    row = labels_by_latent(ctx.project, features).get(latent)
    return {"name": names_of(ctx, features, [latent])[latent], "label": row}


def export_neuronpedia(ctx: Context, made: Made) -> Path:
    """Write the latents that fire as Neuronpedia-style JSON; returns the folder."""
    from ..corpus.windows import TokenStore
    from ..features.neuronpedia import Origin, write_neuronpedia

    store = TokenStore(ctx.project.tokens / str(made.meta["tokens_name"]))
    hook_point = str(made.meta["hook_point"])
    layer = next((int(part) for part in hook_point.split(".") if part.isdigit()), 0)
    origin = Origin(
        str(made.meta["model"]).rstrip("/").rsplit("/", 1)[-1],
        layer,
        made.features.path.name,
        len(store.length),
        store.window,
        store.path.name,
    )
    folder = ctx.project.results / "exports" / made.features.path.name / "neuronpedia"

    def said(done: int, total: int) -> None:
        ctx.run.progress("exporting", done, total, "latents")
        ctx.run.stop_here()

    count = write_neuronpedia(made.features.path, folder, origin, labels_by_latent(ctx.project, made.features), said)
    ctx.run.notice(f"interpret: exported {count:,} latents to {folder}")
    return folder


def _said(summary: Mapping[str, Any]) -> str:
    """The labels' summary as a sentence."""
    scores = [
        f"{task} {summary[task]:.2f}"
        + (f" (shuffled {summary[f'{task}_shuffled']:.2f})" if summary[f"{task}_shuffled"] is not None else "")
        for task in ("detection", "fuzzing")
        if summary[task] is not None
    ]
    how = "; ".join(scores) or "no scores"
    return f"interpret: {summary['n_named']} of {summary['n_latents']} latents named by {summary['labeler']}: {how}"
