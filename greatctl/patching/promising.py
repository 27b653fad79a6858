"""Which neurons or latents to patch first, where there are too many to patch them all.

The measure is the size of the change that a unit makes to the stream if it takes its value from the other
run: |clean - corrupted| activation times the norm of what the unit writes, summed over the positions where
the runs differ and averaged over pairs. It looks at no metric, so choosing by it does not choose by the
result; but it can miss a unit whose small change matters, and the table says that the rest was not patched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .latents import Latents
from .pairs import EncodedPair
from .runs import CLEAN, CORRUPTED, Edit
from .sites import Plain

__all__ = ["promising_latents", "promising_neurons", "write_norms"]

_PROBES = 2048  # numbers of probes that go through a block at once


class _Seen(Exception):
    """Ends a probing run once the MLP's output was seen."""


@torch.no_grad()
def promising_neurons(model: Any, groups: Sequence[Sequence[EncodedPair]], top: int) -> list[tuple[int, int]]:
    """The `top` (layer, neuron) with the largest change of the stream, largest first.

    Args:
        model: the frozen model.
        groups: pairs; those of a group have the same two lengths.
        top: how many, over all layers together.
    """
    site, layers = Plain("mlp_post"), range(model.n_layers)
    change = {layer: torch.zeros(()) for layer in layers}
    for pairs in groups:
        found = _both(model, pairs, [site.at(layer) for layer in layers])
        for layer in layers:
            change[layer] = change[layer] + _change(pairs, *(run[site.at(layer)].float() for run in found)).cpu()
    scores = torch.stack([change[layer] * write_norms(model, layer, len(change[layer])).cpu() for layer in layers])
    order = scores.flatten().argsort(descending=True, stable=True)[:top]
    return [(int(at) // scores.shape[1], int(at) % scores.shape[1]) for at in order]


@torch.no_grad()
def promising_latents(
    model: Any, groups: Sequence[Sequence[EncodedPair]], site: Latents, layer: int, top: int
) -> list[int]:
    """The `top` latents with the largest change of the stream, largest first; those that never change are left out."""
    change = torch.zeros(())
    for pairs in groups:
        found = _both(model, pairs, [site.at(layer)])
        change = change + _change(pairs, *(site.acts(run[site.at(layer)]).float() for run in found)).cpu()
    order = change.argsort(descending=True, stable=True)[: 4 * top]  # W_dec's rows have norms of about 1
    order = order[change[order] > 0]
    scores = change[order] * site.directions(order.tolist()).norm(dim=1).cpu()
    return order[scores.argsort(descending=True, stable=True)][:top].tolist()


@torch.no_grad()
def write_norms(model: Any, layer: int, n: int) -> torch.Tensor:
    """The norm [n] of what one unit of activation of each of a layer's n neurons writes to the stream.

    Read off by writing ones into the site and looking at the MLP's output, so that it holds for any model that
    can be patched.
    """
    width = min(64, model.n_ctx)
    rows = max(1, _PROBES // width)
    norms = []
    for begin in range(-1, n, rows * width):  # the first probe writes nothing: the bias
        at = torch.arange(begin, begin + rows * width).reshape(rows, width)
        norms.append(_probe(model, layer, at, n).flatten(0, 1))
    found = torch.cat(norms)
    return (found[1 : n + 1] - found[0]).norm(dim=1)


def _probe(model: Any, layer: int, at: torch.Tensor, n: int) -> torch.Tensor:
    """The MLP's output [r, q, d] for a one at neuron `at` [r, q] (outside of 0 … n - 1: for zeros)."""
    seen: list[torch.Tensor] = []

    def write(value: torch.Tensor) -> torch.Tensor:
        ones = torch.zeros_like(value)
        inside = ((at >= 0) & (at < n)).to(value.device)
        return ones.scatter(2, at.clamp(0, n - 1).to(value.device)[..., None], inside[..., None].to(value.dtype))

    def look(value: torch.Tensor) -> torch.Tensor:
        seen.append(value.float())
        raise _Seen

    edits = [Edit(f"blocks.{layer}.mlp.hook_post", write), Edit(f"blocks.{layer}.hook_mlp_out", look)]
    try:
        model.resume(layer, torch.zeros(*at.shape, model.d_model, device=model.device), edits)
    except _Seen:
        return seen[0]
    raise AssertionError("an MLP was passed without being seen")


def _both(model: Any, pairs: Sequence[EncodedPair], names: Sequence[str]) -> list[dict[str, torch.Tensor]]:
    ids = [p.clean_ids for p in pairs], [p.corrupted_ids for p in pairs]
    return [model.capture(torch.tensor(some, device=model.device), names) for some in ids]


def _change(pairs: Sequence[EncodedPair], clean: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor:
    """[units] sum over the pairs and the places that correspond, after the first differing token."""
    total = clean.new_zeros(clean.shape[2])
    for row, pair in enumerate(pairs):
        places = [both for both in pair.alignment if both[CLEAN] >= pair.first_difference]
        ours, theirs = [both[CLEAN] for both in places], [both[CORRUPTED] for both in places]
        total += (clean[row, ours] - corrupted[row, theirs]).abs().sum(0)
    return total
