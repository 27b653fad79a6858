"""Triton kernels of the second half of a fused step: a program a latent sums its tokens' contributions in registers,
applies Adam to its row at once, brings it back to norm 1, and writes the master and the copy for the products.

Encoder and decoder lie as [d_sae, d], a latent a row, and are updated by launches of their own: what the programs of one
launch gather (the rows of one matrix [n, d]) then mostly stays in the L2 cache. Encoder rows need no norm, so they go
in chunks of columns, which makes that set smaller still.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes import Codes

__all__ = ["Extra", "square_norms", "update"]

_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8
_CHUNK = 1024

Extra = tuple[Tensor, Tensor] | None
"""Rows [c, d] to be added to gradients, behind the slot [d_sae] int32 of each latent (-1: none)."""


@triton.jit
def _row_gradient(
    i,
    cols,
    inside,
    begin,
    pair,
    token,
    coefficient,
    source,
    level,
    slot,
    extra,
    scale,
    n,
    d,
    LEVELS: tl.constexpr,
    EXTRA: tl.constexpr,
    D: tl.constexpr,
    U: tl.constexpr,
):
    """The gradient [D] of latent i's row: the sum of its tokens' rows of `source`, and what AuxK adds."""
    lo = tl.load(begin + i)
    hi = tl.load(begin + i + 1)
    base = source
    if LEVELS:
        base += tl.load(level + i).to(tl.int64) * n * d
    g = tl.zeros((D,), tl.float32)
    for p in range(lo, hi, U):
        at = p + tl.arange(0, U)
        ok = at < hi
        at = tl.load(pair + at, mask=ok, other=0)
        t = tl.load(token + at, mask=ok, other=0).to(tl.int64)
        a = tl.load(coefficient + at, mask=ok, other=0.0)
        rows = tl.load(base + t[:, None] * d + cols[None, :], mask=ok[:, None] & inside[None, :], other=0.0)
        g += tl.sum(a[:, None] * rows.to(tl.float32), 0)
    g *= scale
    if EXTRA:
        s = tl.load(slot + i)
        if s >= 0:
            g += tl.load(extra + s.to(tl.int64) * d + cols, mask=inside, other=0.0).to(tl.float32)
    return g


@triton.jit
def _update(
    order,
    begin,
    pair,
    token,
    coefficient,
    source,
    level,
    slot,
    extra,
    clip,
    w,
    m,
    v,
    copy,
    scale,
    n,
    d,
    rate,
    root,
    UNIT: tl.constexpr,
    LEVELS: tl.constexpr,
    EXTRA: tl.constexpr,
    D: tl.constexpr,
    U: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    E: tl.constexpr,
):
    i = tl.load(order + tl.program_id(0)).to(tl.int64)
    cols = tl.program_id(1) * D + tl.arange(0, D)
    inside = cols < d
    g = _row_gradient(
        i, cols, inside, begin, pair, token, coefficient, source, level, slot, extra, scale, n, d, LEVELS, EXTRA, D, U
    )
    at = i * d + cols
    old = tl.load(w + at, mask=inside, other=0.0)
    if UNIT:
        g -= tl.sum(g * old) * old
    g *= tl.load(clip)
    first = B1 * tl.load(m + at, mask=inside, other=0.0) + (1 - B1) * g
    second = B2 * tl.load(v + at, mask=inside, other=0.0) + (1 - B2) * g * g
    new = old - rate * first / (tl.sqrt(second) / root + E)
    if UNIT:
        new /= tl.maximum(tl.sqrt(tl.sum(tl.where(inside, new * new, 0.0))), 1e-12)
    tl.store(w + at, new, mask=inside)
    tl.store(m + at, first, mask=inside)
    tl.store(v + at, second, mask=inside)
    tl.store(copy + at, new.to(copy.dtype.element_ty), mask=inside)


@triton.jit
def _squares(
    wanted,
    order,
    begin,
    pair,
    token,
    coefficient,
    source,
    level,
    slot,
    extra,
    w,
    out,
    scale,
    n,
    d,
    F,
    UNIT: tl.constexpr,
    LEVELS: tl.constexpr,
    EXTRA: tl.constexpr,
    D: tl.constexpr,
    U: tl.constexpr,
):
    cols = tl.arange(0, D)
    inside = cols < d
    end = tl.where(tl.load(wanted) > 0, F, 0)
    for latent in range(tl.program_id(0), end, tl.num_programs(0)):
        i = tl.load(order + latent).to(tl.int64)
        g = _row_gradient(
            i,
            cols,
            inside,
            begin,
            pair,
            token,
            coefficient,
            source,
            level,
            slot,
            extra,
            scale,
            n,
            d,
            LEVELS,
            EXTRA,
            D,
            U,
        )
        if UNIT:
            old = tl.load(w + i * d + cols, mask=inside, other=0.0)
            g -= tl.sum(g * old) * old
        tl.store(out + i, tl.sum(g * g))


def _arguments(codes: Codes, coefficient: Tensor, source: Tensor, level: Tensor | None, extra: Extra) -> tuple:
    slot, rows = extra if extra is not None else (codes.start, source)
    begin, pair = codes.by_latent
    return begin, pair, codes.token, coefficient, source, codes.start if level is None else level, slot, rows


def square_norms(
    wanted: Tensor,
    codes: Codes,
    coefficient: Tensor,
    source: Tensor,
    w: Tensor,
    *,
    scale: float,
    unit: bool,
    level: Tensor | None = None,
    extra: Extra = None,
) -> Tensor:
    """Square norm of each row's gradient [d_sae], zeros (in no time) where `wanted`, a scalar on the device, is 0."""
    d_sae, d = w.shape
    out = torch.zeros(d_sae, device=w.device)
    args = _arguments(codes, coefficient, source, level, extra)
    more = (unit, level is not None, extra is not None, triton.next_power_of_2(d), 2)
    _squares[(min(d_sae, 1024),)](
        wanted, codes.busiest, *args, w, out, scale, source.shape[-2], d, d_sae, *more, num_warps=8
    )
    return out


def update(
    codes: Codes,
    coefficient: Tensor,
    source: Tensor,
    w: Tensor,
    first: Tensor,
    second: Tensor,
    copy: Tensor,
    *,
    scale: float,
    clip: Tensor,
    lr: float,
    step: int,
    unit: bool,
    level: Tensor | None = None,
    extra: Extra = None,
    chunk: int | None = None,
    warps: int | None = None,
    unroll: int = 2,
) -> None:
    """One step of Adam on the rows w [d_sae, d], in place, with its moments and the copy in the products' dtype.

    A row's gradient is scale * sum of coefficient * source[token] over its latent's entries, plus `extra`; with `unit`
    without the part along the row, which is brought back to norm 1 afterwards.

    Args:
        coefficient: [m].
        source: [n, d], or [levels, n, d] with `level`.
        clip: factor on all gradients, a scalar on the device.
        step: counted from 1.
    """
    d_sae, d = w.shape
    whole = triton.next_power_of_2(d)
    size = whole if unit else min(whole, chunk or _CHUNK)
    args = _arguments(codes, coefficient, source, level, extra)
    rate, root = lr / (1 - _BETA1**step), (1 - _BETA2**step) ** 0.5
    flags = (unit, level is not None, extra is not None, size, unroll, _BETA1, _BETA2, _EPS)
    numbers = (scale, source.shape[-2], d, rate, root)
    warps = warps or max(1, min(8, size // 256))
    _update[(d_sae, -(-d // size))](
        codes.busiest, *args, clip, w, first, second, copy, *numbers, *flags, num_warps=warps
    )
