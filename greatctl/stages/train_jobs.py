"""What one SAE of `greatctl train` is: its inputs and settings found out, its folder, and how it is made in it.

`prepare` touches nothing heavy; `Maker` opens the rows and measures. A training of one SAE and a sweep of many
(`train_sweep`) are both made of these.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, IntegrityError, ResourceError, UsageError
from ..settings import Origins
from ..store.artifact import Artifact, Identity, difference, load
from .context import Context, Plan
from .sae_options import ARCH_FLAGS, architecture_options, one_of
from .sae_rows import Inputs, held_out, open_rows, stored, streamed

if TYPE_CHECKING:
    from ..sae.produce import Request
    from ..sae.rows import Rows
    from ..store.shards import ShardReader
    from .train import Config

__all__ = [
    "STAGE",
    "Job",
    "Maker",
    "finished",
    "lasting",
    "prepare",
    "refuse_another",
    "request_of",
    "training_device",
]

STAGE = "train"
_LENGTHS = ("steps", "tokens", "epochs")
_EPOCHS, _EXPANSION = 4, 8
_STREAMING = ("model", "buffer_rows")  # settings that mean nothing without --stream
_PASSING = ("resume", "controls", "tensorboard", "export", "sweep")


@dataclass(frozen=True)
class Job:
    """What a plan found out and a run needs."""

    inputs: Inputs
    cls: type
    options: dict[str, object]
    length: tuple[str, int]
    name: str
    plan: Plan


def prepare(ctx: Context, config: Config, known: dict[object, Inputs] | None = None) -> Job:
    """What would be trained, on what.

    Args:
        known: inputs that were looked up before, by their hook points; grows.

    Raises:
        InputError: no activations (of that hook point), or their tokens are gone or were made again.
        IntegrityError: a shard is damaged.
        ManifestError: a setting is out of the architecture's range (k above d_sae).
        UsageError: two lengths or two sizes are given, an option that the architecture does not have, or one of
            --stream without it.
    """
    length = one_of(ctx, config, _LENGTHS, ("epochs", _EPOCHS))
    size = one_of(ctx, config, ("d_sae", "expansion"), ("expansion", _EXPANSION))
    cls = ctx.plugins.registry.get("architectures", config.arch)
    known = {} if known is None else known
    place = (config.hook_point, config.target_hook_point, bool(cls.reads_target))
    inputs = known[place] if place in known else _inputs(ctx, config, reads_target=bool(cls.reads_target))
    known[place] = inputs
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
    shuffle = {} if config.shuffle_seed in (None, config.seed) else {"shuffle_seed": config.shuffle_seed}
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
            **shuffle,
        },
        inputs=inputs.fingerprints,
        plugins=ctx.plugins.digests({"architectures": [config.arch]}),
        model_revision=meta["model_revision"],
    )
    return Job(
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
    idle = [name for name in _STREAMING if ctx.origins.get(name, "").startswith("flag")]
    if idle and not config.stream:
        raise UsageError(
            f"--{idle[0].replace('_', '-')} needs --stream",
            why="activations that are stored were read by a model before",
            fix="leave it out, or add --stream",
        )
    if config.stream:
        return streamed(ctx, config.model, config.hook_point, config.target_hook_point, config.buffer_rows)
    return stored(ctx, config.hook_point, config.target_hook_point)


def _facts(config: Config, inputs: Inputs, sizes: Mapping[str, int], length: tuple[str, int]) -> dict[str, object]:
    d_in, d_sae = sizes["d_in"], sizes["d_sae"]
    d_out = sizes.get("d_out", d_in)
    rows = int(inputs.meta["rows"])
    parameters = d_sae * (d_in + d_out + 1) + d_out
    return {
        "arch": config.arch,
        **sizes,
        "hook_point": inputs.meta["hook_point"],
        "rows": rows,
        length[0]: length[1],
        **({"batch_size": min(config.batch_size, rows)} if config.batch_size else {}),  # no batch is larger
        "weight_bytes": 4 * parameters,
        "training_bytes": 16 * parameters,
        **({"stream": True} if config.stream else {}),
    }


def finished(final: Path) -> Artifact | None:
    """The sealed SAE of that folder, if there is one."""
    try:
        return load(final)
    except (InputError, IntegrityError):
        return None


def refuse_another(ctx: Context, final: Path, identity: Identity, *, resume: bool) -> None:
    """Another configuration or model under this name, finished or stopped half-way, is not overwritten.

    New texts or activations under the same configuration are no such case (the SAE is merely stale), unless a resume
    was asked for.

    Raises:
        InputError: it is one.
    """
    wanted = identity.record()
    done, stopped = finished(final), _stopped_identity(final)
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


def request_of(config: Config, job: Job) -> Request:
    """The training that `config` asks for."""
    from ..sae.produce import Request

    return Request(
        job.cls,
        job.options,
        job.length,
        config.lr,
        config.batch_size,
        config.checkpoint_every,
        config.seed,
        shuffle_seed=None if config.shuffle_seed == config.seed else config.shuffle_seed,
    )


def lasting(origins: Mapping[str, str]) -> Mapping[str, str]:
    """Without the settings that say how this once is run: a resumed run's record is that of a straight one.

    What a manifest sweeps is given as nothing, where it was (see `train_members`).
    """
    kept = {name: origin for name, origin in origins.items() if name not in _PASSING}
    if not isinstance(origins, Origins):
        return kept
    found = Origins(kept, origins.given)
    found.given |= {name: value for name, value in origins.given.items() if name == "sweep"}
    return found


def training_device(ctx: Context) -> str:
    """The device to train on; asked before a folder is opened, so that a refusal does not cost what --force replaces.

    Raises:
        ResourceError: it is not there, or has no float64.
    """
    from .models import pick_device

    device = pick_device(ctx.device)
    if device == "mps":
        raise ResourceError(
            "an autoencoder cannot be trained on mps",
            why="its sums and its steering are float64, which MPS does not have",
            fix="use --device cpu",
        )
    return device


class Maker:
    """Trains and measures an SAE in a folder: the one that was asked for, and its companions (`stages.controls`).

    Raises:
        ResourceError: the device is not there, or has no float64.
    """

    def __init__(self, ctx: Context, config: Config, job: Job) -> None:
        from ..corpus.windows import TokenStore

        self.ctx, self.config, self.job = ctx, config, job
        self.device = training_device(ctx)
        self.store = TokenStore(job.inputs.tokens.path)
        self.aside = held_out(ctx, self.store)

    def __call__(
        self, folder: Path, request: Request, other: ShardReader | tuple[ShardReader, ShardReader] | None = None
    ) -> dict[str, object]:
        """Train with `request` in `folder`; `other` shards (with their targets) take the place of the SAE's own rows,
        and the language model's loss is then left out. Returns the summary.
        """
        from ..sae.data import ActivationRows
        from ..sae.produce import produce

        more = self.measuring()
        if other is None:
            buffer_rows, inputs = self.config.buffer_rows, [self.job.inputs]
            rows: Rows = open_rows(self.ctx, inputs, self.store, self.aside, buffer_rows=buffer_rows)[0]
        else:
            reader, paired = other if isinstance(other, tuple) else (other, None)
            rows = ActivationRows(
                reader,
                self.job.inputs.meta["special_ids"],
                self.aside,
                target=paired,
                ahead=self.device.startswith("cuda"),
            )
            more["ce"] = None
        return produce(folder, rows, request, run=self.ctx.run, device=self.device, **more)

    def measuring(self) -> dict[str, Any]:
        """The arguments of `greatctl.sae.produce.finish` that follow from the inputs."""
        from ..sae.folder import Origin
        from .splice import spliced_loss, window_labels

        meta, target = self.job.inputs.meta, self.config.target_hook_point
        return {
            "origin": Origin(meta["model"], meta["hook_point"], self.store.window, target_hook_point=target),
            "registry": self.ctx.plugins.registry,
            "ce": spliced_loss(
                self.ctx, meta, self.store, self.aside, self.config.ce_windows, target_hook_point=target
            ),
            "facts": {
                "layer": meta["layer"],
                "model_revision": meta["model_revision"],
                "tokens_fingerprint": meta["tokens"],
                "tokens_name": meta["tokens_name"],
                "held_out_windows": int(self.aside.sum()),
            },
            "labels": window_labels(self.store),
        }
