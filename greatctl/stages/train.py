"""Stage `train`: activations become a sparse autoencoder.

    greatctl train --arch batchtopk --expansion 8 --k 32

Reads the newest activations (with `--stream` the newest tokens through the model, storing nothing), holds out the
documents whose split is not `train`, and writes results/saes/<name>: a folder in SAELens layout with the training
curve (metrics.parquet, metrics.jsonl), the measurements on held-out rows (evaluation.json) and how it was made
(training.json). A killed run goes on at its last checkpoint and ends with the same bytes.

With `--sweep k=16,32` every combination of the values is trained in one walk over the activations: see `train_sweep`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ..errors import InputError, did_you_mean
from ..store.artifact import Artifact, Identity, work
from ..store.files import write_json
from .context import Context, Plan, Result, StageConfig
from .made import made_already
from .sae_options import pairs, sweeps
from .train_jobs import STAGE, Job, Maker, finished, lasting, prepare, refuse_another, request_of

__all__ = ["Config", "plan", "run"]


class Config(StageConfig):
    """Settings of `greatctl train`. None: as follows from the data, or the architecture's default."""

    arch: str = Field("batchtopk", description="architecture: a built-in one, or a plugin's")
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
    target_hook_point: str | None = Field(None, description="site that a transcoder writes")
    name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="folder name (ARCH-DSAE-kK-HOOK)"
    )
    l1_coefficient: float | None = Field(None, ge=0, description="weight of the L1 penalty (relu, gated)")
    decoder_norm_weighted: bool | None = Field(
        None, description="weight the L1 penalty by decoder norms, which are then free (relu)"
    )
    aux_coefficient: float | None = Field(
        None, ge=0, description="weight of the dead-latent loss AuxK (topk, batchtopk and their kin)"
    )
    option: Annotated[dict[str, Any], BeforeValidator(pairs)] = Field(
        {}, description="further settings of the architecture, KEY=VALUE"
    )
    stream: bool = Field(False, description="harvest while training, and store no activations")
    model: str | None = Field(None, description="model to stream from (the one the tokens were made for)")
    buffer_rows: int | None = Field(
        None, ge=1, description="rows that --stream holds and mixes (2^19, at most 4 GiB of activations)"
    )
    checkpoint_every: int = Field(500, ge=1, description="steps between checkpoints")
    ce_windows: int = Field(64, ge=0, description="held-out windows for the language model's loss; 0 = do not measure")
    controls: bool = Field(
        False, description="also train the companions: frozen decoder, random model, two other seeds"
    )
    tensorboard: bool = Field(False, description="also write TensorBoard files, to results/logs/tensorboard")
    resume: bool = Field(
        False, description="go on with a stopped run (done anyway; refuses if its inputs changed since)"
    )
    export: Literal["saelens", "sparsify", "dictionary_learning", "pth"] | None = Field(
        None, description="also write exports/; alone on a finished SAE"
    )
    sweep: Annotated[dict[str, list[str]], BeforeValidator(sweeps)] = Field(
        {}, description="settings with several values each, KEY=A,B; every combination is trained in one walk"
    )
    seed: int = Field(0, ge=0, description="seed of initialisation and shuffle")
    shuffle_seed: int | None = Field(None, ge=0, description="seed of the shuffle alone (the seed)")


def plan(ctx: Context, config: Config) -> Plan:
    """What would be trained, on what.

    Raises:
        InputError: no activations (of that hook point), or their tokens are gone or were made again; or no SAE of the
            name that is to be exported.
        IntegrityError: a shard is damaged.
        ManifestError: a setting is out of the architecture's range (k above d_sae).
        UsageError: two lengths or two sizes are given, or an option that the architecture does not have.
    """
    if config.sweep:
        from .train_sweep import plan_sweep

        return plan_sweep(ctx, config)
    if config.export and config.name and not finished(ctx.project.saes / config.name):
        _refuse_export_of_nothing(ctx, config.name)
    return prepare(ctx, config).plan


def run(ctx: Context, config: Config) -> Result:
    """Train, or say that nothing changed; `export` on a finished SAE only exports."""
    if config.sweep:
        from .train_sweep import run_sweep

        return run_sweep(ctx, config)
    if config.export and config.name:
        if (done := finished(ctx.project.saes / config.name)) and not ctx.force:
            return _exported(ctx, done, config.export)
        _refuse_export_of_nothing(ctx, config.name)
    job = prepare(ctx, config)
    final, identity = job.plan.target
    if config.export and (done := finished(final)) and not ctx.force:
        return _exported(ctx, done, config.export)
    if artifact := made_already(ctx, "train", final, identity):
        return Result(STAGE, artifact.path, _with_controls(ctx, config, job, artifact), up_to_date=True)
    if not ctx.force:
        refuse_another(ctx, final, identity, resume=config.resume)
    artifact = _train(ctx, config, job, final, identity)
    summary = _with_controls(ctx, config, job, artifact)
    if config.export:
        summary |= _exported(ctx, artifact, config.export).summary
    return Result(STAGE, artifact.path, summary)


def _refuse_export_of_nothing(ctx: Context, name: str) -> None:
    """A name and a format alone ask for an export, and not for a training under a misspelt name.

    Raises:
        InputError: no SAE has this name, nor was one begun.
    """
    asked = {setting for setting, origin in ctx.origins.items() if origin.startswith("flag")}
    begun = (ctx.project.saes / f".{name}.partial").is_dir()
    if "name" not in asked or asked - {"name", "export"} or ctx.force or begun:
        return
    there = sorted(path.name for path in ctx.project.saes.glob("[!.]*") if path.is_dir())
    raise InputError(
        f"there is no SAE named {name!r} to export",
        why=f"{ctx.project.saes} holds {', '.join(there) or 'none'}",
        fix=did_you_mean(name, there) if there else "train one first: `greatctl train`",
        code="no-such-sae",
    )


def _train(ctx: Context, config: Config, job: Job, final: Path, identity: Identity) -> Artifact:
    from ..sae.produce import CHECKPOINTS
    from .curves import tensorboard

    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        if config.tensorboard:  # first: a missing package leaves no work folder behind
            logs = ctx.project.results / "logs" / "tensorboard" / job.name
            ctx = dataclasses.replace(ctx, run=stack.enter_context(tensorboard(ctx.run, logs)))
        make = Maker(ctx, config, job)  # before the folder, as it may refuse the device
        w = stack.enter_context(work(final, identity, origins=lasting(ctx.origins), fresh=ctx.force))
        write_json(w.path / CHECKPOINTS / "identity.json", identity.record())
        summary = make(w.path, request_of(config, job))
        seconds = round(time.monotonic() - started, 3)
        return w.seal({"name": job.name, **summary}, discard=(CHECKPOINTS,), seconds=seconds)


def _with_controls(ctx: Context, config: Config, job: Job, sae: Artifact) -> dict[str, object]:
    """The SAE's summary, with its companions' where they were asked for."""
    if not config.controls:
        return dict(sae.summary)
    from .controls import Trained, train_controls

    make = Maker(ctx, config, job)
    trained = Trained(sae, job.inputs.meta, make.store, request_of(config, job), make, job.inputs.target_meta)
    return {**sae.summary, "controls": train_controls(ctx, config, trained)}


def _exported(ctx: Context, artifact: Artifact, form: str) -> Result:
    from ..sae import folder

    target = folder.export(artifact.check().path, form, say=lambda text: ctx.run.notice(f"train: {text}"))
    ctx.run.notice(f"train: exported {target}")
    return Result(STAGE, artifact.path, {**artifact.summary, "export": str(target)})
