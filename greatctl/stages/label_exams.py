"""What a labeler is shown and asked about, from the feature tables and from passages drawn at random.

Near misses come with the tables. Passages drawn without regard to any latent do not, so that a few windows are read again
from the activations, and the SAE says in which of them each latent is silent.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..store.artifact import Artifact

if TYPE_CHECKING:
    from torch import Tensor

    from ..corpus.windows import TokenStore
    from ..features.examples import Decoder
    from ..features.label_prompts import Passage
    from ..features.label_scores import Exam
    from ..sae.folder import LoadedSAE

__all__ = ["exams_of"]

_SHARDS, _WINDOWS = 4, 128  # windows read again, from this many shards over the whole corpus


def exams_of(
    features: Artifact,
    activations: Artifact,
    store: TokenStore,
    sae: LoadedSAE,
    decoder: Decoder,
    latents: Sequence[int],
    *,
    device: str,
    seed: int,
) -> Mapping[int, Exam]:
    """What is shown and asked of each latent.

    Args:
        sae: on `device`.
        decoder: of the tokenizer of the activations' model.
    """
    from ..features.label_scores import make_exam
    from ..features.labels import passages_of

    drawn = _random_passages(activations, store, sae, decoder, latents, device, seed)
    exams = {}
    for place, latent in enumerate(latents):
        firing, near = passages_of(features.path, latent)
        far = [passage for passage, silent in drawn if silent[place]]
        exams[latent] = make_exam(latent, firing, near, far, seed)
    return exams


def _random_passages(
    activations: Artifact,
    store: TokenStore,
    sae: LoadedSAE,
    decoder: Decoder,
    latents: Sequence[int],
    device: str,
    seed: int,
) -> list[tuple[Passage, list[bool]]]:
    """Passages from windows drawn at random, each with whether each latent is silent in all of it."""
    import torch

    from ..features.best import AFTER, BEFORE
    from ..features.label_prompts import Passage
    from ..store.shards import ShardReader

    reader, dice = ShardReader(activations.path), random.Random(seed)
    count = len(reader.entries)
    numbers = sorted({i * count // min(_SHARDS, count) for i in range(min(_SHARDS, count))})
    special = torch.tensor(store.tokenizer["special_ids"], dtype=torch.int64)
    found = []
    for number in numbers:
        shard = reader.read(number)
        windows = sorted(set(shard["window"].tolist()))
        for window in sorted(dice.sample(windows, min(len(windows), _WINDOWS // len(numbers)))):
            rows = (shard["window"] == window).nonzero().squeeze(1)
            rows = rows[~torch.isin(shard["token"][rows].long(), special)]
            if not len(rows):
                continue
            start = dice.randrange(max(1, len(rows) - BEFORE - AFTER))
            rows = rows[start : start + BEFORE + AFTER + 1]
            fires = _fires(sae, shard["acts"][rows], latents, device)
            pieces = decoder.pieces(shard["token"][rows].tolist())
            source = str(store.document_of(window).get("source_id") or "")
            found.append((Passage(window, pieces, [0.0] * len(pieces), source), [not any_ for any_ in fires]))
    return found


def _fires(sae: LoadedSAE, acts: Tensor, latents: Sequence[int], device: str) -> list[bool]:
    """Whether each latent fires on any of these rows."""
    import torch

    encoded = sae.encode(acts.to(device, torch.float32))[:, list(latents)]
    return (encoded > 0).any(dim=0).tolist()
