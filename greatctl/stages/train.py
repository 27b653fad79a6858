"""Stage `train`: activations become a sparse autoencoder.

    greatctl train --arch batchtopk --expansion 8 --k 32

Reads the newest activations (with `--stream` the newest tokens through the model, storing nothing), holds out the
documents whose split is not `train`, and writes results/saes/<name>: a folder in SAELens layout with the training
curve (metrics.parquet, metrics.jsonl), the measurements on held-out rows (evaluation.json) and how it was made
(training.json). A killed run goes on at its last checkpoint and ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ..errors import InputError, IntegrityError, UsageError
from ..settings import Origins
from ..store.artifact import Artifact, Identity, current, difference, load, touch, work
from ..store.files import write_json
from .context import Context, Plan, Result, StageConfig
from .sae_options import ARCH_FLAGS, architecture_options, one_of, pairs
from .sae_rows import Inputs, held_out, open_rows, stored, streamed

if TYPE_CHECKING:
    from ..sae.produce import Request
    from ..store.shards import ShardReader

__all__ = ["Config", "plan", "run"]

STAGE = "train"
_LENGTHS = ("steps", "tokens", "epochs")
_EPOCHS, _EXPANSION = 4, 8
_PASSING = ("resume", "controls", "tensorboard", "export")


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
    export: Literal["saelens", "pth"] | None = Field(None, description="also write exports/; alone on a finished SAE")
    seed: int = Field(0, ge=0, description="seed of initialisation and shuffle")


@dataclass(frozen=True)
class _Job:
    """What `plan` found out and `run` needs."""

    inputs: Inputs
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
        return Result(STAGE, artifact.path, _with_controls(ctx, config, job, artifact), up_to_date=True)
    if not ctx.force:
        _refuse_another(ctx, final, identity, resume=config.resume)
    ctx.run.notice(f"train: {reason or 'forced'}")
    artifact = _train(ctx, config, job, final, identity)
    summary = _with_controls(ctx, config, job, artifact)
    if config.export:
        summary |= _exported(ctx, artifact, config.export).summary
    return Result(STAGE, artifact.path, summary)


def _prepare(ctx: Context, config: Config) -> _Job:
    length = one_of(ctx, config, _LENGTHS, ("epochs", _EPOCHS))
    size = one_of(ctx, config, ("d_sae", "expansion"), ("expansion", _EXPANSION))
    cls = ctx.plugins.registry.get("architectures", config.arch)
    inputs = _inputs(ctx, config, reads_target=bool(cls.reads_target))
    meta = inputs.meta
    d_in = int(meta["d_model"])
    d_sae = size[1] if size[0] == "d_sae" else size[1] * d_in
    sizes = {"d_in": d_in, "d_sae": d_sae}
    if inputs.target_meta is not None:
        sizes["d_out"] = int(inputs.target_meta["d_model"])
    flags = {name: getattr(config, name) for name in ARCH_FLAGS}
    options = architecture_options(ctx, config.arch, cls.Config, flags, config.option, sizes)
    k = f"-k{options['k']}" if options.get("k") else ""
    name = config.name or f"{config.arch}-{d_sae}{k}-{meta['hook_point']}"
    target = {"target_hook_point": config.target_hook_point} if inputs.target_meta else {}
    identity = Identity(
        STAGE,
        {
            "arch": config.arch,
            **options,
            length[0]: length[1],
            "lr": config.lr,
            "batch_size": config.batch_size,
            "hook_point": meta["hook_point"],
            **target,
            **inputs.identity,
            "ce_windows": config.ce_windows,
            "seed": config.seed,
        },
        inputs=inputs.fingerprints,
        plugins=ctx.plugins.digests({"architectures": [config.arch]}),
        model_revision=meta["model_revision"],
    )
    return _Job(
        inputs,
        cls,
        options,
        length,
        name,
        Plan(STAGE, ctx.project.saes / name, identity, _facts(config, inputs, sizes, length)),
    )


def _inputs(ctx: Context, config: Config, *, reads_target: bool) -> Inputs:
    """Shards or tokens, and a second site exactly where the architecture writes one."""
    if reads_target and config.target_hook_point is None:
        raise UsageError(
            f"{config.arch} needs --target-hook-point",
            why="it reads one hook point and writes another",
            fix="for an MLP: --hook-point blocks.4.hook_resid_mid --target-hook-point blocks.4.hook_mlp_out",
        )
    if config.target_hook_point is not None and not reads_target:
        raise UsageError(
            f"{config.arch} has no --target-hook-point",
            why="it writes what it reads",
            fix="leave it out, or choose --arch transcoder",
        )
    if config.stream:
        return streamed(ctx, config.model, config.hook_point, config.target_hook_point, config.buffer_rows)
    return stored(ctx, config.hook_point, config.target_hook_point)


def _facts(config: Config, inputs: Inputs, sizes: Mapping[str, int], length: tuple[str, int]) -> dict[str, object]:
    d_in, d_sae = sizes["d_in"], sizes["d_sae"]
    d_out = sizes.get("d_out", d_in)
    parameters = d_sae * (d_in + d_out + 1) + d_out
    return {
        "arch": config.arch,
        **sizes,
        "hook_point": inputs.meta["hook_point"],
        "rows": int(inputs.meta["rows"]),
        length[0]: length[1],
        "weight_bytes": 4 * parameters,
        "training_bytes": 16 * parameters,
        **({"stream": True} if config.stream else {}),
    }


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


def _request(config: Config, job: _Job) -> Request:
    from ..sae.produce import Request

    return Request(job.cls, job.options, job.length, config.lr, config.batch_size, config.checkpoint_every, config.seed)


def _train(ctx: Context, config: Config, job: _Job, final: Path, identity: Identity) -> Artifact:
    from ..sae.produce import CHECKPOINTS
    from .curves import tensorboard

    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        if config.tensorboard:  # first: a missing package leaves no work folder behind
            logs = ctx.project.results / "logs" / "tensorboard" / job.name
            ctx = dataclasses.replace(ctx, run=stack.enter_context(tensorboard(ctx.run, logs)))
        w = stack.enter_context(work(final, identity, origins=_lasting(ctx.origins), fresh=ctx.force))
        write_json(w.path / CHECKPOINTS / "identity.json", identity.record())
        summary = _Maker(ctx, config, job)(w.path, _request(config, job))
        seconds = round(time.monotonic() - started, 3)
        return w.seal({"name": job.name, **summary}, discard=(CHECKPOINTS,), seconds=seconds)


def _lasting(origins: Mapping[str, str]) -> Mapping[str, str]:
    """Without the settings that say how this once is run: a resumed run's record is that of a straight one."""
    kept = {name: origin for name, origin in origins.items() if name not in _PASSING}
    return Origins(kept, origins.given) if isinstance(origins, Origins) else kept


