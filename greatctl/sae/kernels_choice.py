"""Triton kernels of the first half of a fused step: which latents are active.

A choice reads all pre-activations once, for the largest of each group of columns, and then only the groups that matter:
the k largest pre-activations of a row need k of them, the n k largest of a batch those above a bound from a sample.
Both are held against torch's own selection.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batchtopk import kth_largest
from .codes import Codes

__all__ = ["choose_batch", "choose_rows"]

_GROUP = 64  # columns of which the largest stands for all, at first
_SMALL = 8192  # latents up to which torch's own selection is as good
_MOST = 128  # entries a row that a program sorts out; above (and for a single one) torch does
_SAMPLE = 1 << 20
_TOGETHER = 32  # groups that a program looks at together
_COPIES = 32  # of a histogram


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
def _hot_groups(maxima, bound, hot, many, NG, NGP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, NGP)
    peak = tl.load(maxima + row * NG + g, mask=g < NG, other=float("-inf")).to(tl.float32)
    mine = (peak >= tl.load(bound)) & (g < NG)
    to = tl.cumsum(mine.to(tl.int32), 0) - 1
    tl.store(hot + row * NG + to, g, mask=mine)
    tl.store(many + row, tl.sum(mine.to(tl.int32)))


@triton.jit
def _some_groups(pre, hot, row, at, end, F, NG, N: tl.constexpr, B: tl.constexpr):
    """Columns and entries [B, N] of a row's hot groups from the `at`-th on, in the order of the row."""
    slot = at + tl.arange(0, B)
    g = tl.load(hot + row * NG + slot, mask=slot < end, other=0)
    col = g[:, None] * N + tl.arange(0, N)[None, :]
    inside = (slot < end)[:, None] & (col < F)
    return col, tl.load(pre + row * F + col, mask=inside, other=float("-inf"))


@triton.jit
def _running(flags):
    """How many are set up to each place of [B, N], read row by row, it included."""
    by_row = tl.sum(flags, 1)
    return tl.cumsum(flags, 1) + (tl.cumsum(by_row, 0) - by_row)[:, None]


@triton.jit
def _histogram(pre, hot, many, bound, counts, F, NG, N: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    low = tl.load(bound)
    end = tl.load(many + row)
    mine = counts + (row % C) * 32768  # most entries share few values: copies keep programs out of each other's way
    for at in range(0, end, B):
        _, v = _some_groups(pre, hot, row, at, end, F, NG, N, B)
        counted = (v.to(tl.float32) >= low) & (v.to(tl.float32) > 0)
        tl.atomic_add(mine + v.to(tl.int16, bitcast=True).to(tl.int32), 1, mask=counted, sem="relaxed")


@triton.jit
def _tally(pre, hot, many, lowest, above, equal, F, NG, N: tl.constexpr, B: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    low = tl.load(lowest)
    end = tl.load(many + row)
    more = tl.zeros((B, N), tl.int32)
    same = tl.zeros((B, N), tl.int32)
    for at in range(0, end, B):
        _, v = _some_groups(pre, hot, row, at, end, F, NG, N, B)
        more += (v.to(tl.float32) > low).to(tl.int32)
        same += (v.to(tl.float32) == low).to(tl.int32)
    tl.store(above + row, tl.sum(more))
    tl.store(equal + row, tl.sum(same))


@triton.jit
def _gather(pre, hot, many, lowest, start, ties, values, index, token, F, NG, N: tl.constexpr, B: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    low = tl.load(lowest)
    end = tl.load(many + row)
    place = tl.load(start + row)
    left = tl.load(ties + row)
    for at in range(0, end, B):
        col, wanted = _some_groups(pre, hot, row, at, end, F, NG, N, B)
        v = wanted.to(tl.float32)
        same = (v == low).to(tl.int32)
        kept = (v > low) | ((same > 0) & (_running(same) <= left))
        to = place + _running(kept.to(tl.int32)) - 1
        tl.store(values + to, v, mask=kept)
        tl.store(index + to, col, mask=kept)
        tl.store(token + to, tl.zeros_like(col) + row.to(tl.int32), mask=kept)
        place += tl.sum(kept.to(tl.int32))
        left -= tl.minimum(tl.sum(same), left)


def _bound(pre: Tensor, wanted: int) -> Tensor:
    """A number that at least `wanted` entries of `pre`, and hardly more, reach, [1] float32, from a sample of them."""
    flat = pre.view(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLE) | 1].float()  # an odd stride visits every latent
    share = min(sample.numel(), int(1.25 * wanted / flat.numel() * sample.numel()) + 16)
    return sample.topk(share).values[-1:].clamp_min(0.0)


def choose_batch(pre: Tensor, k: int) -> tuple[Codes, Tensor]:
    """The n k largest positive entries of `pre` [n, d_sae], and the smallest of them, a scalar.

    Of entries that equal it, the first ones are kept, so that there are never more than n k. bfloat16 has 2^15 positive
    values, so a histogram tells the smallest one exactly, and the CPU need not know; a bound from a sample leaves few
    groups of columns to look at, of which each row makes a list.
    """
    n, d_sae = pre.shape
    wanted, maxima, narrow = n * k, _maxima(pre), pre.dtype == torch.bfloat16
    groups = maxima.shape[1]
    bound = _bound(pre, wanted) if narrow else kth_largest(pre, wanted).view(1)
    hot = torch.empty(n, groups, dtype=torch.int32, device=pre.device)
    many = torch.empty(n, dtype=torch.int32, device=pre.device)
    _hot_groups[(n,)](maxima, bound, hot, many, groups, triton.next_power_of_2(groups), num_warps=4)
    sizes = (d_sae, groups, _GROUP, _TOGETHER)
    lowest = _lowest_kept(pre, hot, many, bound, wanted) if narrow else bound
    above = torch.empty_like(many)
    equal = torch.empty_like(many)
    _tally[(n,)](pre, hot, many, lowest, above, equal, *sizes, num_warps=4)
    spare = wanted - above.sum()
    ties = torch.minimum(equal, (spare - (equal.cumsum(0) - equal)).clamp_min(0)).int()
    start = torch.zeros(n + 1, dtype=torch.int32, device=pre.device)
    start[1:] = (above + ties).cumsum(0)
    values = torch.zeros(wanted, dtype=torch.float32, device=pre.device)
    index = torch.zeros(wanted, dtype=torch.int32, device=pre.device)
    token = torch.zeros_like(index)
    _gather[(n,)](pre, hot, many, lowest, start, ties, values, index, token, *sizes, num_warps=4)
    return Codes(values, index, token, start, d_sae), lowest[0]


def _lowest_kept(pre: Tensor, hot: Tensor, many: Tensor, bound: Tensor, wanted: int) -> Tensor:
    """The `wanted`-th largest positive entry of `pre`, [1] float32; the smallest from the bound up where fewer are."""
    counts = torch.zeros(_COPIES, 1 << 15, dtype=torch.int32, device=pre.device)
    sizes = (pre.shape[1], hot.shape[1], _GROUP, _TOGETHER, _COPIES)
    _histogram[(pre.shape[0],)](pre, hot, many, bound, counts, *sizes, num_warps=4)
    over = counts.sum(0).flip(0).cumsum(0)  # entries at least as large as the i-th largest value there is
    place = torch.searchsorted(over, over[-1:].clamp(max=wanted))
    lowest = ((1 << 15) - 1 - place).to(torch.int16).view(torch.bfloat16).float()
    return torch.where(over[-1:] > 0, lowest, torch.finfo(torch.bfloat16).tiny)
