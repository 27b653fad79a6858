"""What each projection reads, as a site of its own: the residual stream forked once for every head.

The query of a head, the keys and the values of a key-value head and the MLP read the same stream, each through the
norm. To change what one of them reads and nothing else, the stream is copied for each, before the norm, as
TransformerLens does with `hook_q_input`, `hook_k_input`, `hook_v_input` and `hook_mlp_in`. A projection is then done
head by head, on blocks of the model's own weights; only blocks of the model where such a site is touched pay for it.
`head_values` does the same for streams that somebody brings along.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import StageError
from .attention import Prefix, gathered
from .families import Family, Rotation
from .looks import Look

__all__ = ["fork", "forked_qkv", "forks", "head_outputs", "head_values"]

_SLOTS = ("hook_q_input", "hook_k_input", "hook_v_input")


def forks(look: Look, layer: int) -> bool:
    """Whether somebody looks at what the queries, keys or values of a block read."""
    return any(look.touches(layer, kind) for kind in _SLOTS)


def fork(look: Look, layer: int, stream: torch.Tensor) -> torch.Tensor:
    """What the MLP reads of the stream [b, q, d_model], before the norm; an edit does not reach the skip connection."""
    return look.at(layer, "hook_mlp_in", stream.clone()) if look.touches(layer, "hook_mlp_in") else stream


def forked_qkv(
    family: Family, layer: int, stream: torch.Tensor, look: Look
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values [b, q, head, d_head], each of the input that its site leaves.

    Args:
        stream: [b, q, d_model] before the norm.
    """
    block = family.layers[layer]
    norm = family.parts(block)[0]
    made = list(family.qkv(block, norm(stream)))
    for at, kind in enumerate(_SLOTS):
        if look.touches(layer, kind):
            heads = made[at].shape[2]
            made[at] = _projected(family, layer, at, look.at(layer, kind, stream.unsqueeze(2).repeat(1, 1, heads, 1)))
    return made[0], made[1], made[2]


def head_values(
    family: Family,
    layer: int,
    streams: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    heads: Sequence[int],
    rotation: Rotation,
    mask: torch.Tensor | None,
    prefix: Prefix | None,
) -> torch.Tensor:
    """z [b, q, n, d_head] of n heads, each projection of its own stream; the other heads are not looked at.

    Args:
        streams: what the queries [b, q, n, d_model], and the keys and the values of these heads' key-value heads read,
            before the norm.
        heads: in order.
        rotation, mask, prefix: as for `attend`.
    """
    block = family.layers[layer]
    n_heads, n_kv = (len(family.reading(block, at)[0]) for at in (0, 1))
    keys = sorted({head // (n_heads // n_kv) for head in heads})
    q, k, v = (
        _projected(family, layer, at, own, some)
        for at, (own, some) in enumerate(zip(streams, (heads, keys, keys), strict=True))
    )
    return gathered(family, layer, (q, k, v), rotation, mask, prefix=prefix)[:, :, list(heads)]


def _projected(
    family: Family, layer: int, at: int, streams: torch.Tensor, heads: Sequence[int] | None = None
) -> torch.Tensor:
    """Queries (`at` 0), keys (1) or values (2) [b, q, all heads, d_head] of each head's own stream [b, q, head, d_model];
    0 for heads that are not among `heads` (default all)."""
    block = family.layers[layer]
    weight, bias = family.reading(block, at)
    _must_be_numbers(weight)
    some = slice(None) if heads is None else list(heads)
    made = torch.einsum("bqhd,hed->bqhe", family.parts(block)[0](streams), weight[some])
    made = made if bias is None else made + bias[some]
    if heads is None or len(heads) == len(weight):
        return made
    every = made.new_zeros(*made.shape[:2], *weight.shape[:2])
    every[:, :, some] = made
    return every


def head_outputs(family: Family, layer: int, z: torch.Tensor, heads: Sequence[int] | None) -> torch.Tensor:
    """What each of `heads` (default all) adds to the stream, [..., n, d_model], for z [..., n, d_head]; the bias of the
    output projection belongs to no head and is left out. A z wider than the weights is not rounded."""
    weight = family.writing(family.layers[layer])
    _must_be_numbers(weight)
    if heads is not None:
        weight = weight[list(heads)]
    dtype = torch.promote_types(z.dtype, weight.dtype)
    return torch.einsum("...he,hed->...hd", z.to(dtype), weight.to(dtype))


def _must_be_numbers(weight: Any) -> None:
    """Refuse weights that are not there as plain numbers.

    Raises:
        StageError: they are quantised, or moved to the device only while their module runs.
    """
    if weight.device.type == "meta" or not weight.is_floating_point():
        raise StageError(
            "single heads cannot be told apart in this model",
            why="its projections are quantised, or moved in for each call",
            fix="load it whole, in bfloat16 or float32",
            code="no-single-heads",
        )