class _Maker:
    """Trains and measures an SAE in a folder: the one that was asked for, and its companions (`stages.controls`)."""

    def __init__(self, ctx: Context, config: Config, job: _Job) -> None:
        from ..corpus.windows import TokenStore

        self.ctx, self.config, self.job = ctx, config, job
        self.store = TokenStore(job.inputs.tokens.path)
        self.aside = held_out(ctx, self.store)

    def __call__(
        self, folder: Path, request: Request, other: ShardReader | tuple[ShardReader, ShardReader] | None = None
    ) -> dict[str, object]:
        """Train with `request` in `folder`; `other` shards (with their targets) take the place of the SAE's own rows,
        and the language model's loss is then left out. Returns the summary.
        """
        from ..sae.data import ActivationRows
        from ..sae.folder import Origin
        from ..sae.produce import produce
        from .models import pick_device
        from .splice import spliced_loss, window_labels

        ctx, inputs, meta, target = self.ctx, self.job.inputs, self.job.inputs.meta, self.config.target_hook_point
        device = pick_device(ctx.device)
        if other is None:
            rows = open_rows(ctx, inputs, self.store, self.aside, buffer_rows=self.config.buffer_rows)
            windows = self.config.ce_windows
            ce = spliced_loss(ctx, meta, self.store, self.aside, windows, target_hook_point=target)
        else:
            reader, paired = other if isinstance(other, tuple) else (other, None)
            rows, ce = ActivationRows(reader, meta["special_ids"], self.aside, target=paired), None
        return produce(
            folder,
            rows,
            request,
            Origin(meta["model"], meta["hook_point"], self.store.window, target_hook_point=target),
            ctx.run,
            registry=ctx.plugins.registry,
            ce=ce,
            facts={
                "layer": meta["layer"],
                "model_revision": meta["model_revision"],
                "tokens_fingerprint": meta["tokens"],
                "tokens_name": meta["tokens_name"],
                "held_out_windows": int(self.aside.sum()),
            },
            device=device,
            labels=window_labels(self.store),
        )


def _with_controls(ctx: Context, config: Config, job: _Job, sae: Artifact) -> dict[str, object]:
    """The SAE's summary, with its companions' where they were asked for."""
    if not config.controls:
        return dict(sae.summary)
    from .controls import Trained, train_controls

    make = _Maker(ctx, config, job)
    trained = Trained(sae, job.inputs.meta, make.store, _request(config, job), make, job.inputs.target_meta)
    return {**sae.summary, "controls": train_controls(ctx, config, trained)}


def _exported(ctx: Context, artifact: Artifact, form: str) -> Result:
    from ..sae import folder

    target = folder.export(artifact.check().path, form)
    ctx.run.notice(f"train: exported {target}")
    return Result(STAGE, artifact.path, {**artifact.summary, "export": str(target)})
