"""Attention written out, for when somebody looks inside it or brings the keys and values of a prefix.

The same steps as the model's own module, on its own projections, so that the result is the same to the last bit
where SDPA runs. Only a layer whose pattern is read or edited computes its softmax explicitly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .families import Family, Rotation

__all__ = ["Prefix", "attend", "causal_mask", "gathered"]


class Prefix(NamedTuple):
    """Keys and values [b, n_kv_heads, start, d_head] of the positions before the computed ones."""

    key: torch.Tensor
    value: torch.Tensor


def causal_mask(
    start: int, n: int, window: int | None, device: torch.device, *, explicit: bool = False
) -> torch.Tensor | None:
    """Who sees whom: bool [1, 1, n, start + n] for queries at start … start + n - 1; `window` keys back at most.

    None where SDPA's own causal mask says the same (unless `explicit`).
    """
    short = window is None or start + n <= window
    if short and not explicit and (start == 0 or n == 1):
        return None
    query = torch.arange(start, start + n, device=device)
    back = query[:, None] - torch.arange(start + n, device=device)[None, :]
    seen = back >= 0 if window is None else (back >= 0) & (back < window)
    return seen[None, None]


def attend(
    family: Family,
    layer: int,
    x: torch.Tensor,
    rotation: Rotation,
    mask: torch.Tensor | None,
    visit: Callable[[str, torch.Tensor], torch.Tensor],
    *,
    prefix: Prefix | None = None,
    keep: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
    pattern: bool = False,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Attention of one block with all of its inner sites, [b, q, d_model]; the arguments are those of `gathered`, and

    Args:
        x: [b, q, d_model], normed.
        qkv: queries, keys and values where they do not all read x.
    """
    block = family.layers[layer]
    made = family.qkv(block, x) if qkv is None else qkv
    z = gathered(family, layer, made, rotation, mask, visit, prefix=prefix, keep=keep, pattern=pattern)
    return family.attention_out(block, visit("attn.hook_z", z).flatten(2))


def gathered(
    family: Family,
    layer: int,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    rotation: Rotation,
    mask: torch.Tensor | None,
    visit: Callable[[str, torch.Tensor], torch.Tensor] = lambda kind, value: value,
    *,
    prefix: Prefix | None = None,
    keep: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
    pattern: bool = False,
) -> torch.Tensor:
    """z [b, q, n_heads, d_head] of queries, keys and values [b, q, head, d_head].

    Args:
        mask: of `causal_mask`.
        visit: maps a site's kind and tensor to the tensor to go on with.
        keep: is handed keys after RoPE and values, [b, n_kv_heads, start + q, d_head].
        pattern: compute (and visit) the pattern explicitly; `mask` must then be given.
    """
    block = family.layers[layer]
    q, k, v = qkv
    q, k, v = visit("attn.hook_q", q), visit("attn.hook_k", k), visit("attn.hook_v", v).transpose(1, 2)
    q, k = family.turned(block, q, k, rotation)
    if prefix is not None:
        k, v = torch.cat([prefix.key, k], dim=2), torch.cat([prefix.value, v], dim=2)
    if keep is not None:
        keep(k, v)
    scale = family.scaling(layer)
    if pattern:
        assert mask is not None
        return _explicit(q, k, v, mask, scale, visit)
    return _sdpa(family.parts(block)[1], q, k, v, mask, scale)


def _sdpa(
    module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """z [b, q, n_heads, d_head], through the very function that the module itself calls."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, mask, dropout=0.0, scaling=scale)[0]


def _explicit(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    visit: Callable[[str, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~mask, -torch.inf)
    exact = torch.promote_types(q.dtype, torch.float32)
    pattern = visit("attn.hook_pattern", scores.softmax(-1, dtype=exact).to(q.dtype))
    return (pattern @ v).transpose(1, 2)
