"""Stage `harvest`: token windows become activations.

    greatctl harvest --hook-point blocks.4.hook_resid_post

One pass of the frozen model, stopped after the deepest hook point, fills one artifact a hook point below
data/activations/<model>/. A shard is a fixed number of consecutive windows cut into fixed batches, so its
bytes do not depend on when, after which interruption or beside which other hook points it was made. While one
is computed, the one before is written.

How fast it goes (device, `--compile`, a batch halved for want of memory) is no part of what it is: such runs agree
within the rounding of the dtype, and on the CPU nothing is compiled unless asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ..errors import InputError, ManifestError, ResourceError, UsageError
from ..store.artifact import Artifact, Identity, Work, current, newest, touch, work
from ..store.files import free_bytes
from .behind import Behind
from .context import Context, Plan, Result, StageConfig
from .models import chosen_model, open_model, pick_device, slug
from .sealing import seal
from .workers import Share, adopt, worker_folder

if TYPE_CHECKING:
    from ..corpus.windows import TokenStore
    from ..model.interface import FrozenModel
    from ..model.loading import ModelInfo
    from ..model.reading import BatchSize, Shard
    from ..store.shards import ShardWriter

__all__ = ["Config", "plan", "run"]

STAGE = "harvest"
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_ROW_BYTES = 12  # window, position and token of a row, int32 each
_WORTH_COMPILING = 1_000_000  # tokens; the compiler takes some seconds first
_NO_ROWS = ("hook_pattern", "hook_attn_scores")  # these have a matrix a head, not a vector a token


class Config(StageConfig):
    """Settings of `greatctl harvest`."""

    model: str | None = Field(None, description="model to read with (default: the one the tokens were made for)")
    hook_point: list[str] = Field([], description="where to read, e.g. blocks.4.hook_resid_post (repeatable)")
    layer: int | None = Field(None, description="short for --hook-point blocks.N.hook_resid_post")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="stored precision; auto is float32 below d_model 1024, else bfloat16"
    )
    batch_size: int | None = Field(None, ge=1, description="windows a forward pass (default: what fills the device)")
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="fuse and compile the blocks; auto does so on CUDA, and compiles from a million tokens on"
    )
    engine: Literal["auto", "lean", "transformer-lens"] = Field("auto", description="how the model is run")
    shard_windows: int = Field(256, ge=1, description="windows a shard")
    worker: str | None = Field(None, description="I/N: make only every Nth shard; the plain command then seals")


@dataclass(frozen=True)
class _Job:
    """What `plan` found out and `run` needs. `identities` and `finals` are one a hook point."""

    tokens: Artifact
    store: TokenStore
    info: ModelInfo
    engine: str
    dtype: str
    identities: Mapping[str, Identity]
    finals: Mapping[str, Path]
    share: Share | None

    @property
    def sites(self) -> list[str]:
        return list(self.identities)


def plan(ctx: Context, config: Config) -> Plan:
    """What would be harvested, and how large it gets.

    Raises:
        InputError: no tokens yet, or they were made with another tokenizer.
        ManifestError: a layer is out of range, or the windows are longer than the model's context.
        UsageError: an unknown hook point, or a worker that cannot be.
        AccessError: the model is gated or not cached.
    """
    job = _prepare(ctx, config)
    rows = int(job.store.length.sum())
    site = job.sites[0]
    facts = {
        "model": job.info.name,
        "hook_points": job.sites,
        "engine": job.engine,
        "dtype": job.dtype,
        "tokens": rows,
        "d_model": job.info.d_model,
        "shards": -(-len(job.store.length) // config.shard_windows),
        "bytes": rows * _row_bytes(job) * len(job.sites),
    }
    return Plan(STAGE, job.finals[site], job.identities[site], facts)


def run(ctx: Context, config: Config) -> Result:
    """Harvest every hook point that is not up to date, in one pass."""
    job = _prepare(ctx, config)
    ready: dict[str, Artifact] = {}
    reasons: list[str] = []
    for site in job.sites:
        artifact, reason = current(job.finals[site], job.identities[site])
        if artifact and not ctx.force:
            ready[site] = artifact
        else:
            reasons.append(reason or "forced")
    if not reasons:
        ctx.run.notice("harvest: up to date")
        return _result(job, ready, up_to_date=True)
    ctx.run.notice(f"harvest: {reasons[0]}")
    pick_device(ctx.device)  # a device that is not there must not cost the shards that --force would replace
    if job.share:
        return _work_along(ctx, config, job, job.share, [site for site in job.sites if site not in ready])
    with ExitStack() as stack:
        works = {
            site: stack.enter_context(
                work(job.finals[site], job.identities[site], origins=ctx.origins, fresh=ctx.force)
            )
            for site in job.sites
            if site not in ready
        }
        ready |= _harvest(ctx, config, job, works)
    return _result(job, ready)


def _work_along(ctx: Context, config: Config, job: _Job, share: Share, sites: Sequence[str]) -> Result:
    """Make the shards of one worker for `sites` and leave them for the plain command, which seals."""
    from ..store.shards import ShardWriter

    with ExitStack() as stack:
        folders = {
            s: stack.enter_context(worker_folder(job.finals[s], job.identities[s], share, fresh=ctx.force))
            for s in sites
        }
        writers = {site: ShardWriter(folder) for site, folder in folders.items()}
        mine = [n for n in range(len(_spans(config, job))) if share.has(n)]
        speed, _ = _fill(ctx, config, job, writers, mine)
    command = "greatctl harvest --force" if ctx.force else "greatctl harvest"
    ctx.run.notice(f"harvest: this worker is done; when all are, run `{command}` to seal")
    summary = {
        "n_tokens": int(job.store.length.sum()),
        "d_model": job.info.d_model,
        "hook_point": sites[0],
        "dtype": job.dtype,
        "shards": len(mine),
        "tokens_per_second": speed,
        "worker": config.worker,
    }
    return Result(STAGE, None, summary)


def _prepare(ctx: Context, config: Config) -> _Job:
    share = Share.parse(config.worker)
    tokens = newest(ctx.project.tokens, "tokenize")
    if tokens is None:
        raise InputError(
            "there are no tokens yet",
            why=f"{ctx.project.tokens} is empty",
            fix="run `greatctl tokenize` first",
        )
    tokens.check()
    from .. import model
    from ..corpus.windows import TokenStore
    from ..model.loading import SMALL

    store = TokenStore(tokens.path)
    source, name = chosen_model(ctx, config.model, fallback=store.tokenizer["path_or_id"])
    info = model.describe(source, name=name, offline=ctx.offline)
    _match(store, source, info, ctx)
    sites = _sites(config, info)
    engine = model.choose_engine(config.engine, info.family, sites)
    dtype = config.dtype if config.dtype != "auto" else ("float32" if info.d_model < SMALL else "bfloat16")
    shape = {
        "dtype": dtype,
        "engine": engine,
        "batch_size": config.batch_size,
        "shard_windows": config.shard_windows,
    }
    identities = {
        site: Identity(
            STAGE,
            {"hook_point": site, "model": slug(name), **shape},
            inputs={"tokens": tokens.fingerprint},
            model_revision=info.revision,
        )
        for site in sites
    }
    finals = {site: ctx.project.activations / slug(name) / site for site in sites}
    return _Job(tokens, store, info, engine, dtype, identities, finals, share)


def _match(store: TokenStore, source: str | Path, info: ModelInfo, ctx: Context) -> None:
    """The tokens must be what this model reads."""
    from ..model.tokenizer import digest

    theirs, ours = store.tokenizer["sha256"], digest(source, offline=ctx.offline)
    if theirs != ours:
        raise InputError(
            f"the tokens were not made for {info.name}",
            why=f"their tokenizer has sha256 {theirs[:16]}…, the model's {ours[:16]}…",
            fix=f"run `greatctl tokenize --model {info.name}` first",
            where=str(store.path),
        )
    if store.window > info.n_ctx:
        raise ManifestError(
            f"windows of {store.window} tokens are longer than the context of {info.name}",
            why=f"the model reads at most {info.n_ctx} tokens",
            fix=f"run `greatctl tokenize --window {info.n_ctx}`",
        )


def _sites(config: Config, info: ModelInfo) -> list[str]:
    from ..model.interface import Site

    if config.layer is not None and config.hook_point:
        raise UsageError("--layer and --hook-point exclude each other", why="both say where to read", fix="drop one")
    layer = info.n_layers // 2 if config.layer is None else config.layer
    names = list(dict.fromkeys(config.hook_point)) or [f"blocks.{layer}.hook_resid_post"]
    for name in names:
        if name.endswith(_NO_ROWS):
            raise UsageError(
                f"{name} cannot be harvested",
                why="it has a matrix a head, and harvest keeps a vector a token",
                fix=f"use blocks.{layer}.attn.hook_z, or capture it in Python",
            )
        at = layer if not config.hook_point else Site.parse(name).layer
        if not 0 <= at < info.n_layers:
            raise ManifestError(
                f"layer {at} is out of range",
                why=f"{info.name} has the layers 0 to {info.n_layers - 1}",
                fix=f"use --layer {info.n_layers // 2}",
            )
    return names


def _row_bytes(job: _Job) -> int:
    return job.info.d_model * _BYTES[job.dtype] + _ROW_BYTES


def _harvest(ctx: Context, config: Config, job: _Job, works: Mapping[str, Work]) -> dict[str, Artifact]:
    from ..store.shards import ShardWriter

    writers = {site: ShardWriter(w.path) for site, w in works.items()}
    for site, writer in writers.items():
        if taken := adopt(job.finals[site], job.identities[site], writer):
            ctx.run.notice(f"harvest: {taken} shards of {site} come from workers")
    speed, seconds = _fill(ctx, config, job, writers, range(len(_spans(config, job))))
    return {s: _seal(job, s, works[s], writers[s], speed=speed, seconds=seconds) for s in works}


def _spans(config: Config, job: _Job) -> list[range]:
    """The windows of each shard."""
    n = len(job.store.length)
    return [range(start, min(start + config.shard_windows, n)) for start in range(0, n, config.shard_windows)]


def _fill(
    ctx: Context, config: Config, job: _Job, writers: Mapping[str, ShardWriter], numbers: Sequence[int]
) -> tuple[float, float]:
    """Make those of the shards `numbers` that are not there; returns tokens a second and seconds."""
    from ..model.reading import begin

    started = time.monotonic()
    spans = _spans(config, job)
    rows = {n: int(job.store.length[spans[n].start : spans[n].stop].sum()) for n in numbers}
    missing = {n: [s for s, writer in writers.items() if n not in writer] for n in numbers}
    folder = next(iter(writers.values())).folder
    _check_disk(job, folder, sum(rows[n] * len(sites) for n, sites in missing.items()))
    total = sum(rows.values())
    already = done = sum(rows[n] for n, sites in missing.items() if not sites)
    if already == total:
        return 0.0, time.monotonic() - started
    frozen = _open(ctx, job, list(writers))
    batch = _pace(ctx, config, job, frozen, list(writers), total - already)
    with Behind() as behind:
        for number, sites in missing.items():
            if not sites:
                continue

            def said(tokens: int, before: int = done) -> None:
                ctx.run.progress("reading", before + tokens, total, "tokens", already=already)
                ctx.run.stop_here()

            finish = begin(
                frozen,
                job.store.input_ids,
                job.store.length,
                spans[number],
                sites,
                dtype=job.dtype,
                batch_size=batch,
                shard=number,
                said=said,
            )
            behind.put(partial(_write, writers, number, finish, rows[number]))
            done += rows[number]
            ctx.run.stop_here()
    seconds = time.monotonic() - started
    return round((total - already) / seconds, 1), seconds


def _write(writers: Mapping[str, ShardWriter], number: int, finish: Callable[[], Shard], rows: int) -> None:
    for site, tensors in finish().items():
        writers[site].write(number, tensors, rows)


def _pace(ctx: Context, config: Config, job: _Job, frozen: FrozenModel, sites: Sequence[str], tokens: int) -> BatchSize:
    """How many windows a pass takes; and the blocks fused and compiled where that pays, after a comparison."""
    import torch

    from ..model.reading import BatchSize, auto_batch

    windows = config.batch_size or auto_batch(frozen.device, job.store.window)
    batch = BatchSize(windows, lambda words: ctx.run.notice(f"harvest: {words}"))
    if config.compile == "off" or (config.compile == "auto" and frozen.device.type != "cuda"):
        return batch
    ways = [True, False] if config.compile == "on" or tokens >= _WORTH_COMPILING else [False]
    while ways:
        try:
            reason = frozen.accelerate(job.store.input_ids[: batch.windows].long(), sites, compiled=ways[0])
        except torch.OutOfMemoryError:
            batch.halve()
            continue
        if reason is None:
            break
        what = "compiled" if ways.pop(0) else "fused"
        ctx.run.notice(f"harvest: the blocks run without being {what}: {reason}")
    return batch


def _check_disk(job: _Job, folder: Path, rows: int) -> None:
    """Refuse beforehand what cannot fit: a disk that fills up after an hour is an hour lost."""
    needed = rows * _row_bytes(job) * 101 // 100
    free = free_bytes(folder)
    if needed > free:
        raise ResourceError(
            f"the activations do not fit on the disk of {folder.parent}",
            why=f"{needed:,} bytes needed, {free:,} bytes free",
            fix="free some space, choose another disk with --data-dir, or tokenize fewer sources",
            where=str(folder.parent),
            code="disk-full",
        )


def _open(ctx: Context, job: _Job, sites: Sequence[str]) -> FrozenModel:
    """The model with just the blocks that are needed, checked against its own forward on a few tokens."""
    from ..model.interface import Site

    deepest = 1 + max(Site.parse(site).layer for site in sites)
    frozen = open_model(ctx, job.info.name, engine=job.engine, upto=deepest)
    if frozen.revision != job.info.revision:
        raise InputError(f"{job.info.name} changed while it was being read", fix="run the same command again")
    frozen.check(job.store.input_ids[:2, :64].long(), sites)
    return frozen


def _seal(job: _Job, site: str, w: Work, writer: ShardWriter, *, speed: float, seconds: float) -> Artifact:
    from ..model.interface import Site

    facts = {
        "model": job.info.name,
        "model_revision": job.info.revision,
        "layer": Site.parse(site).layer,
        "n_layers": job.info.n_layers,
        "tokens": job.tokens.fingerprint,
        "tokens_name": job.tokens.path.name,
    }
    return seal(w, writer, job.store, facts, hook_point=site, dtype=job.dtype, speed=speed, seconds=seconds)


def _result(job: _Job, ready: Mapping[str, Artifact], *, up_to_date: bool = False) -> Result:
    for site in reversed(job.sites):  # the first hook point becomes the newest
        touch(ready[site])
    first = ready[job.sites[0]]
    summary = {**first.summary, "hook_points": job.sites, "model": job.info.name}
    return Result(STAGE, first.path, summary, up_to_date=up_to_date)
