"""Triton kernels of the first half of a fused step: which latents are active, and what they leave over.

    choose      the k largest pre-activations of a row, or the n k largest of a batch
    residuals   a program a token: gathers its latents' decoder rows, forms the residuals, and each value's gradient

A choice reads all pre-activations once, for the largest of each group of columns, and then only the groups that matter.
A residual's column depends on no other column, so a program goes through chunks of columns, and reads each decoder row
of its token once. The second half is in `kernels_rows`; both are held against the plain formula of `topk`, `batchtopk`
and `matryoshka`.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batchtopk import kth_largest
from .codes import Codes

__all__ = ["choose_batch", "choose_rows", "residuals"]

_GROUP = 64  # columns of which the largest stands for all, at first
_SMALL = 8192  # latents up to which torch's own selection is as good
_MOST = 128  # entries a row that a program sorts out; above (and for a single one) torch does
_SAMPLE = 1 << 20
_BLOCK = 2048  # columns that a program looks at together
_TILE = 1 << 13  # numbers of decoder rows in registers


@triton.jit
def _ordered(v, WIDE: tl.constexpr):
    """Integers in the order of the numbers: int64 of a float32, int32 of a bfloat16."""
    if WIDE:
        b = v.to(tl.float32).to(tl.int32, bitcast=True)
        o = (b ^ ((b >> 31) & 0x7FFFFFFF)).to(tl.int64)
    else:
        h = v.to(tl.bfloat16).to(tl.int16, bitcast=True)
        o = (h ^ ((h >> 15) & 0x7FFF)).to(tl.int32)
    return o


@triton.jit
def _number(o, WIDE: tl.constexpr):
    """The number of an integer of `_ordered`."""
    if WIDE:
        b = o.to(tl.int32)
        v = (b ^ ((b >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    else:
        h = o.to(tl.int16)
        v = (h ^ ((h >> 15) & 0x7FFF)).to(tl.bfloat16, bitcast=True).to(tl.float32)
    return v


@triton.jit
def _group_max(pre, out, F, NG, G: tl.constexpr, N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * G + tl.arange(0, G)
    col = g[:, None] * N + tl.arange(0, N)[None, :]
    tile = tl.load(pre + row * F + col, mask=col < F, other=float("-inf"))
    tl.store(out + row * NG + g, tl.max(tile, 1), mask=g < NG)


@triton.jit
def _select(
    pre, maxima, values, index, F, k, NG, NGP: tl.constexpr, N: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    shift: tl.constexpr = 32 if WIDE else 16
    low: tl.constexpr = 0xFFFFFFFF if WIDE else 0xFFFF
    g = tl.arange(0, NGP)
    peak = tl.load(maxima + row * NG + g, mask=g < NG, other=float("-inf"))
    group = tl.topk((_ordered(peak, WIDE) << shift) | g, K) & low
    col = group[:, None] * N + tl.arange(0, N)[None, :]
    tile = tl.load(pre + row * F + col, mask=col < F, other=float("-inf"))
    best = tl.topk(tl.reshape((_ordered(tile, WIDE) << shift) | col, (K * N,)), K)
    at = tl.arange(0, K)
    # K is k rounded up, and the largest come last or first as the version has it: those of rank below k are kept
    rank = tl.sum((best[None, :] > best[:, None]).to(tl.int32), 1)
    kept = rank < k
    tl.store(values + row * k + rank, tl.maximum(_number(best >> shift, WIDE), 0.0), mask=kept)
    tl.store(index + row * k + rank, (best & low).to(tl.int32), mask=kept & (at >= 0))


def _maxima(pre: Tensor) -> Tensor:
    """The largest entry of each group of columns, [n, groups]."""
    n, d_sae = pre.shape
    groups = -(-d_sae // _GROUP)
    maxima = torch.empty(n, groups, dtype=pre.dtype, device=pre.device)
    _group_max[(n, -(-groups // 64))](pre, maxima, d_sae, groups, 64, _GROUP, num_warps=4)
    return maxima


def choose_rows(pre: Tensor, k: int) -> Codes:
    """The k largest entries of each row of `pre` [n, d_sae] (bfloat16 or float32), negative ones as 0."""
    n, d_sae = pre.shape
    if d_sae <= _SMALL or not 2 <= k <= _MOST:
        top, places = pre.topk(k, dim=1, sorted=False)
        values, index = top.float().relu(), places.int()
    else:
        maxima = _maxima(pre)
        groups = maxima.shape[1]
        values = torch.empty(n, k, dtype=torch.float32, device=pre.device)
        index = torch.empty(n, k, dtype=torch.int32, device=pre.device)
        wide = pre.dtype == torch.float32 or d_sae > 1 << 16
        sizes = (triton.next_power_of_2(groups), _GROUP, triton.next_power_of_2(k))
        _select[(n,)](pre, maxima, values, index, d_sae, k, groups, *sizes, wide, num_warps=4)
    return Codes.of_rows(values, index, d_sae)


@triton.jit
def _histogram(pre, maxima, bound, counts, F, NG, N: tl.constexpr, B: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    low = tl.load(bound)
    for at in range(0, F, B):
        col = at + tl.arange(0, B)
        peak = tl.load(maxima + row * NG + col // N, mask=col < F, other=float("-inf")).to(tl.float32)
        v = tl.load(pre + row * F + col, mask=(col < F) & (peak > low), other=float("-inf"))
        over = (v.to(tl.float32) > low) & (v.to(tl.float32) > 0)
        tl.atomic_add(counts + v.to(tl.int16, bitcast=True).to(tl.int32), 1, mask=over, sem="relaxed")


@triton.jit
def _tally(pre, maxima, lowest, above, equal, F, NG, N: tl.constexpr, B: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    low = tl.load(lowest)
    more = tl.zeros((B,), tl.int32)
    same = tl.zeros((B,), tl.int32)
    for at in range(0, F, B):
        col = at + tl.arange(0, B)
        peak = tl.load(maxima + row * NG + col // N, mask=col < F, other=float("-inf")).to(tl.float32)
        v = tl.load(pre + row * F + col, mask=(col < F) & (peak >= low), other=float("-inf")).to(tl.float32)
        more += (v > low).to(tl.int32)
        same += (v == low).to(tl.int32)
    tl.store(above + row, tl.sum(more))
    tl.store(equal + row, tl.sum(same))


@triton.jit
def _gather(pre, maxima, lowest, start, ties, values, index, token, F, NG, N: tl.constexpr, B: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    low = tl.load(lowest)
    place = tl.load(start + row)
    left = tl.load(ties + row)
    for at in range(0, F, B):
        col = at + tl.arange(0, B)
        peak = tl.load(maxima + row * NG + col // N, mask=col < F, other=float("-inf")).to(tl.float32)
        v = tl.load(pre + row * F + col, mask=(col < F) & (peak >= low), other=float("-inf")).to(tl.float32)
        same = (v == low).to(tl.int32)
        kept = (v > low) | ((same > 0) & (tl.cumsum(same, 0) <= left))
        to = place + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(values + to, v, mask=kept)
        tl.store(index + to, col, mask=kept)
        tl.store(token + to, row.to(tl.int32), mask=kept)
        place += tl.sum(kept.to(tl.int32))
        left -= tl.minimum(tl.sum(same), left)


def _lowest_kept(pre: Tensor, maxima: Tensor, wanted: int) -> Tensor:
    """The `wanted`-th largest positive entry of `pre`, [1] float32; the smallest positive one where fewer are positive.

    bfloat16 has 2^15 positive values, so a histogram tells it exactly, and the CPU need not know. A sample gives a
    bound first that leaves few entries to count.
    """
    if pre.dtype != torch.bfloat16:
        return kth_largest(pre, wanted).view(1)
    flat = pre.view(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLE) | 1].float()  # an odd stride visits every latent
    share = min(sample.numel(), int(1.25 * wanted / flat.numel() * sample.numel()) + 16)
    bound = sample.topk(share).values[-1].clamp_min(0.0)
    counts = torch.zeros(1 << 15, dtype=torch.int32, device=pre.device)
    sizes = (pre.shape[1], maxima.shape[1], _GROUP, _BLOCK)
    _histogram[(pre.shape[0],)](pre, maxima, bound, counts, *sizes, num_warps=4)
    over = counts.flip(0).cumsum(0)  # entries at least as large as the i-th largest value there is
    place = torch.searchsorted(over, over[-1:].clamp(max=wanted))
    lowest = ((1 << 15) - 1 - place).to(torch.int16).view(torch.bfloat16).float()
    return torch.where(over[-1:] > 0, lowest, torch.finfo(torch.bfloat16).tiny)


def choose_batch(pre: Tensor, k: int) -> tuple[Codes, Tensor]:
    """The n k largest positive entries of `pre` [n, d_sae], and the smallest of them, a scalar.

    Of entries that equal it, the first ones are kept, so that there are never more than n k.
    """
    n, d_sae = pre.shape
    wanted, maxima = n * k, _maxima(pre)
    sizes = (d_sae, maxima.shape[1], _GROUP, _BLOCK)
    lowest = _lowest_kept(pre, maxima, wanted)
    above = torch.empty(n, dtype=torch.int32, device=pre.device)
    equal = torch.empty_like(above)
    _tally[(n,)](pre, maxima, lowest, above, equal, *sizes, num_warps=4)
    spare = wanted - above.sum()
    ties = torch.minimum(equal, (spare - (equal.cumsum(0) - equal)).clamp_min(0)).int()
    start = torch.zeros(n + 1, dtype=torch.int32, device=pre.device)
    start[1:] = (above + ties).cumsum(0)
    values = torch.zeros(wanted, dtype=torch.float32, device=pre.device)
    index = torch.zeros(wanted, dtype=torch.int32, device=pre.device)
    token = torch.zeros_like(index)
    _gather[(n,)](pre, maxima, lowest, start, ties, values, index, token, *sizes, num_warps=4)
    return Codes(values, index, token, start, d_sae), lowest[0]


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
