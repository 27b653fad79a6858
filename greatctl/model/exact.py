"""The residual stream in float32 of a model whose weights are in half precision: the truth that two ways of rounding
are measured against.

Two programs for one bfloat16 model may differ by several per cent in a deep layer without either being wrong; which of
them may replace the other is then a question of how far each is from this. One block at a time is copied to float32, so
that a model of any size can be asked about a few windows.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from .families import Rotary
from .interface import Site

__all__ = ["KINDS", "exact"]

KINDS = ("hook_resid_pre", "hook_resid_post")


@torch.no_grad()
def exact(family: Rotary, homes: Sequence[Any], tokens: torch.Tensor, sites: Sequence[str]) -> dict[str, torch.Tensor]:
    """Activations [b, p, d] float32 at residual `sites` (of `KINDS`) for tokens [b, p], plainly causal.

    Args:
        family: the model's parts.
        homes: device of each block.
    """
    wanted = {(Site.parse(name).layer, Site.parse(name).kind): name for name in sites}
    hidden = family.embed(tokens).float()
    where = torch.arange(tokens.shape[1], device=hidden.device)
    found: dict[str, torch.Tensor] = {}
    for layer in range(1 + max(layer for layer, _ in wanted)):
        hidden = hidden.to(homes[layer])
        rotation = family.rotation(hidden, where.to(homes[layer]))
        if name := wanted.get((layer, "hook_resid_pre")):
            found[name] = hidden
        block = copy.deepcopy(family.layers[layer]).float()
        norm1, _, norm2, mlp = family.parts(block)
        middle = hidden + family.attention(block, norm1(hidden), rotation, None)
        hidden = middle + mlp(norm2(middle))
        if name := wanted.get((layer, "hook_resid_post")):
            found[name] = hidden
    return found
