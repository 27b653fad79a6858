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

__all__ = ["auxk"]


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
    error = residual.detach()
    candidates = pre_acts.index_select(1, index)
    k = min(max(1, error.shape[1] // 2), index.numel())
    values, places = candidates.topk(k, dim=1, sorted=False)
    latents = torch.zeros_like(candidates).scatter(1, places, values.relu())
    rebuilt = latents @ W_dec.index_select(0, index)
    below = (error - error.mean(dim=0)).square().sum() if spread is None else spread.to(error) * error.shape[0]
    loss = (error - rebuilt).square().sum() / below
    return loss if bool(torch.isfinite(loss)) else None
