"""Stage `train`: stored activations become a sparse autoencoder.

    greatctl train --arch batchtopk --expansion 8 --k 32

Reads the newest activations, holds out the documents whose split is not `train`, and writes
results/saes/<name>: a folder in SAELens layout with the training curve (metrics.parquet), the measurements on
held-out rows (evaluation.json) and how it was made (training.json). A killed run goes on at its last
checkpoint and ends with the same bytes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from ..errors import InputError, IntegrityError, ManifestError, UsageError, did_you_mean
from ..store.artifact import Artifact, Identity, current, difference, load, sealed_under, touch, work
from ..store.files import write_json
from .context import Context, Plan, Result, StageConfig

if TYPE_CHECKING:
    from torch import Tensor

    from ..corpus.windows import TokenStore

__all__ = ["Config", "plan", "run"]

STAGE = "train"
_LENGTHS = ("steps", "tokens", "epochs")
_EPOCHS, _EXPANSION = 4, 8
_WIDE = 1024  # from this d_model on, 64 active latents instead of 32
_HELD_OUT_SHARE = 0.05
_ARCH_OPTIONS = ("k", "l1_coefficient", "decoder_norm_weighted", "aux_coefficient")
_RANK = {"flag": 3, "env": 2, "sources.toml": 1}


class Config(StageConfig):
    """Settings of `greatctl train`. None: as follows from the data, or the architecture's default."""

    arch: str = Field("batchtopk", description="architecture: relu, topk, batchtopk, or a plugin's")
    expansion: int | None = Field(None, ge=1, le=1024, description="latents per input dimension (8)")
    d_sae: int | None = Field(None, ge=1, description="number of latents, instead of --expansion")
    k: int | None = Field(None, ge=1, description="active latents a token (32; 64 from d_model 1024 on)")
    steps: int | None = Field(None, ge=1, description="optimiser steps, instead of --epochs")
    tokens: int | None = Field(None, ge=1, description="training tokens in all, instead of --epochs")
    epochs: int | None = Field(None, ge=1, description="passes over the activations (4)")
    lr: float | None = Field(
        None, gt=0, le=1, description="peak learning rate (falls with sqrt(d_sae) and with the run's length)"
    )
    batch_size: int | None = Field(None, ge=1, description="rows a step (4096, less where the data is small)")
    hook_point: str | None = Field(None, description="site of the activations (the newest)")
    name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="folder name (ARCH-DSAE-kK-HOOK)"
    )
    l1_coefficient: float | None = Field(None, ge=0, description="weight of the L1 penalty (relu)")
    decoder_norm_weighted: bool | None = Field(
        None, description="weight the L1 penalty by decoder norms, which are then free (relu)"
    )
    aux_coefficient: float | None = Field(
        None, ge=0, description="weight of the dead-latent loss AuxK (topk, batchtopk)"
    )
    checkpoint_every: int = Field(500, ge=1, description="steps between checkpoints")
    ce_windows: int = Field(64, ge=0, description="held-out windows for the language model's loss; 0 = do not measure")
    resume: bool = Field(
        False, description="go on with a stopped run (done anyway; refuses if its inputs changed since)"
    )
    export: Literal["saelens", "pth"] | None = Field(None, description="also write exports/; alone on a finished SAE")
    seed: int = Field(0, ge=0, description="seed of initialisation and shuffle")


@dataclass(frozen=True)
class _Job:
    """What `plan` found out and `run` needs."""

    activations: Artifact
    meta: Mapping[str, Any]
    cls: type
    options: dict[str, object]
    length: tuple[str, int]
    name: str
    plan: Plan


def plan(ctx: Context, config: Config) -> Plan:
    """What would be trained, on what.

    Raises:
        InputError: no activations (of that hook point), or their tokens are gone or were made again.
        IntegrityError: a shard is damaged.
        ManifestError: a setting is out of the architecture's range (k above d_sae).
        UsageError: two lengths or two sizes are given, or an option that the architecture does not have.
    """
    return _prepare(ctx, config).plan


def run(ctx: Context, config: Config) -> Result:
    """Train, or say that nothing changed; `export` on a finished SAE only exports."""
    if config.export and config.name and (done := _finished(ctx.project.saes / config.name)) and not ctx.force:
        return _exported(ctx, done, config.export)
    job = _prepare(ctx, config)
    final, identity = job.plan.final, job.plan.identity
    assert final is not None and identity is not None
    if config.export and (done := _finished(final)) and not ctx.force:
        return _exported(ctx, done, config.export)
    artifact, reason = current(final, identity)
    if artifact and not ctx.force:
        touch(artifact)
        ctx.run.notice("train: up to date")
        return Result(STAGE, artifact.path, artifact.summary, up_to_date=True)
    if not ctx.force:
        _refuse_another(ctx, final, identity, resume=config.resume)
    ctx.run.notice(f"train: {reason or 'forced'}")
    artifact = _train(ctx, config, job, final, identity)
    if config.export:
        return _exported(ctx, artifact, config.export)
    return Result(STAGE, artifact.path, artifact.summary)


