"""Stage `interpret`: what the latents mean, and whether they follow greatness or something simpler.

    greatctl interpret                      feature tables and hypotheses of the newest SAE
    greatctl interpret --text "He rose."    the latents of a snippet, token by token
    greatctl interpret --latent 118         one latent as a page
    greatctl interpret --labeler URL        names for the latents that are shown, scored (see `labels`)
    greatctl interpret --export neuronpedia the latents as JSON for other tools

    greatctl interpret --concept ambition   hypotheses about another concept; `all`, or a TOML file of your own

The tables are one pass over the harvested activations. Every latent that fires is in the family of tests, so
the candidates that are written down as hypotheses (chosen on training units alone) are paid for in full. Each stands
beside what it has to beat, and the best are changed in the running model.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ..errors import InputError, UsageError
from ..store.artifact import Artifact, Identity, load, work
from ..store.tables import read_rows
from .context import Context, Plan, Result, StageConfig
from .controls import controls_of
from .labelers import request_of
from .latents import OneLatent, check_latent
from .made import made_already
from .saes import Sae, find_activations, find_sae, open_sae, plugins_of

if TYPE_CHECKING:
    from ..features.concepts import Concept
    from ..features.hypotheses import Evidence

__all__ = ["Config", "plan", "run"]

STAGE = "interpret"
_RULES = 2  # of tables and verdicts: what was made by older ones is made again
_KEYS = (
    "concept", "latent", "effect", "q_value", "verdict", "heldout_auroc", "baseline", "value", "margin", "beats",
    "causal_effect", "claim",
)  # fmt: skip


class Config(StageConfig):
    """Settings of `greatctl interpret`."""

    text: str | None = Field(None, description="show the strongest latents of each token of this snippet")
    top_k: int = Field(10, ge=1, description="latents a token with --text")
    sae: str | None = Field(None, description="name under results/saes, or a folder (the newest)")
    latent: OneLatent = Field(None, description="show one latent as a page")
    concept: list[str] = Field(
        ["greatness"], description="bundled concept, TOML file, or all (repeatable)", min_length=1
    )
    unit: Literal["author", "subject"] = Field(
        "author",
        description="what is drawn independently: authors, or subjects where one author wrote everything",
    )
    examples: int = Field(10, ge=1, le=100, description="strongest passages kept of each latent")
    candidates: int = Field(64, ge=1, description="latents written down as hypotheses")
    causal: int = Field(
        6, ge=0, le=100, description="best latents of each concept that are changed in the running model; 0 for none"
    )
    seed: int = Field(0, ge=0, description="seed of the permutations")
    labeler: str | None = Field(
        None, description="who names latents: an OpenAI-compatible address, or hf:NAME_OR_DIR (nobody)"
    )
    labeler_model: str | None = Field(None, description="the model that the labeler's server is asked for")
    labels: int = Field(24, ge=1, le=10_000, description="latents named, the first candidates first")
    export: Literal["neuronpedia"] | None = Field(None, description="also write the latents for other tools")


@dataclass(frozen=True)
class _Job:
    """What `plan` found out and `run` needs; all but the first two are None with --text."""

    sae: Sae
    plan: Plan
    activations: Artifact | None = None
    meta: Mapping[str, object] | None = None
    controls: Artifact | None = None
    concepts: tuple[Concept, ...] = ()


def plan(ctx: Context, config: Config) -> Plan:
    """What would be read.

    Raises:
        InputError: no SAE, no activations of its hook point, or activations whose tokens are gone.
        UsageError: empty text, an unknown concept, or --text together with --latent.
        ManifestError: `latent` is out of range, or a concept file is malformed.
    """
    return _prepare(ctx, config).plan


def run(ctx: Context, config: Config) -> Result:
    """Read a snippet, or make the feature tables (unless up to date) and show them or one latent of them."""
    job = _prepare(ctx, config)
    if config.text is not None:
        return _snippet(ctx, config, job.sae, config.text)
    final, identity = job.plan.target
    artifact = made_already(ctx, STAGE, final, identity)
    up_to_date = artifact is not None
    if artifact is None:
        artifact = _tables(ctx, config, job, final, identity)
    more = _more(ctx, config, job, artifact)
    if config.latent is not None:
        return _page(ctx, artifact, config.latent, up_to_date, more)
    baselines = read_rows(artifact.path / "baselines.parquet")
    labels = read_rows(Path(str(more["labels"]["path"])) / "labels.parquet") if "labels" in more else []
    view = {"reasons": _reasons(artifact), "baselines": baselines, "labels": labels}
    summary = {**_named(ctx, artifact), **more}
    return Result(STAGE, artifact.path, summary, up_to_date=up_to_date, view=view)


def _more(ctx: Context, config: Config, job: _Job, artifact: Artifact) -> dict[str, Any]:
    """The labels and the export that were asked for, as keys of the summary."""
    from .interpret_more import Made, export_neuronpedia, label_latents

    assert job.activations is not None and job.meta is not None
    made, more = Made(artifact, job.sae, job.activations, job.meta), dict[str, Any]()
    if config.labeler:
        words = (config.labeler, config.labeler_model)
        more["labels"] = label_latents(ctx, made, *words, count=config.labels, also=config.latent, seed=config.seed)
    if config.export:
        more["export"] = str(export_neuronpedia(ctx, made))
    return more


def _named(ctx: Context, artifact: Artifact) -> dict[str, object]:
    """The summary with the name of each latent beside its hypothesis."""
    from .interpret_more import names_of

    rows: list[dict] = artifact.summary["hypotheses"]
    names = names_of(ctx, artifact, [row["latent"] for row in rows])
    return {**artifact.summary, "hypotheses": [{**row, "name": names[row["latent"]]} for row in rows]}


def _reasons(artifact: Artifact) -> list[dict[str, object]]:
    """What decided, for the first of each verdict of each concept."""
    rows = read_rows(artifact.path / "hypotheses.parquet", ["concept", "latent", "verdict", "reason", "claim"])
    first: dict[tuple[object, object], dict[str, object]] = {}
    for row in rows:
        first.setdefault((row["concept"], row["verdict"]), row)
    return list(first.values())


def _controls(ctx: Context, sae: Sae) -> Artifact | None:
    """The whole and undamaged companions of exactly this SAE, if they were trained."""
    found = controls_of(ctx.project, sae.sealed) if sae.sealed else None
    return None if found is None or found.damaged() else found


def _prepare(ctx: Context, config: Config) -> _Job:
    from ..features.concepts import concepts_named

    concepts = tuple(concepts_named(config.concept))
    if config.text is not None and config.latent is not None:
        raise UsageError("--text and --latent exclude each other", why="they are two views", fix="drop one")
    request_of(ctx, config.labeler, config.labeler_model)
    if config.text is not None and (config.labeler or config.export):
        raise UsageError("--text goes with neither --labeler nor --export", why="it makes no tables", fix="drop --text")
    if config.text is not None and not config.text.strip():
        raise UsageError("the text is empty", why="there is no token to show", fix='give --text "some words"')
    sae = find_sae(ctx, config.sae)
    if config.latent is not None:
        check_latent(sae, config.latent)
    facts: dict[str, object] = {"sae": sae.path.name, "d_sae": sae.d_sae, "hook_point": sae.hook_point}
    if config.text is not None:
        return _Job(sae, Plan(STAGE, None, None, facts))
    activations = find_activations(ctx, sae)
    meta = json.loads((activations.path / "meta.json").read_bytes())
    tokens = _find_tokens(ctx, meta)
    controls = _controls(ctx, sae)
    inputs = {"sae": sae.key, "activations": activations.fingerprint, "tokens": tokens.fingerprint}
    identity = Identity(
        STAGE,
        {
            "sae": sae.path.name,
            "concepts": {concept.name: concept.digest for concept in concepts},
            "rules": _RULES,
            **{name: getattr(config, name) for name in ("unit", "examples", "candidates", "causal", "seed")},
        },
        inputs={**inputs, "controls": controls.fingerprint} if controls else inputs,
        plugins=plugins_of(ctx, sae),
        model_revision=meta["model_revision"],
    )
    facts |= {"labeler": config.labeler} if config.labeler else {}
    facts |= {"rows": meta["rows"], "unit": config.unit, "concepts": [concept.name for concept in concepts]}
    made = Plan(STAGE, ctx.project.features / sae.path.name, identity, facts)
    return _Job(sae, made, activations, meta, controls, concepts)


def _find_tokens(ctx: Context, meta: Mapping) -> Artifact:
    folder = ctx.project.tokens / str(meta["tokens_name"])
    artifact = load(folder) if folder.is_dir() else None
    if artifact is None or artifact.fingerprint != meta["tokens"]:
        raise InputError(
            "the activations are out of date",
            why=f"their tokens ({meta['tokens_name']}) " + ("were made again since" if artifact else "are gone"),
            fix="run `greatctl harvest` again",
            where=str(folder),
        )
    return artifact.check()


def _snippet(ctx: Context, config: Config, found: Sae, text: str) -> Result:
    """The strongest latents of each token of `text`; makes no artifact."""
    import torch

    from ..features.examples import Decoder
    from ..features.snippet import read_snippet
    from ..model.interface import Site
    from ..model.tokenizer import encode
    from .models import open_recorded, pick_device

    if found.hook_point is None or found.model is None:
        raise InputError(
            f"{found.path.name} does not say which model and hook point it reads",
            why="cfg.json has no model_name or hook_name",
            fix="add them under `metadata` in its cfg.json",
        )
    deepest = Site.parse(found.hook_point).layer + 1
    sites = [found.hook_point]
    model = open_recorded(ctx, found.model, found.revision, what="the SAE's activations", upto=deepest, sites=sites)
    ids = encode(model.tokenizer, text)
    if len(ids) > model.n_ctx:
        raise UsageError(
            f"the text has {len(ids) - 1:,} tokens",
            why=f"{model.name} reads at most {model.n_ctx - 1:,} at once",
            fix="give a shorter --text",
        )
    sae = open_sae(ctx, found, pick_device(ctx.device))
    residual = model.capture(torch.tensor([ids]), sites)[found.hook_point][0, 1:]
    pieces = Decoder(model.tokenizer, model.special_ids).pieces(ids[1:])
    read = read_snippet(sae.encode(residual.float()), pieces, config.top_k)
    summary = {"tokens": read.tokens, "top": read.top, "sae": found.path.name, "hook_point": found.hook_point}
    strip = {"tokens": read.tokens, "strength": read.strength}
    return Result(STAGE, None, summary, view={"strip": strip})


def _tables(ctx: Context, config: Config, job: _Job, final: Path, identity: Identity) -> Artifact:
    """Make and seal the tables."""
    from ..corpus.windows import TokenStore
    from .evidence import Inputs, write_all
    from .feature_pass import PASS, feature_pass, write_feature_tables
    from .models import open_recorded, pick_device

    assert job.activations is not None and job.meta is not None
    started, meta, device = time.monotonic(), job.meta, pick_device(ctx.device)
    store = TokenStore(ctx.project.tokens / str(meta["tokens_name"]))
    unit = "unit" if config.unit == "subject" else "author"
    with work(final, identity, origins=ctx.origins, fresh=ctx.force) as w:
        sae = open_sae(ctx, job.sae, device)
        tables = feature_pass(ctx, sae, job.activations, store, w.path, examples=config.examples, device=device)
        ctx.run.notice("interpret: reading what the latents write")
        model = open_recorded(ctx, str(meta["model"]), str(meta["model_revision"]))
        alive = tables.fired.nonzero().squeeze(1).tolist()
        write_feature_tables(ctx, w.path, tables, store, sae, model, unit=unit, alive=alive)
        ctx.run.stop_here()
        ctx.run.notice("interpret: weighing the evidence")
        inputs = Inputs(store, tables, sae, model, job.activations, meta, job.controls, w.path, alive, unit, device)
        found = write_all(
            ctx, inputs, job.concepts, n_candidates=config.candidates, n_causal=config.causal, seed=config.seed
        )
        facts = {"n_latents": sae.d_sae, "n_alive": len(alive), "n_tokens": tables.n_tokens, "unit": config.unit}
        summary = {**facts, **_summary(found), "sae": job.sae.path.name}
        return w.seal(summary, discard=(PASS,), seconds=round(time.monotonic() - started, 3))


def _summary(found: Sequence[Evidence]) -> dict[str, object]:
    """The summary's part about hypotheses; n_characters, n_controls and power are the first concept's."""
    concepts = [
        {
            "concept": one.weighed.concept.name,
            "n_characters": one.weighed.judgement.n_characters,
            "n_controls": one.weighed.judgement.n_controls,
            "n_candidates": len(one.rows),
            "n_supported": sum(row["verdict"] == "supported" for row in one.rows),
            "power": one.weighed.judgement.power,
            "missing": [baseline.name for baseline in one.baselines if baseline.bar is None],
        }
        for one in found
    ]
    return {
        **{name: concepts[0][name] for name in ("n_characters", "n_controls", "power")},
        "concepts": concepts,
        "hypotheses": [{key: row.get(key) for key in _KEYS} for one in found for row in one.rows],
    }


def _page(ctx: Context, artifact: Artifact, latent: int, up_to_date: bool, more: Mapping[str, object]) -> Result:
    from ..features.page import latent_page
    from .interpret_more import name_of

    page = {**latent_page(artifact.path, latent), **name_of(ctx, artifact, latent)}
    contrast = page["contrast"]
    headline = f"{contrast['verdict']}: {contrast['reason']}" if contrast else None  # type: ignore[index]
    view = {"page": page, "headline": headline}
    return Result(STAGE, artifact.path, {**_named(ctx, artifact), **page, **more}, up_to_date=up_to_date, view=view)
