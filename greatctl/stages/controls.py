"""The companions of an SAE: what the same effort gives where there is nothing, or something else, to find.

    greatctl train --controls

Four SAEs with the settings of the one that was trained: one whose random decoder never learns, one on the same texts
read by a model with random weights, and two with other seeds. They lie in results/controls/<name>, one artifact, so that
none of them is ever taken for the newest SAE:

    frozen-decoder/ random-model/ seed-1/ seed-2/    a folder in SAELens layout each
    comparison.json      their numbers beside the SAE's own, and how far the decoders match
    latents.parquet      for every latent of the SAE, its best partner in each companion

A killed run goes on with the companion that it was at.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import GreatctlError
from ..store.artifact import Artifact, Identity, Work, load, work
from ..store.files import write_json
from ..store.tables import write_table
from .context import Context, Project
from .made import made_already
from .models import open_model, pick_device, resolve
from .train_jobs import training_device

if TYPE_CHECKING:
    from torch import Tensor

    from ..corpus.windows import TokenStore
    from ..model.interface import FrozenModel
    from ..sae.produce import Request
    from ..store.shards import ShardReader
    from .train import Config

__all__ = ["CONTROLS", "STAGE", "Trained", "controls_of", "train_controls"]

STAGE = "train --controls"  # the command that makes it, which errors name
# companion -> what is added to the SAE's seed: with the same initial directions, a match would prove nothing
_SEEDS = {"frozen-decoder": 3, "random-model": 4, "seed-1": 1, "seed-2": 2}
CONTROLS = tuple(_SEEDS)
_MODEL, _ACTIVATIONS = "untrained-model", "untrained-activations"  # in the work folder; gone once it is sealed
_BATCH, _SHARD_WINDOWS = 16, 256
_NUMBERS = (
    "explained_variance",
    "nmse",
    "l0",
    "ce_loss_recovered",
    "ce_loss_recovered_mean",
    "kl",
    "dead_fraction",
    "silent_fraction",
)
_NO_LOSS = "a model with random weights predicts nothing, so there is no loss to recover"


@dataclass(frozen=True)
class Trained:
    """An SAE that was trained, and how to train another one like it.

    Attributes:
        meta: meta.json of its activations; `target_meta` of those that a transcoder writes.
        request: what it was trained with.
        make: trains and measures in a folder, as the SAE itself was; the shards (with those of the target), where they
            are given, take the place of its activations, and no model is spliced.
    """

    sae: Artifact
    meta: Mapping[str, Any]
    store: TokenStore
    request: Request
    make: Callable[[Path, Request, Any], Mapping[str, object]]
    target_meta: Mapping[str, Any] | None = None


def controls_of(project: Project, sae: Artifact) -> Artifact | None:
    """The companions that were trained for exactly this SAE, if they were."""
    try:
        found = load(_folder(project, sae))
    except GreatctlError:
        return None
    return found if dict(found.record["inputs"]).get("sae") == sae.fingerprint else None  # type: ignore[call-overload]


def train_controls(ctx: Context, config: Config, job: Trained) -> dict[str, object]:
    """Train the companions that are missing, compare, and seal; or say that nothing changed.

    Returns:
        The summary: `sae`, `artifact` (folder), and `controls`, one row a companion after one for the SAE itself.

    Raises: as training and harvesting do.
    """
    final, identity = _folder(ctx.project, job.sae), _identity(config, job)
    if artifact := made_already(ctx, "controls", final, identity):
        return artifact.summary
    training_device(ctx)
    started, spoilt = time.monotonic(), _damaged(final)
    with work(final, identity, origins=ctx.origins, fresh=ctx.force) as w:
        for name in CONTROLS:
            if name in spoilt:
                shutil.rmtree(w.path / name, ignore_errors=True)
            _companion(ctx, job, w, name)
        rows = _compare(job, w)
        summary = {"sae": job.sae.path.name, "artifact": str(final), "controls": rows}
        seconds = round(time.monotonic() - started, 3)
        return w.seal(summary, discard=(_MODEL, _ACTIVATIONS), seconds=seconds).summary


def _folder(project: Project, sae: Artifact) -> Path:
    return project.results / "controls" / sae.path.name


def _damaged(final: Path) -> set[str]:
    """The companions in a sealed folder of which a file is missing or was changed: they are trained again."""
    try:
        return {output.split("/")[0] for output in load(final).damaged()}
    except GreatctlError:
        return set()


def _identity(config: Config, job: Trained) -> Identity:
    asked = {"sae": job.sae.path.name, "controls": list(CONTROLS), "ce_windows": config.ce_windows, "seed": config.seed}
    return Identity(STAGE, asked, inputs={"sae": job.sae.fingerprint}, model_revision=job.meta["model_revision"])


def _companion(ctx: Context, job: Trained, w: Work, name: str) -> None:
    """Train one companion into its folder, unless a run before this one finished it."""
    from ..sae.produce import CHECKPOINTS

    folder = w.path / name
    if (folder / "metrics.parquet").is_file():  # what is written last
        return
    ctx.run.notice(f"controls: {name}")
    seed = job.request.seed + _SEEDS[name]
    request = dataclasses.replace(job.request, seed=seed, frozen_decoder=name == "frozen-decoder")
    shards = _untrained_activations(ctx, job, w.path) if name == "random-model" else None
    folder.mkdir(exist_ok=True)
    job.make(folder, request, shards)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    if name == "random-model":
        shutil.rmtree(w.path / _ACTIVATIONS)


def _untrained_activations(ctx: Context, job: Trained, place: Path) -> ShardReader | tuple[ShardReader, ShardReader]:
    """The same windows read by a model with random weights, at the SAE's site (and its target's)."""
    from ..model.interface import Site
    from ..store.shards import ShardReader, ShardWriter

    sites = [str(job.meta["hook_point"])]
    if job.target_meta is not None:
        sites.append(str(job.target_meta["hook_point"]))
    writers = {site: ShardWriter(_made(place / _ACTIVATIONS / site)) for site in sites}
    spans = _spans(job.store)
    missing = [n for n in range(len(spans)) if any(n not in writer for writer in writers.values())]
    if missing:
        layers = 1 + max(Site.parse(site).layer for site in sites)
        frozen = _untrained_model(ctx, job, place / _MODEL, layers)
        for number in missing:
            _read_shard(ctx, job, frozen, writers, number, spans)
        shutil.rmtree(place / _MODEL)
    for writer in writers.values():
        writer.finish()
    readers = [ShardReader(writer.folder) for writer in writers.values()]
    return readers[0] if len(readers) == 1 else (readers[0], readers[1])


def _untrained_model(ctx: Context, job: Trained, folder: Path, layers: int) -> FrozenModel:
    from ..model.untrained import write_untrained
    from ..sae.data import derive

    source, _ = resolve(str(job.meta["model"]))
    shutil.rmtree(folder, ignore_errors=True)
    seed, device = derive(job.request.seed, "random-model"), pick_device(ctx.device)
    write_untrained(source, folder, layers=layers, seed=seed, device=device, offline=ctx.offline)
    return open_model(ctx, str(folder), upto=layers)


def _read_shard(
    ctx: Context, job: Trained, frozen: FrozenModel, writers: Mapping[str, Any], number: int, spans: list[range]
) -> None:
    from ..model.reading import read

    store, span = job.store, spans[number]
    rows = int(store.length[span.start : span.stop].sum())
    shard = read(
        frozen,
        store.input_ids,
        store.length,
        span,
        list(writers),
        dtype=str(job.meta["dtype"]),
        batch_size=_BATCH,
        shard=number,
        said=lambda done: ctx.run.stop_here(),
    )
    for site, writer in writers.items():
        writer.write(number, shard[site], rows)
    ctx.run.progress("reading with random weights", number + 1, len(spans), "shards")


def _spans(store: TokenStore) -> list[range]:
    n = len(store.length)
    return [range(start, min(start + _SHARD_WINDOWS, n)) for start in range(0, n, _SHARD_WINDOWS)]


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _compare(job: Trained, w: Work) -> list[dict[str, object]]:
    """Write comparison.json and latents.parquet; returns the rows."""
    from ..sae.directions import best_cosines, matching

    own = _decoder(job.sae.path)
    rows = [{"control": "this SAE", "seed": job.request.seed, **_numbers(job.sae.path)}]
    partners: dict[str, list] = {"latent": list(range(own.shape[0]))}
    for name in CONTROLS:
        folder = w.path / name
        other = _decoder(folder)
        training = json.loads((folder / "training.json").read_bytes())
        row = {"control": name, "seed": training["settings"]["seed"], **_numbers(folder)}
        row |= {f"matched_{key}": value for key, value in matching(own, other).items()}
        if name == "random-model":
            row["ce_undefined"] = _NO_LOSS
        rows.append(row)
        best, place = best_cosines(_unit(own), _unit(other))
        key = name.replace("-", "_")
        partners |= {f"{key}_cosine": best.tolist(), f"{key}_latent": place.tolist()}
    write_json(w.path / "comparison.json", rows)
    write_table(w.path / "latents.parquet", partners)
    return rows


def _numbers(folder: Path) -> dict[str, object]:
    measured = json.loads((folder / "evaluation.json").read_bytes())
    return {key: measured.get(key) for key in _NUMBERS}


def _decoder(folder: Path) -> Tensor:
    from safetensors.torch import load_file

    return load_file(folder / "sae_weights.safetensors")["W_dec"].float()


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