def _prepare(ctx: Context, config: Config) -> _Job:
    length = _one_of(ctx, config, _LENGTHS, ("epochs", _EPOCHS))
    size = _one_of(ctx, config, ("d_sae", "expansion"), ("expansion", _EXPANSION))
    activations = _choose(ctx, config.hook_point).check()
    meta = json.loads((activations.path / "meta.json").read_bytes())
    d_in = int(meta["d_model"])
    d_sae = size[1] if size[0] == "d_sae" else size[1] * d_in
    cls = ctx.plugins.registry.get("architectures", config.arch)
    options = _options(ctx, config, cls, d_in, d_sae)
    tokens = _tokens(ctx, meta)
    k = f"-k{options['k']}" if "k" in options else ""
    name = config.name or f"{config.arch}-{d_sae}{k}-{meta['hook_point']}"
    identity = Identity(
        STAGE,
        {
            "arch": config.arch,
            **options,
            length[0]: length[1],
            "lr": config.lr,
            "batch_size": config.batch_size,
            "hook_point": meta["hook_point"],
            "ce_windows": config.ce_windows,
            "seed": config.seed,
        },
        inputs={"activations": activations.fingerprint, "tokens": tokens.fingerprint},
        plugins=ctx.plugins.digests({"architectures": [config.arch]}),
        model_revision=meta["model_revision"],
    )
    parameters = 2 * d_in * d_sae + d_in + d_sae
    facts = {
        "arch": config.arch,
        "d_in": d_in,
        "d_sae": d_sae,
        "hook_point": meta["hook_point"],
        "rows": int(meta["rows"]),
        length[0]: length[1],
        "weight_bytes": 4 * parameters,
        "training_bytes": 16 * parameters,
    }
    return _Job(activations, meta, cls, options, length, name, Plan(STAGE, ctx.project.saes / name, identity, facts))


def _one_of(ctx: Context, config: Config, names: Sequence[str], default: tuple[str, int]) -> tuple[str, int]:
    """The one setting of `names` that counts: of the nearest origin (flag > environment > sources.toml).

    Raises:
        UsageError: two of them come from the same place.
    """
    given = [(name, getattr(config, name)) for name in names if getattr(config, name) is not None]
    ranks = [_RANK.get(ctx.origins.get(name, "default").split()[0], 0) for name, _ in given]
    nearest = [pair for pair, rank in zip(given, ranks, strict=True) if rank == max(ranks)]
    if len(nearest) > 1:
        flags = " and ".join("--" + name.replace("_", "-") for name, _ in nearest)
        raise UsageError(f"{flags} exclude each other", why="each of them sets the same thing", fix="give one of them")
    return nearest[0] if nearest else default


