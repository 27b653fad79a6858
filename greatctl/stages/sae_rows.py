"""Where a training's rows come from: harvested activations, or the model itself (`train --stream`).

`stored` and `streamed` find out what would be read, and touch nothing heavy; `open_rows` opens it. Both ways give a
training the same facts (`meta`, as a harvest's meta.json has them), so that nothing later asks which one it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import InputError, ManifestError, UsageError, did_you_mean
from ..store.artifact import Artifact, load, newest, sealed_under
from .context import Context
from .models import chosen_model, pick_device

if TYPE_CHECKING:
    from torch import Tensor

    from ..corpus.windows import TokenStore
    from ..sae.rows import Rows
    from ..store.shards import ShardReader

__all__ = ["Inputs", "held_out", "open_rows", "stored", "streamed"]

_HELD_OUT_SHARE = 0.05
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # as safetensors and as torch call them


@dataclass(frozen=True)
class Inputs:
    """What a training reads.

    Attributes:
        meta: model, model_revision, hook_point, layer, d_model, dtype, rows, special_ids, tokens, tokens_name.
        target_meta: the same of the site that a transcoder writes.
        fingerprints: of the artifacts, for the identity.
        activations, target: the harvests; None when streaming.
        engine: how the model is run when streaming.
    """

    meta: Mapping[str, Any]
    tokens: Artifact
    fingerprints: Mapping[str, str]
    target_meta: Mapping[str, Any] | None = None
    activations: Artifact | None = None
    target: Artifact | None = None
    engine: str = ""
    identity: Mapping[str, object] = field(default_factory=dict)


def stored(ctx: Context, hook_point: str | None, target_hook_point: str | None) -> Inputs:
    """The newest activations (of that hook point), and those of the target, of the same tokens and model.

    Raises:
        InputError: there are none, they are out of date, or they do not belong together.
        IntegrityError: a shard is damaged.
    """
    activations = _choose(ctx, hook_point).check()
    meta = _meta(activations)
    tokens = _tokens(ctx, meta)
    prints = {"activations": activations.fingerprint, "tokens": tokens.fingerprint}
    if target_hook_point is None:
        return Inputs(meta, tokens, prints, activations=activations)
    pair = f"run `greatctl harvest --hook-point {meta['hook_point']} --hook-point {target_hook_point}`"
    beside = activations.path.parent / target_hook_point
    found = [a for a in sealed_under(ctx.project.activations, "harvest") if a.path == beside]
    if not found:
        raise InputError(
            f"there are no activations of {target_hook_point} beside those of {meta['hook_point']}",
            why="a transcoder reads one hook point and writes the other, of the same tokens",
            fix=pair,
            code="no-pair",
        )
    target_meta = _meta(found[0].check())
    apart = [key for key in ("tokens", "model", "model_revision", "rows") if target_meta[key] != meta[key]]
    if apart:
        raise InputError(
            f"the activations of {meta['hook_point']} and {target_hook_point} are no pair",
            why="; ".join(f"{key}: {meta[key]} and {target_meta[key]}" for key in apart),
            fix=pair,
            code="no-pair",
        )
    prints["target"] = found[0].fingerprint
    return Inputs(meta, tokens, prints, target_meta, activations, found[0])


def streamed(
    ctx: Context, name: str | None, hook_point: str | None, target_hook_point: str | None, buffer_rows: int | None
) -> Inputs:
    """The newest tokens and the model that would read them.

    Raises:
        InputError: no tokens yet, or they were made for another tokenizer.
        ManifestError: a layer is out of range.
        UsageError: an unknown hook point, or one whose width is not d_model.
    """
    tokens = newest(ctx.project.tokens, "tokenize")
    if tokens is None:
        why = f"{ctx.project.tokens} is empty"
        raise InputError("there are no tokens yet", why=why, fix="run `greatctl tokenize` first")
    tokens.check()
    from .. import model
    from ..corpus.windows import TokenStore
    from ..model.interface import Site
    from ..model.loading import SMALL
    from ..model.tokenizer import digest

    store = TokenStore(tokens.path)
    source, display = chosen_model(ctx, name, fallback=store.tokenizer["path_or_id"])
    info = model.describe(source, name=display, offline=ctx.offline)
    if store.tokenizer["sha256"] != (theirs := digest(source, offline=ctx.offline)):
        raise InputError(
            f"the tokens were not made for {info.name}",
            why=f"their tokenizer has sha256 {store.tokenizer['sha256'][:16]}…, the model's {theirs[:16]}…",
            fix=f"run `greatctl tokenize --model {info.name}` first",
            where=str(store.path),
        )
    site = hook_point or f"blocks.{info.n_layers // 2}.hook_resid_post"
    sites = [site] if target_hook_point is None else [site, target_hook_point]
    for one in sites:
        if not 0 <= Site.parse(one).layer < info.n_layers:
            why = f"{info.name} has the layers 0 to {info.n_layers - 1}"
            raise ManifestError(f"{one} is out of range", why=why, fix="choose another --hook-point")
        if not Site.parse(one).is_residual:
            raise UsageError(
                f"{one} cannot be streamed",
                why="only the sites of the residual stream, whose width is d_model, can",
                fix=f"run `greatctl harvest --hook-point {one}`, and train without --stream",
            )
    engine = model.choose_engine("auto", info.family, sites)
    dtype = "float32" if info.d_model < SMALL else "bfloat16"
    meta = {
        "model": info.name,
        "model_revision": info.revision,
        "hook_point": site,
        "layer": Site.parse(site).layer,
        "n_layers": info.n_layers,
        "d_model": info.d_model,
        "dtype": dtype,
        "rows": int(store.length.sum()),
        "special_ids": store.tokenizer["special_ids"],
        "window": store.window,
        "tokens": tokens.fingerprint,
        "tokens_name": tokens.path.name,
    }
    target_meta = {**meta, "hook_point": sites[1], "layer": Site.parse(sites[1]).layer} if len(sites) > 1 else None
    how = {"stream": True, "buffer_rows": buffer_rows, "dtype": dtype, "engine": engine}
    return Inputs(meta, tokens, {"tokens": tokens.fingerprint}, target_meta, engine=engine, identity=how)


def open_rows(
    ctx: Context, inputs: Sequence[Inputs], store: TokenStore, aside: Tensor, *, buffer_rows: int | None = None
) -> list[Rows]:
    """The rows themselves, of each of the inputs; where several are streamed, the model reads each window once for all.

    Args:
        inputs: of the same tokens.
        aside: [n_windows] bool, the held-out windows.

    Raises: as `ActivationRows` and `StreamRows`.
    """
    from ..sae.data import ActivationRows
    from ..store.shards import ShardReader

    if inputs[0].activations is None:
        return _streams(ctx, inputs, store, aside, buffer_rows)
    opened: list[Rows] = []
    ahead = pick_device(ctx.device).startswith("cuda")
    for one in inputs:
        assert one.activations is not None
        reader = _checked(ShardReader(one.activations.path), one.meta)
        target = None if one.target is None else _checked(ShardReader(one.target.path), one.target_meta or {})
        opened.append(ActivationRows(reader, one.meta["special_ids"], aside, target=target, ahead=ahead))
    return opened


def held_out(ctx: Context, store: TokenStore) -> Tensor:
    """[n_windows] bool: windows of documents whose split is not `train`; where that leaves nothing to train
    on or nothing to measure on, the last 5 % of the windows."""
    import torch

    aside = torch.tensor([document["split"] != "train" for document in store.documents], dtype=torch.bool)
    found = aside[torch.tensor(store.windows["document"], dtype=torch.int64)]
    if bool(found.any()) and not bool(found.all()):
        return found
    n = found.numel()
    last = max(1, round(_HELD_OUT_SHARE * n)) if n > 1 else 0
    ctx.run.notice(f"train: no usable split in the manifest, so the last {last} of {n} windows are held out")
    return torch.arange(n) >= n - last


def _checked(reader: ShardReader, meta: Mapping[str, Any]) -> ShardReader:
    """The reader, if its shards are as wide and as precise as meta.json says."""
    from safetensors import safe_open

    for entry in reader.entries[:1]:
        with safe_open(reader.folder / entry.name, framework="pt") as shard:
            acts = shard.get_slice("acts")
            found = acts.get_shape()[1], _DTYPES.get(acts.get_dtype(), acts.get_dtype())
        if found != (meta["d_model"], meta["dtype"]):
            raise InputError(
                f"the activations of {meta['hook_point']} are not what they are said to be",
                why=f"d_model and dtype are {found[0]} and {found[1]}, not {meta['d_model']} and {meta['dtype']}",
                fix=f"run `greatctl harvest --hook-point {meta['hook_point']} --force`",
                where=str(reader.folder),
            )
    return reader


def _streams(
    ctx: Context, inputs: Sequence[Inputs], store: TokenStore, aside: Tensor, buffer_rows: int | None
) -> list[Rows]:
    import torch

    from ..sae.stream import BUFFER_BYTES, BUFFER_ROWS, StreamRows, Windows
    from .sae_harvest import harvesters

    real = torch.arange(store.window)[None, :] < store.length[:, None]
    special = torch.tensor(sorted(inputs[0].meta["special_ids"]), dtype=store.input_ids.dtype)
    usable = (real & ~torch.isin(store.input_ids, special)).sum(dim=1)
    work = torch.tensor(store.windows["document"], dtype=torch.int64)
    windows = Windows(usable, aside, work, int(store.length.sum()))
    opened: list[Rows] = []
    for one, harvest in zip(inputs, harvesters(ctx, inputs, store, special), strict=True):
        width = one.meta["d_model"] * (4 if one.meta["dtype"] == "float32" else 2) * (2 if one.target_meta else 1)
        held = buffer_rows or min(BUFFER_ROWS, BUFFER_BYTES // width)
        opened.append(StreamRows(harvest, windows, buffer_rows=held, run=ctx.run))
    return opened


def _meta(activations: Artifact) -> dict[str, Any]:
    return json.loads((activations.path / "meta.json").read_bytes())


def _choose(ctx: Context, hook_point: str | None) -> Artifact:
    """The newest activations artifact, of that hook point where one is named."""
    found = sealed_under(ctx.project.activations, "harvest")
    if not found:
        raise InputError(
            "there are no activations yet",
            why=f"{ctx.project.activations} holds no finished harvest",
            fix="run `greatctl harvest` first, or train with --stream",
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
