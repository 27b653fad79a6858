"""What takes the place of the corrupted prompt's values when a site is ablated.

`zero` writes zeros, `mean` the mean over the corrupted prompts of the pair set at the same place, `resample`
the values of another pair's corrupted prompt, drawn once a pair. Places are aligned from the end, where the
answer is read; a place for which no prompt is long enough has no value and is left alone. The run that is
patched is then the clean one, so this is noising: it asks whether the model needs the site, against a
reference that the counterpart prompt does not choose.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ..errors import UsageError
from .pairs import EncodedPair

if TYPE_CHECKING:
    from .runs import Both, Patchable, PatchSite

__all__ = ["Source", "make_source"]

_TOGETHER = 16  # prompts whose activations are held at once
Ids = tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """Ready-made replacements.

    Attributes:
        kind: `zero`, `mean` or `resample`.
        means: layer -> [p, …] means, aligned from the end.
        donors: pair id -> the prompt that its values come from.
    """

    kind: str
    means: dict[int, torch.Tensor] = field(default_factory=dict)
    donors: dict[str, Ids] = field(default_factory=dict)

    def values(
        self, model: Patchable, pairs: Sequence[EncodedPair], site: PatchSite, runs: dict[int, Both]
    ) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
        """layer -> values [b, p, …] for the clean prompts of `pairs`, and [b, p] bool: where there are any.

        Args:
            model: the frozen model.
            pairs: b pairs of the same two lengths.
            site: what is patched.
            runs: layer -> what the (clean, corrupted) run holds there; sets shapes and types.
        """
        length, width = len(pairs[0].clean_ids), next(iter(runs.values()))[0].shape
        if site.name == "pattern":  # its positions come after its heads
            width = (width[0], width[2])
        there = torch.zeros(width[:2], dtype=torch.bool, device=model.device)
        there[:, :length] = True  # answer tokens behind the prompt are no place of it
        if self.kind == "zero":
            return {layer: site.zero(clean) for layer, (clean, _) in runs.items()}, there
        prompts = [self.donors[pair.pair.id] for pair in pairs] if self.donors else []
        found = _captured(model, prompts, site, list(runs)) if prompts else {}
        lengths = list(map(len, prompts)) or [len(next(iter(self.means.values())))] * len(pairs)
        made: dict[int, torch.Tensor] = {}
        for layer, (clean, _) in runs.items():
            values = clean.clone()
            for row, own in enumerate(lengths):
                n = min(own, length)
                given = found[layer][row] if prompts else self.means[layer]
                if site.name == "pattern":
                    values[row, :, length - n : length, length - n : length] = given[:, own - n : own, own - n : own]
                else:
                    values[row, length - n : length] = given[own - n : own]
                there[row, : length - n] = False
            made[layer] = values
        return made, there


@torch.no_grad()
def make_source(
    model: Patchable,
    pairs: Sequence[EncodedPair],
    site: PatchSite,
    layers: Sequence[int],
    kind: str,
    *,
    seed: int = 0,
) -> Source:
    """Replacements for all pairs of a set.

    Args:
        model: the frozen model.
        pairs: all pairs that will be swept; their corrupted prompts are what is averaged or drawn from.
        site: what is patched.
        layers: the layers that will be patched.
        kind: `zero`, `mean` or `resample`.
        seed: seed of the draws.

    Raises:
        UsageError: one prompt alone cannot be resampled; patterns of unequal lengths cannot be averaged.
    """
    prompts = [pair.corrupted_ids for pair in pairs]
    if (
        kind != "zero"
        and site.name == "pattern"
        and len({len(p.clean_ids) for p in pairs} | set(map(len, prompts))) > 1
    ):
        raise UsageError(
            f"attention patterns cannot be ablated by {kind} here",
            why="the prompts are of several lengths, and a row of a pattern is a distribution over one prompt's places",
            fix="use pairs of one length, or --corruption zero",
        )
    if kind == "zero":
        return Source(kind)
    if kind == "resample":
        if len(pairs) < 2:
            raise UsageError(
                "there is no other prompt to resample from", why="only one pair", fix="give more pairs with --pairs"
            )
        return Source(kind, donors=_drawn(pairs, seed))
    sums: dict[int, torch.Tensor] = {}
    longest = max(map(len, prompts))
    counts = torch.zeros(longest, device=model.device)
    for start in range(0, len(prompts), _TOGETHER):
        some = prompts[start : start + _TOGETHER]
        for layer, values in _captured(model, some, site, layers).items():
            for row, ids in zip(values, some, strict=True):
                _add(sums, layer, row, len(ids), longest, turned=site.name == "pattern")
        for ids in some:
            counts[longest - len(ids) :] += 1
    by = {layer: total.ndim for layer, total in sums.items()}
    shape = (1, longest, 1) if site.name == "pattern" else (longest,)
    means = {layer: total / counts.reshape(*shape, *([1] * (by[layer] - len(shape)))) for layer, total in sums.items()}
    return Source(kind, means=means)


def _add(
    sums: dict[int, torch.Tensor], layer: int, row: torch.Tensor, length: int, longest: int, *, turned: bool
) -> None:
    """Add a prompt's values [p, …] to the sums, at its places from the end."""
    wide = row.to(torch.promote_types(row.dtype, torch.float32))
    if layer not in sums:
        shape = wide.shape if turned else (longest, *wide.shape[1:])
        sums[layer] = wide.new_zeros(shape)
    if turned:
        sums[layer] += wide
    else:
        sums[layer][longest - length :] += wide[:length]


def _captured(
    model: Patchable, prompts: Sequence[Ids], site: PatchSite, layers: Sequence[int]
) -> dict[int, torch.Tensor]:
    """layer -> what the site keeps of the prompts, padded on the right to the longest (a causal model ignores that)."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[*ids, *([ids[-1]] * (longest - len(ids)))] for ids in prompts], device=model.device)
    found = model.capture(tokens, [site.at(layer) for layer in layers])
    return {layer: site.read(found[site.at(layer)]) for layer in layers}


def _drawn(pairs: Sequence[EncodedPair], seed: int) -> dict[str, Ids]:
    """Another pair's corrupted prompt for each pair: the next one in a random ring, of those that are long enough
    if there are any."""
    ring = list(pairs)
    random.Random(seed).shuffle(ring)
    drawn: dict[str, Ids] = {}
    for at, pair in enumerate(ring):
        others = [ring[(at + step) % len(ring)].corrupted_ids for step in range(1, len(ring))]
        enough = [ids for ids in others if len(ids) >= len(pair.clean_ids)]
        drawn[pair.pair.id] = (enough or others)[0]
    return drawn
