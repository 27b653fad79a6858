"""The end of a harvest: statistics over all shards, the facts beside them, and the seal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..store.artifact import Artifact, Work
from ..store.files import write_bytes, write_json

if TYPE_CHECKING:
    import torch

    from ..corpus.windows import TokenStore
    from ..store.shards import ShardEntry, ShardWriter

__all__ = ["seal"]


def seal(
    w: Work,
    writer: ShardWriter,
    store: TokenStore,
    facts: Mapping[str, object],
    *,
    hook_point: str,
    dtype: str,
    speed: float,
    seconds: float,
) -> Artifact:
    """Write the mean, mean norm and variance of one hook point and its meta.json, and seal the artifact.

    Args:
        facts: what meta.json says besides what is found here (model, its revision and depth, the tokens).
        speed: tokens a second; `seconds`: how long this run took.
    """
    entries = writer.finish()
    width = _statistics(w, entries, store)
    rows = sum(entry.rows for entry in entries)
    meta = {
        **facts,
        "hook_point": hook_point,
        "d_model": width,
        "dtype": dtype,
        "rows": rows,
        "special_ids": store.tokenizer["special_ids"],
        "window": store.window,
    }
    write_json(w.path / "meta.json", meta)
    summary = {
        "n_tokens": rows,
        "d_model": width,
        "hook_point": hook_point,
        "dtype": dtype,
        "shards": len(entries),
        "tokens_per_second": speed,
    }
    return w.seal(summary, hashes=writer.hashes(), seconds=round(seconds, 3), tokens_per_second=speed)


def _statistics(w: Work, entries: list[ShardEntry], store: TokenStore) -> int:
    """Write stats.safetensors from the sums of the shards; returns the width of a row."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save

    from ..model.reading import SUMS

    sums: list[torch.Tensor] = []
    width = 0
    for entry in entries:
        with safe_open(w.path / entry.name, framework="pt") as shard:
            values = [shard.get_tensor(key) for key in SUMS]
            width = shard.get_slice("acts").get_shape()[1]
        sums = [a + b for a, b in zip(sums, values, strict=True)] if sums else values
    special = torch.tensor(store.tokenizer["special_ids"], dtype=torch.int32)
    real = torch.arange(store.window)[None, :] < store.length[:, None]
    n = max(1, int((real & ~torch.isin(store.input_ids, special)).sum()))
    mean = sums[0] / n
    variance = sums[2] / n - mean.square().sum().reshape(1)
    write_bytes(w.path / "stats.safetensors", save({"mean": mean, "mean_norm": sums[1] / n, "variance": variance}))
    return width
