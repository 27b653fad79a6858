"""Triton kernels of the first half of a fused step: what the active latents leave over.

A program a token gathers its latents' decoder rows, forms the residuals, and each value's gradient. A residual's column
depends on no other column, so it goes through chunks of columns, and reads each decoder row of its token once. The
choice before it is in `kernels_choice`, the second half in `kernels_rows`; all are held against the plain formula of
`topk`, `batchtopk` and `matryoshka`.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes import Codes
from .kernels_choice import choose_batch, choose_rows

__all__ = ["choose_batch", "choose_rows", "residuals"]

_TILE = 1 << 13  # numbers of decoder rows in registers


@triton.jit
def _one_tile(
    t,
    lo,
    hi,
    x,
    index,
    value,
    W,
    b_dec,
    level,
    out,
    slope,
    c,
    n,
    d,
    J: tl.constexpr,
    KB: tl.constexpr,
    DC: tl.constexpr,
):
    """A token whose entries fit one tile: each decoder row is read once. Returns the sum of squares."""
    at = lo + tl.arange(0, KB)
    mine = at < hi
    i = tl.load(index + at, mask=mine, other=0).to(tl.int64)
    v = tl.load(value + at, mask=mine, other=0.0)
    of = tl.zeros((KB,), tl.int32)
    if J > 1:
        of = tl.load(level + i, mask=mine, other=0)
    s = tl.zeros((KB,), tl.float32)
    total = 0.0
    for first in range(0, d, DC):
        cols = first + tl.arange(0, DC)
        inside = cols < d
        r = tl.load(x + t * d + cols, mask=inside, other=0.0).to(tl.float32)
        r -= tl.load(b_dec + cols, mask=inside, other=0.0)
        w = tl.load(W + i[:, None] * d + cols[None, :], mask=mine[:, None] & inside[None, :], other=0.0).to(tl.float32)
        for j in tl.static_range(J):
            share = tl.where(of == j, v, 0.0) if J > 1 else v
            r -= tl.sum(share[:, None] * w, 0)
            total += tl.sum(r * r)
            tl.store(out + (j * n + t) * d + cols, r.to(out.dtype.element_ty), mask=inside)
        if J == 1:
            s += tl.sum(w * r[None, :], 1)
        else:
            seen = tl.where(of[:, None] == J - 1, r[None, :], 0.0)
            for back in tl.static_range(1, J):
                j = J - 1 - back
                r += tl.load(out + (j * n + t) * d + cols, mask=inside, other=0.0).to(tl.float32)
                tl.store(out + (j * n + t) * d + cols, r.to(out.dtype.element_ty), mask=inside)
                seen += tl.where(of[:, None] == j, r[None, :], 0.0)
            s += tl.sum(w * seen, 1)
    tl.store(slope + at, -c * s, mask=mine)
    return total


@triton.jit
def _tiles(
    t,
    lo,
    hi,
    x,
    index,
    value,
    W,
    b_dec,
    level,
    out,
    slope,
    c,
    n,
    d,
    J: tl.constexpr,
    KB: tl.constexpr,
    DC: tl.constexpr,
):
    """A token with any number of entries: tile after tile, and once more for the slopes."""
    total = 0.0
    for first in range(0, d, DC):
        cols = first + tl.arange(0, DC)
        inside = cols < d
        r = tl.load(x + t * d + cols, mask=inside, other=0.0).to(tl.float32)
        r -= tl.load(b_dec + cols, mask=inside, other=0.0)
        for j in tl.static_range(J):
            for p in range(lo, hi, KB):
                at = p + tl.arange(0, KB)
                mine = at < hi
                i = tl.load(index + at, mask=mine, other=0).to(tl.int64)
                if J > 1:
                    mine = mine & (tl.load(level + i, mask=mine, other=-1) == j)
                v = tl.load(value + at, mask=mine, other=0.0)
                w = tl.load(W + i[:, None] * d + cols[None, :], mask=mine[:, None] & inside[None, :], other=0.0)
                r -= tl.sum(v[:, None] * w.to(tl.float32), 0)
            total += tl.sum(r * r)
            tl.store(out + (j * n + t) * d + cols, r.to(out.dtype.element_ty), mask=inside)
        for back in tl.static_range(J):
            j = J - 1 - back
            if back > 0:
                r += tl.load(out + (j * n + t) * d + cols, mask=inside, other=0.0).to(tl.float32)
                tl.store(out + (j * n + t) * d + cols, r.to(out.dtype.element_ty), mask=inside)
            for p in range(lo, hi, KB):
                at = p + tl.arange(0, KB)
                mine = at < hi
                i = tl.load(index + at, mask=mine, other=0).to(tl.int64)
                if J > 1:
                    mine = mine & (tl.load(level + i, mask=mine, other=-1) == j)
                w = tl.load(W + i[:, None] * d + cols[None, :], mask=mine[:, None] & inside[None, :], other=0.0)
                s = -c * tl.sum(w.to(tl.float32) * r[None, :], 1)
                if first > 0:
                    s += tl.load(slope + at, mask=mine, other=0.0)
                tl.store(slope + at, s, mask=mine)
        tl.debug_barrier()  # the next chunk adds to slopes that other threads of this program have written
    return total


@triton.jit
def _residuals(
    x,
    index,
    value,
    start,
    W,
    b_dec,
    level,
    out,
    slope,
    square,
    c,
    n,
    d,
    J: tl.constexpr,
    KB: tl.constexpr,
    DC: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    lo = tl.load(start + t)
    hi = tl.load(start + t + 1)
    if hi - lo <= KB:
        total = _one_tile(t, lo, hi, x, index, value, W, b_dec, level, out, slope, c, n, d, J, KB, DC)
    else:
        total = _tiles(t, lo, hi, x, index, value, W, b_dec, level, out, slope, c, n, d, J, KB, DC)
    tl.store(square + t, total)


def residuals(
    x: Tensor, codes: Codes, W_dec: Tensor, b_dec: Tensor, level: Tensor | None, levels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What the codes leave over, and how the loss changes with each of their values.

    Args:
        x: [n, d].
        W_dec: [d_sae, d], in the dtype of the products.
        level: [d_sae] int32, the first of `levels` nested reconstructions that a latent is in; None where there is one.

    Returns:
        [levels, n, d] in W_dec's dtype, residuals summed over this level and those behind it (the last: the residual);
        [m] float32, the derivative of the loss by each value (0 where the value is 0); the loss, a scalar.
    """
    n, d = x.shape
    c = 2.0 / (levels * n * d)
    out = torch.empty(levels, n, d, dtype=W_dec.dtype, device=x.device)
    slope = torch.zeros_like(codes.values)
    square = torch.empty(n, dtype=torch.float32, device=x.device)
    most = codes.width or 2 * len(codes.values) // n  # a batch-wide choice gives few rows twice the mean
    widest = max(16, min(128, triton.next_power_of_2(most)))
    chunk = min(_TILE // widest, triton.next_power_of_2(d))
    _residuals[(n,)](
        x,
        codes.index,
        codes.values,
        codes.start,
        W_dec,
        b_dec,
        codes.index if level is None else level,
        out,
        slope,
        square,
        c,
        n,
        d,
        levels,
        widest,
        chunk,
        num_warps=2,
    )
    return out, slope * (codes.values > 0), square.sum() * (c / 2)
