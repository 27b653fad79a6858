"""The difference in means between characters and controls at a hook point, from the harvested rows.

The simplest supervised direction, and the one that an SAE's latent has to beat. It is read from the rows on disk, a
few shards where there are many, and weighs units (authors) equally on both sides.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from ..corpus.windows import TokenStore
from ..errors import InputError
from ..features.steering import difference_in_means
from ..store.artifact import Artifact, load
from ..store.shards import ShardReader
from .context import Context
from .saes import Sae, find_activations

__all__ = ["means_apart", "rows_and_texts"]

_SHARDS = 32  # read at most, evenly spaced


def rows_and_texts(ctx: Context, sae: Sae) -> tuple[Artifact, TokenStore] | None:
    """The harvested rows that `sae` reads and the texts that they came from; None where either is not there any more.

    Raises:
        IntegrityError: they are there and damaged.
    """
    try:
        activations = find_activations(ctx, sae)
        meta = json.loads((activations.path / "meta.json").read_bytes())
        tokens = load(ctx.project.tokens / str(meta["tokens_name"]))
    except InputError:
        return None
    return (activations, TokenStore(tokens.check().path)) if tokens.fingerprint == meta["tokens"] else None


def means_apart(ctx: Context, activations: Artifact, store: TokenStore) -> Tensor | None:
    """Characters minus controls [d], float64, as `greatctl.features.steering.difference_in_means` has it; None where one
    side has no rows.
    """
    reader, owner = ShardReader(activations.path), torch.tensor(store.windows["document"])
    special, documents = torch.tensor(list(store.tokenizer["special_ids"])), store.documents
    counts = torch.zeros(len(documents), dtype=torch.int64)
    totals: Tensor | None = None
    for number in range(0, len(reader.entries), max(1, -(-len(reader.entries) // _SHARDS))):
        ctx.run.stop_here()
        shard = reader.read(number)
        keep = ~torch.isin(shard["token"].long(), special)
        document, acts = owner[shard["window"][keep].long()], shard["acts"][keep]
        if totals is None:
            totals = torch.zeros(len(documents), acts.shape[1], dtype=torch.float64)
        for some, of in zip(acts.split(4096), document.split(4096), strict=True):
            totals.index_add_(0, of, some.double())
        counts += torch.bincount(document, minlength=len(documents))
    if totals is None:
        return None
    role, unit, split = ([str(d.get(name) or "") for d in documents] for name in ("role", "unit", "split"))
    return difference_in_means(totals, counts, role, unit, split)
