"""Stage `interpret`: what the latents mean, and whether they follow greatness or something simpler.

    greatctl interpret                      feature tables and hypotheses of the newest SAE
    greatctl interpret --text "He rose."    the latents of a snippet, token by token
    greatctl interpret --latent 118         one latent as a page

The tables are one pass over the harvested activations. Every latent that fires is in the family of tests, so
the candidates that are written down as hypotheses (chosen on training units alone) are paid for in full.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ..errors import InputError, ManifestError, UsageError, did_you_mean
from ..store.artifact import Artifact, Identity, current, load, touch, work
from .context import Context, Plan, Result, StageConfig
from .controls import controls_of
from .saes import Sae, find_activations, find_sae, open_sae, plugins_of

if TYPE_CHECKING:
    from ..corpus.windows import TokenStore
    from ..features.logits import LatentLogits
    from ..features.tables import FeatureTables
    from ..model.interface import FrozenModel
    from ..sae.folder import LoadedSAE

__all__ = ["Config", "plan", "run"]

STAGE = "interpret"
CONCEPTS = ("greatness",)
_SHOWN = 20  # hypotheses in the summary


class Config(StageConfig):
    """Settings of `greatctl interpret`."""

    text: str | None = Field(None, description="show the strongest latents of each token of this snippet")
    top_k: int = Field(10, ge=1, description="latents a token with --text")
    sae: str | None = Field(None, description="name under results/saes, or a folder (the newest)")
    latent: int | None = Field(None, description="show one latent as a page")
    concept: str = Field("greatness", description="what the contrast is called")
    unit: Literal["author", "subject"] = Field(
        "author",
        description="what is drawn independently: authors, or subjects where one author wrote everything",
    )
    examples: int = Field(10, ge=1, le=100, description="strongest passages kept of each latent")
    candidates: int = Field(64, ge=1, description="latents written down as hypotheses")
    seed: int = Field(0, ge=0, description="seed of the permutations")


@dataclass(frozen=True)
class _Job:
    """What `plan` found out and `run` needs; all but the first two are None with --text."""

    sae: Sae
    plan: Plan
    activations: Artifact | None = None
    meta: Mapping[str, object] | None = None
    controls: Artifact | None = None


def plan(ctx: Context, config: Config) -> Plan:
    """What would be read.

    Raises:
        InputError: no SAE, no activations of its hook point, or activations whose tokens are gone.
        UsageError: empty text, an unknown concept, or --text together with --latent.
        ManifestError: `latent` is out of range.
    """
    return _prepare(ctx, config).plan


def run(ctx: Context, config: Config) -> Result:
    """Read a snippet, or make the feature tables (unless up to date) and show them or one latent of them."""
    job = _prepare(ctx, config)
    if config.text is not None:
        return _snippet(ctx, config, job.sae, config.text)
    final, identity = job.plan.final, job.plan.identity
    assert final is not None and identity is not None
    artifact, reason = current(final, identity)
    up_to_date = artifact is not None and not ctx.force
    if artifact is not None and up_to_date:
        touch(artifact)
        ctx.run.notice("interpret: up to date")
    else:
        ctx.run.notice(f"interpret: {reason or 'forced'}")
        artifact = _tables(ctx, config, job, final, identity)
    if config.latent is not None:
        return _page(artifact, config.latent, up_to_date)
    view = {"missing": _missing(job.controls), "power": artifact.summary.get("power")}
    return Result(STAGE, artifact.path, artifact.summary, up_to_date=up_to_date, view=view)


def _missing(controls: Artifact | None) -> list[str]:
    """The baselines that a verdict stands without."""
    from ..features.hypotheses import BASELINES, COMPANIONS

    return [name for name in BASELINES if controls is None or name not in COMPANIONS]


def _controls(ctx: Context, sae: Sae) -> Artifact | None:
    """The whole and undamaged companions of exactly this SAE, if they were trained."""
    found = controls_of(ctx.project, sae.sealed) if sae.sealed else None
    return None if found is None or found.damaged() else found


def _prepare(ctx: Context, config: Config) -> _Job:
    if config.concept not in CONCEPTS:
        raise UsageError(
            f"the concept {config.concept!r} is not defined",
            why="a concept needs texts that show it and texts that do not",
            fix=did_you_mean(config.concept, CONCEPTS),
        )
    if config.text is not None and config.latent is not None:
        raise UsageError("--text and --latent exclude each other", why="they are two views", fix="drop one")
    if config.text is not None and not config.text.strip():
        raise UsageError("the text is empty", why="there is no token to show", fix='give --text "some words"')
    sae = find_sae(ctx, config.sae)
    if config.latent is not None and not 0 <= config.latent < sae.d_sae:
        raise ManifestError(
            f"latent {config.latent} is out of range",
            why=f"{sae.path.name} has {sae.d_sae:,} latents, 0 to {sae.d_sae - 1}",
            fix=f"use --latent with a number from 0 to {sae.d_sae - 1}",
            code="out-of-range",
        )
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
            **{name: getattr(config, name) for name in ("concept", "unit", "examples", "candidates", "seed")},
        },
        inputs={**inputs, "controls": controls.fingerprint} if controls else inputs,
        plugins=plugins_of(ctx, sae),
        model_revision=meta["model_revision"],
    )
    facts |= {"rows": meta["rows"], "unit": config.unit}
    return _Job(sae, Plan(STAGE, ctx.project.features / sae.path.name, identity, facts), activations, meta, controls)


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
    model = open_recorded(ctx, found.model, found.revision, what="the SAE's activations", upto=deepest)
    ids = encode(model.tokenizer, text)
    if len(ids) > model.n_ctx:
        raise UsageError(
            f"the text has {len(ids) - 1:,} tokens",
            why=f"{model.name} reads at most {model.n_ctx - 1:,} at once",
            fix="give a shorter --text",
        )
    sae = open_sae(ctx, found, pick_device(ctx.device))
    residual = model.capture(torch.tensor([ids]), [found.hook_point])[found.hook_point][0, 1:]
    pieces = Decoder(model.tokenizer, model.special_ids).pieces(ids[1:])
    read = read_snippet(sae.encode(residual.float()), pieces, config.top_k)
    summary = {"tokens": read.tokens, "top": read.top, "sae": found.path.name, "hook_point": found.hook_point}
    strip = {"tokens": read.tokens, "strength": read.strength}
    return Result(STAGE, None, summary, view={"strip": strip})


def _tables(ctx: Context, config: Config, job: _Job, final: Path, identity: Identity) -> Artifact:
    """Make and seal the tables."""
    from ..corpus.windows import TokenStore
    from ..features.examples import Decoder
    from ..features.hypotheses import weigh_latents, write_hypotheses
    from ..features.write import Corpus, write_tables, write_units
    from .models import open_recorded

    assert job.activations is not None and job.meta is not None
    started, meta = time.monotonic(), job.meta
    store = TokenStore(ctx.project.tokens / str(meta["tokens_name"]))
    corpus = Corpus(store.input_ids, store.token_end, store.length, store.documents, store.windows["document"])
    with work(final, identity, origins=ctx.origins, fresh=ctx.force) as w:
        tables, sae = _scan(ctx, config, job, store)
        ctx.run.notice("interpret: reading what the latents write")
        model = open_recorded(ctx, str(meta["model"]), str(meta["model_revision"]))
        logits = _logits(sae, model)
        decoder = Decoder(model.tokenizer, store.tokenizer["special_ids"])
        write_tables(w.path, tables, corpus, decoder, logits)
        ctx.run.stop_here()
        ctx.run.notice("interpret: weighing the evidence")
        alive = tables.fired.nonzero().squeeze(1).tolist()
        unit = "unit" if config.unit == "subject" else "author"
        write_units(w.path, tables, store.documents, unit, alive)
        ctx.run.stop_here()
        found = weigh_latents(tables, store.documents, unit, alive, n_candidates=config.candidates, seed=config.seed)
        ctx.run.stop_here()
        rows = write_hypotheses(w.path, config.concept, config.unit, found, missing=_missing(job.controls))
        keys = ("concept", "latent", "effect", "q_value", "verdict")
        summary = {
            "n_latents": sae.d_sae,
            "n_alive": len(alive),
            "n_tokens": tables.n_tokens,
            "unit": config.unit,
            "n_characters": found.judgement.n_characters,
            "n_controls": found.judgement.n_controls,
            "power": found.judgement.power,
            "sae": job.sae.path.name,
            "hypotheses": [{key: row[key] for key in keys} for row in rows[:_SHOWN]],
        }
        return w.seal(summary, seconds=round(time.monotonic() - started, 3))


def _scan(ctx: Context, config: Config, job: _Job, store: TokenStore) -> tuple[FeatureTables, LoadedSAE]:
    from ..features.tables import scan
    from ..store.shards import ShardReader
    from .models import pick_device

    assert job.activations is not None
    device = pick_device(ctx.device)
    sae = open_sae(ctx, job.sae, device)
    reader = ShardReader(job.activations.path)
    done = 0

    def said(rows: int) -> None:
        nonlocal done
        done += rows
        ctx.run.progress("interpret", done, reader.rows, "tokens")
        ctx.run.stop_here()

    tables = scan(
        reader,
        sae.encode,
        sae.d_sae,
        store.windows["document"],
        n_documents=len(store.documents),
        special_ids=store.tokenizer["special_ids"],
        top_k=config.examples,
        device=device,
        said=said,
    )
    return tables, sae


def _logits(sae: LoadedSAE, model: FrozenModel) -> LatentLogits | None:
    """Top and bottom logits; None where the SAE's width is not the residual stream's."""
    from ..features.logits import latent_logits

    if sae.d_in != model.d_model:
        return None
    return latent_logits(model, sae.W_dec, hidden=model.special_ids)


def _page(artifact: Artifact, latent: int, up_to_date: bool) -> Result:
    from ..features.page import latent_page

    page = latent_page(artifact.path, latent)
    contrast = page["contrast"]
    facts = {
        "density": page["density"],
        "mean": page["mean"],
        "max": page["max"],
        "fires on": ", ".join(repr(t) for t in page["top_tokens"]),  # type: ignore[union-attr]
        "raises": ", ".join(repr(r["token"]) for r in page["top_logits"]),  # type: ignore[union-attr,index]
        "lowers": ", ".join(repr(r["token"]) for r in page["bottom_logits"]),  # type: ignore[union-attr,index]
        "strongest in": ", ".join(f"{r['unit']} ({r['mean']:.3g})" for r in page["units"][:5]),  # type: ignore[index]
        "verdict": f"{contrast['verdict']}: {contrast['reason']}" if contrast else "it never fires",  # type: ignore[index]
    }
    view = {"page": {"latent": latent, "facts": facts, "examples": page["examples"]}}
    return Result(STAGE, artifact.path, {**artifact.summary, **page}, up_to_date=up_to_date, view=view)
