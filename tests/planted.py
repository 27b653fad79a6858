"""Activations with a known dictionary in them, as shards and as a small sealed project.

Features are random unit vectors that are active independently, with magnitudes in [1, 2]. Their generator has
a seed that no training run uses: a dictionary and an initialisation drawn alike would look like a recovery.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from token_folder import build
from torch import Tensor

from greatctl.corpus import windows
from greatctl.sae.data import ActivationRows
from greatctl.store.artifact import Identity, work
from greatctl.store.files import write_json
from greatctl.store.shards import ShardReader, ShardWriter

SEED = 987_654
BOS = 0
HOOK = "blocks.1.hook_resid_post"


def dictionary(features: int, d: int) -> Tensor:
    """[features, d] unit rows."""
    return torch.nn.functional.normalize(torch.randn(features, d, generator=torch.Generator().manual_seed(SEED)), dim=1)


def planted(rows: int, truth: Tensor, *, p: float = 0.03, seed: int = SEED + 1) -> Tensor:
    """[rows, d] sums of active features."""
    g = torch.Generator().manual_seed(seed)
    shape = (rows, truth.shape[0])
    return ((torch.rand(shape, generator=g) < p) * (1 + torch.rand(shape, generator=g))) @ truth


def recovery(truth: Tensor, W_dec: Tensor) -> float:
    """Mean over true features of the largest |cosine| to a row of W_dec."""
    return float((truth @ torch.nn.functional.normalize(W_dec, dim=1).T).abs().max(dim=1).values.mean())


def write_shards(folder: Path, acts: Tensor, window: Tensor, token: Tensor, *, size: int) -> None:
    """Cut rows into shards of `size`."""
    writer = ShardWriter(folder)
    for number, index in enumerate(torch.arange(acts.shape[0]).split(size)):
        tensors = {
            "acts": acts[index],
            "window": window[index].int(),
            "position": (index % 16).int(),
            "token": token[index].int(),
        }
        writer.write(number, tensors, index.numel())
    writer.finish()


def rows_of(folder: Path, acts: Tensor, *, held_out: float = 0.05, shard: int = 20_000, **more) -> ActivationRows:
    """Rows of ordinary tokens, 16 a window, the last share of the windows held out."""
    n = acts.shape[0]
    window = torch.arange(n) // 16
    write_shards(folder, acts, window, torch.ones(n), size=shard)
    count = int(window.max()) + 1
    return ActivationRows(ShardReader(folder), [BOS], torch.arange(count) >= round(count * (1 - held_out)), **more)


def project(
    root: Path, acts: Tensor, *, splits: Sequence[str] = ("train", "train", "heldout-work"), window: int = 17
) -> None:
    """Sealed tokens and activations under root/data: a document a split, BOS first in each window."""
    body = window - 1
    documents = [{"source_id": f"work-{i}", "unit": f"author-{i}", "split": split} for i, split in enumerate(splits)]
    tokenizer = {
        "name": "toy",
        "path_or_id": "toy",
        "bos_id": BOS,
        "pad_id": 1,
        "special_ids": [0, 1],
        "vocab_size": 50,
    }
    with work(root / "data" / "tokens" / f"toy-{window}", Identity("tokenize", {"rows": acts.shape[0]})) as w:
        length = acts.shape[0] // len(splits)

        def encode(texts: Sequence[str]) -> list:
            import numpy as np

            return [(2 + np.arange(length) % 48, 1 + np.arange(length)) for _ in texts]

        build(w.path, documents, ["x" * length for _ in splits], encode, window=window, tokenizer=tokenizer)
        tokens = w.seal({})
    store = windows.TokenStore(tokens.path)
    real = torch.arange(window) < store.length[:, None]
    where, position = real.nonzero(as_tuple=True)
    token = store.input_ids[real]
    rows = torch.zeros(token.numel(), acts.shape[1])
    rows[position > 0] = acts[: int((position > 0).sum())]
    rows[position == 0] = 1000.0  # BOS: an attention sink that must never be seen
    with work(root / "data" / "activations" / "toy" / HOOK, Identity("harvest", {"rows": rows.shape[0]})) as w:
        write_shards(w.path, rows, where, token, size=64 * window)
        meta = {
            "model": "toy",
            "model_revision": "r1",
            "hook_point": HOOK,
            "layer": 1,
            "n_layers": 3,
            "d_model": acts.shape[1],
            "dtype": "float32",
            "rows": rows.shape[0],
            "special_ids": [0, 1],
            "window": window,
            "tokens": tokens.fingerprint,
            "tokens_name": tokens.path.name,
        }
        write_json(w.path / "meta.json", meta)
        w.seal({})
    assert body * store.length.numel() >= int((position > 0).sum())
