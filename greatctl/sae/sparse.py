"""One training step of a sparse code on a CPU: what is zero is neither read nor multiplied.

Of the five dense products of the plain formula only the encoder's remains. The others go through the active entries
alone: `embedding_bag` gathers and sums decoder rows, its derivative gives each value's gradient, and a sparse product
sums the gradients of rows. The functions are those of `kernels`, which does the same on a GPU.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .batchtopk import kth_largest
from .codes import Codes

__all__ = ["choose_batch", "choose_rows", "residuals", "row_gradients"]

# torch calls its CSR matrices a beta and says so once a process; the product is held against dense ones in the tests
warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")


def choose_rows(pre: Tensor, k: int) -> Codes:
    """The k largest entries of each row of `pre` [n, d_sae], negative ones as 0."""
    values, index = pre.topk(k, dim=1, sorted=False)
    return Codes.of_rows(values.relu(), index, pre.shape[1])


def choose_batch(pre: Tensor, k: int) -> tuple[Codes, Tensor]:
    """The n k largest positive entries of `pre` [n, d_sae], and the smallest of them, a scalar."""
    n, d_sae = pre.shape
    lowest = kth_largest(pre, n * k)
    flat = (pre.flatten() >= lowest).nonzero().squeeze(1)
    token = flat // d_sae
    start = torch.searchsorted(token, torch.arange(n + 1), out_int32=True)
    return Codes(pre.flatten()[flat], (flat % d_sae).int(), token.int(), start, d_sae), lowest


def residuals(
    x: Tensor, codes: Codes, W_dec: Tensor, b_dec: Tensor, level: Tensor | None, levels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What the codes leave over, and how the loss changes with each of their values; see `kernels.residuals`."""
    n, d = x.shape
    c = 2.0 / (levels * n * d)
    values, index, bag, start, back = codes.values, codes.index, codes.token, codes.start, None
    if level is not None:  # entries of one level of one token lie together
        bag = level[index.long()].int() * n + bag
        bag, order = torch.sort(bag, stable=True)
        values, index = values[order], index[order]
        start = torch.searchsorted(bag, torch.arange(levels * n + 1, dtype=torch.int32), out_int32=True)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    rebuilt = torch.nn.functional.embedding_bag(
        index, W_dec, start, mode="sum", per_sample_weights=values, include_last_offset=True
    )
    left = (x - b_dec) - rebuilt.view(levels, n, d).cumsum(0)
    loss = left.square().sum() * (c / 2)
    if levels > 1:
        left = left.flip(0).cumsum(0).flip(0)
    slope = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left.view(levels * n, d), W_dec, index, start[:-1], bag, 0
    )
    slope = slope * (-c) * (values > 0)
    return left, slope if back is None else slope[back], loss


def row_gradients(codes: Codes, coefficient: Tensor, source: Tensor, level: Tensor | None = None) -> Tensor:
    """[d_sae, d]: for each latent the sum of coefficient * source[token] over its entries.

    Args:
        coefficient: [m].
        source: [n, d], or [levels, n, d] with `level` [d_sae]: the rows that a latent's tokens have at its level.
    """
    begin, pair = codes.by_latent
    pair = pair.long()
    column = codes.token[pair]
    if level is not None:
        column = column + level[codes.index[pair].long()].int() * source.shape[1]
    rows = source.reshape(-1, source.shape[-1])
    matrix = torch.sparse_csr_tensor(begin, column, coefficient[pair], size=(codes.d_sae, rows.shape[0]))
    return matrix @ rows
