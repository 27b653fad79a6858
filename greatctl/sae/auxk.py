"""AuxK: dead latents learn from what the living ones leave over (Gao et al. 2024, arXiv 2406.04093, appendix
A.2).

    e  = the residual x - x^, detached
    e^ = the k_aux largest pre-activations among dead latents, relu, times W_dec      (no bias)
    loss = |e - e^|^2 / |e - mean(e)|^2                                               (sums over the batch)

The gradient reaches the encoder as well as the decoder: a dead latent whose encoder stands still stays dead.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["auxk", "revival"]


def auxk(
    pre_acts: Tensor, residual: Tensor, W_dec: Tensor, dead: Tensor, spread: Tensor | None = None
) -> Tensor | None:
    """The auxiliary loss, a scalar.

    Args:
        pre_acts: [n, d_sae], with its graph.
        residual: x - x^ [n, d_out]; taken without its graph.
        W_dec: [d_sae, d_out].
        dead: [d_sae] bool.
        spread: where these rows are a part of a batch, the batch's mean of |e - mean(e)|^2, a scalar; losses of parts,
            weighted by their rows, are then that of the batch.

    Returns:
        The unweighted loss; exactly 0 where nothing is dead; None where it is not finite (no variance left to
        explain).
    """
    index = dead.nonzero().squeeze(1)
    if index.numel() == 0:
        return pre_acts.new_zeros(())
    loss = revival(pre_acts.index_select(1, index), residual, W_dec.index_select(0, index), spread=spread)
    return loss if bool(torch.isfinite(loss)) else None


def revival(
    candidates: Tensor,
    residual: Tensor,
    W_dec: Tensor,
    *,
    dead: Tensor | None = None,
    spread: Tensor | None = None,
) -> Tensor:
    """`auxk` of chosen latents alone, finite or not; the CPU does not wait for it.

    Args:
        candidates: their pre-activations [n, c], with the graph.
        W_dec: their rows [c, d_out].
        dead: [c] bool, where some of them are there to fill the shape and must not count.
        residual, spread: as in `auxk`.
    """
    error = residual.detach()
    if dead is not None:
        candidates = candidates.masked_fill(~dead, float("-inf"))
    k = min(max(1, error.shape[1] // 2), candidates.shape[1])
    if k < candidates.shape[1]:
        values, places = candidates.topk(k, dim=1, sorted=False)
        latents = torch.zeros_like(candidates).scatter_(1, places, values.relu())
    else:
        latents = candidates.relu()
    rebuilt = latents @ W_dec
    below = (error - error.mean(dim=0)).square().sum() if spread is None else spread.to(error) * error.shape[0]
    return (error - rebuilt).square().sum() / below