def _options(ctx: Context, config: Config, cls: type, d_in: int, d_sae: int) -> dict[str, object]:
    """d_in, d_sae and the architecture's own settings, checked against its schema, defaults filled in."""
    schema = cls.Config  # type: ignore[attr-defined]
    known = set(schema.model_fields)
    for name in sorted(set(_ARCH_OPTIONS) - known):
        if getattr(config, name) is not None and ctx.origins.get(name, "").startswith("flag"):
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"{config.arch} has no {flag}",
                why=f"its settings are {', '.join(sorted(known - {'d_in', 'd_sae'})) or 'none'}",
                fix=f"leave {flag} out, or choose another --arch",
            )
    given = {name: getattr(config, name) for name in _ARCH_OPTIONS if name in known}
    values = {name: value for name, value in given.items() if value is not None}
    if "k" in known and "k" not in values:
        values["k"] = 64 if d_in >= _WIDE else 32
    try:
        checked = schema(d_in=d_in, d_sae=d_sae, **values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        what = str(first["loc"][0]) if first["loc"] else "k" if "k" in known else "settings"
        raise ManifestError(
            f"{config.arch}: {first['msg'].removeprefix('Value error, ')}",
            why=f"{what} comes from: {ctx.origins.get(what, 'default')}",
            fix="change --k, --d-sae or --expansion" if what == "k" else f"change --{what.replace('_', '-')}",
            code="out-of-range",
        ) from None
    return checked.model_dump(mode="json")


def _choose(ctx: Context, hook_point: str | None) -> Artifact:
    """The newest activations artifact, of that hook point where one is named."""
    found = sealed_under(ctx.project.activations, "harvest")
    if not found:
        raise InputError(
            "there are no activations yet",
            why=f"{ctx.project.activations} holds no finished harvest",
            fix="run `greatctl harvest` first",
        )
    if hook_point is None:
        return found[-1]
    matching = [a for a in found if a.path.name == hook_point]
    if not matching:
        raise InputError(
            f"there are no activations of {hook_point}",
            why="harvested: " + ", ".join(sorted({a.path.name for a in found})),
            fix=f"run `greatctl harvest --hook-point {hook_point}`; "
            + did_you_mean(hook_point, {a.path.name for a in found}),
        )
    return matching[-1]


def _tokens(ctx: Context, meta: Mapping[str, Any]) -> Artifact:
    """The tokens that the activations were harvested from, unchanged since."""
    folder = ctx.project.tokens / str(meta["tokens_name"])
    artifact = load(folder) if folder.is_dir() else None
    if artifact is None or artifact.fingerprint != meta["tokens"]:
        raise InputError(
            "the activations are out of date",
            why=f"they were harvested from {meta['tokens_name']}, which "
            + ("is gone" if artifact is None else "was made again since"),
            fix="run `greatctl harvest` again",
            where=str(folder),
        )
    return artifact.check()


def _finished(final: Path) -> Artifact | None:
    try:
        return load(final)
    except (InputError, IntegrityError):
        return None


def _refuse_another(ctx: Context, final: Path, identity: Identity, *, resume: bool) -> None:
    """Another configuration or model under this name, finished or stopped half-way, is not overwritten.

    New texts or activations under the same configuration are no such case (the SAE is merely stale), unless a resume
    was asked for.
    """
    wanted = identity.record()
    done, stopped = _finished(final), _stopped_identity(final)
    if stopped == wanted:
        return
    for record, state in ((done.record if done else None, "is trained"), (stopped, "was begun")):
        strict = resume and record is stopped
        if record is None or (_question(record) == _question(wanted) and not (strict and record != wanted)):
            continue
        apart = _question(record) != _question(wanted)
        raise InputError(
            f"{final.name} {state} with another configuration",
            why=difference(*map(_question, (record, wanted))) if apart else difference(record, wanted),
            fix="choose another --name, or replace it with --force",
            where=str(final),
            code="other-configuration",
        )
    if resume and stopped is None:
        ctx.run.notice("train: there is nothing to resume, so it starts from the beginning")


def _question(record: Mapping[str, Any]) -> dict[str, object]:
    """What makes it another SAE, and not the same one gone stale: its configuration and the model that it reads."""
    return {key: record.get(key) for key in ("config", "model_revision")}


def _stopped_identity(final: Path) -> dict | None:
    """The identity of an unfinished run in the work folder of `final`, if there is one."""
    try:
        return json.loads((final.with_name(f".{final.name}.partial") / "checkpoints" / "identity.json").read_bytes())
    except (OSError, ValueError):
        return None


def _train(ctx: Context, config: Config, job: _Job, final: Path, identity: Identity) -> Artifact:
    from ..corpus.windows import TokenStore
    from ..sae.data import ActivationRows
    from ..sae.folder import Origin
    from ..sae.produce import CHECKPOINTS, Request, produce
    from ..store.shards import ShardReader
    from .models import pick_device
    from .splice import spliced_loss

    started, meta = time.monotonic(), job.meta
    device = pick_device(ctx.device)
    store = TokenStore(ctx.project.tokens / str(meta["tokens_name"]))
    held_out = _held_out(ctx, store)
    with work(final, identity, origins=ctx.origins, fresh=ctx.force) as w:
        write_json(w.path / CHECKPOINTS / "identity.json", identity.record())
        rows = ActivationRows(ShardReader(job.activations.path), meta["special_ids"], held_out)
        request = Request(
            job.cls,
            job.options,
            job.length,
            config.lr,
            config.batch_size,
            config.checkpoint_every,
            config.seed,
        )
        summary = produce(
            w.path,
            rows,
            request,
            Origin(meta["model"], meta["hook_point"], store.window),
            ctx.run,
            registry=ctx.plugins.registry,
            ce=spliced_loss(ctx, meta, store, held_out, config.ce_windows),
            facts={
                "layer": meta["layer"],
                "model_revision": meta["model_revision"],
                "tokens_fingerprint": meta["tokens"],
                "tokens_name": meta["tokens_name"],
                "held_out_windows": int(held_out.sum()),
            },
            device=device,
        )
        seconds = round(time.monotonic() - started, 3)
        return w.seal({"name": job.name, **summary}, discard=(CHECKPOINTS,), seconds=seconds)


def _held_out(ctx: Context, store: TokenStore) -> Tensor:
    """[n_windows] bool: windows of documents whose split is not `train`; where that leaves nothing to train
    on or nothing
    to measure on, the last 5 % of the windows."""
    import torch

    aside = torch.tensor([document["split"] != "train" for document in store.documents], dtype=torch.bool)
    found = aside[torch.tensor(store.windows["document"], dtype=torch.int64)]
    if bool(found.any()) and not bool(found.all()):
        return found
    n = found.numel()
    last = max(1, round(_HELD_OUT_SHARE * n)) if n > 1 else 0
    ctx.run.notice(f"train: no usable split in the manifest, so the last {last} of {n} windows are held out")
    return torch.arange(n) >= n - last


def _exported(ctx: Context, artifact: Artifact, form: str) -> Result:
    from ..sae import folder

    target = folder.export(artifact.check().path, form)
    ctx.run.notice(f"train: exported {target}")
    return Result(STAGE, artifact.path, {**artifact.summary, "export": str(target)})
