"""What a latent writes: the tokens that its decoder direction raises and lowers.

The direction is read straight through the final norm's gain and the unembedding (the "logit lens",
nostalgebraist 2020). Ignored are the blocks above the hook point, which may turn the direction into something
else, and the size of the residual stream that the final norm divides by: so the order of the tokens means something,
the absolute size little. How peaked the logits are tells latents that write certain tokens (high kurtosis; the skew
says whether it raises or lowers them) from those that write nothing in particular.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["LatentLogits", "Unembedding", "latent_logits"]

_BUDGET = 32 * 2**20  # logits held at once
_LONG = 32.0  # root mean square of a row as it is read: far above a norm's epsilon, far below float16's largest number


class Unembedding(Protocol):
    """What is needed of a frozen model."""

    n_layers: int
    d_vocab: int

    def resume(self, layer: int, residual: Tensor) -> Tensor:
        """Logits [b, p, d_vocab] from a residual [b, p, d_model] above block `layer` - 1."""
        ...


@dataclass(frozen=True)
class LatentLogits:
    """The k most raised and most lowered tokens of each latent; each [n, k], strongest first.

    `kurtosis` (excess, 0 for a normal distribution) and `skew` of its logits over the vocabulary, float32 [n].
    """

    top_ids: Tensor
    top_values: Tensor
    bottom_ids: Tensor
    bottom_values: Tensor
    kurtosis: Tensor
    skew: Tensor


def latent_logits(model: Unembedding, directions: Tensor, *, k: int = 10, hidden: Sequence[int] = ()) -> LatentLogits:
    """Logits of decoder rows, per unit of activation.

    Args:
        directions: [n, d_model], rows of W_dec.
        k: tokens a side.
        hidden: token ids that are not shown (special and padding ids, which are never trained).
    """
    k = min(k, model.d_vocab - len(hidden))
    rows = max(1, _BUDGET // model.d_vocab)
    parts: list[tuple[Tensor, ...]] = []
    never = torch.tensor(list(hidden), dtype=torch.long)
    shown = torch.ones(model.d_vocab, dtype=torch.bool).index_fill(0, never, False)
    for start in range(0, len(directions), rows):
        block = directions[start : start + rows].detach().float().cpu()
        # the norm divides by the row's own size, which is undone; its epsilon would count beside so short a row
        size = block.square().mean(dim=1, keepdim=True).sqrt()
        long = block * (_LONG / size.clamp_min(torch.finfo(torch.float32).tiny))
        with torch.no_grad():
            logits = model.resume(model.n_layers, long[:, None, :])[:, 0].float().cpu() * size
        high, low = logits.index_fill(1, never, -torch.inf), logits.index_fill(1, never, torch.inf)
        top, bottom = high.topk(k, dim=1), low.topk(k, dim=1, largest=False)
        parts.append((top.indices, top.values, bottom.indices, bottom.values, *_shape(logits[:, shown])))
    if not parts:
        ids, values, none = torch.zeros(0, k, dtype=torch.long), torch.zeros(0, k), torch.zeros(0)
        return LatentLogits(ids, values, ids, values, none, none)
    return LatentLogits(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _shape(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Excess kurtosis and skew of each row."""
    centred = logits - logits.mean(dim=1, keepdim=True)
    unit = centred / centred.square().mean(dim=1, keepdim=True).sqrt().clamp_min(torch.finfo(logits.dtype).tiny)
    cubed = unit.square() * unit
    return (cubed * unit).mean(dim=1) - 3, cubed.mean(dim=1)
