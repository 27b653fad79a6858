"""Windows in, rows of activations out: the inner loop of harvest.

A row is one real token (padding is dropped, BOS kept). Sums for the mean, the mean norm and the variance are
taken over text tokens alone, in float64 and of the values as stored, so that whoever reads the rows back
finds the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..errors import IntegrityError
from .interface import FrozenModel

__all__ = ["SUMS", "read"]

SUMS = ("sum", "norm_sum", "sq_sum")


def read(
    frozen: FrozenModel,
    input_ids: torch.Tensor,
    length: torch.Tensor,
    span: range,
    sites: Sequence[str],
    *,
    dtype: str,
    batch_size: int,
    shard: int = 0,
    said: Callable[[int], None] = lambda rows: None,
) -> dict[str, dict[str, torch.Tensor]]:
    """Activations of the windows `span`, one dictionary of tensors a site.

    Args:
        input_ids: int32 [n_windows, window], right-padded; length: int32 [n_windows], real tokens.
        dtype: stored precision. Batches are cut from the start of `span`, so they do not depend
            on other shards.
        shard: named in errors.
        said: called after each batch with the rows read so far.

    Returns, per site, on the CPU: acts [rows, d], window, position and token int32 [rows], and the sums over
    text tokens sum float64 [d], norm_sum float64 [1], sq_sum float64 [1].

    Raises:
        IntegrityError: a value is NaN or infinite; names shard, window and position.
    """
    stored: torch.dtype = getattr(torch, dtype)
    special = torch.tensor(frozen.special_ids, dtype=torch.int32)
    parts: dict[str, list[torch.Tensor]] = {site: [] for site in sites}
    sums: dict[str, list[torch.Tensor]] = {}
    rows: list[torch.Tensor] = []
    for start in range(span.start, span.stop, batch_size):
        stop = min(start + batch_size, span.stop)
        longest = int(length[start:stop].max())
        tokens = input_ids[start:stop, :longest]
        real = torch.arange(longest)[None, :] < length[start:stop, None]
        window, position = real.nonzero(as_tuple=True)
        where = torch.stack([window + start, position, tokens[real]]).int()
        text = ~torch.isin(where[2], special)
        found = frozen.capture(tokens.long(), sites)
        for site in sites:
            acts = found[site].flatten(2)[real.to(found[site].device)].to(stored)
            _check_finite(acts, where, site, shard)
            parts[site].append(acts.cpu())
            moments = _moments(acts[text.to(acts.device)])
            sums[site] = [a + b for a, b in zip(sums[site], moments, strict=True)] if site in sums else moments
        rows.append(where)
        said(sum(part.shape[1] for part in rows))
    window, position, token = (row.clone() for row in torch.cat(rows, dim=1))
    shared = {"window": window, "position": position, "token": token}
    return {
        site: {"acts": torch.cat(parts[site]), **shared, **dict(zip(SUMS, sums[site], strict=True))} for site in sites
    }


def _moments(acts: torch.Tensor) -> list[torch.Tensor]:
    """Sum [d], sum of norms [1] and sum of squared norms [1] of acts [n, d], in float64 on the CPU."""
    exact = acts.double()
    squares = exact.square().sum(-1)
    return [exact.sum(0).cpu(), squares.sqrt().sum().reshape(1).cpu(), squares.sum().reshape(1).cpu()]


def _check_finite(acts: torch.Tensor, where: torch.Tensor, site: str, shard: int) -> None:
    finite = acts.isfinite()
    if finite.all():
        return
    row = int((~finite.all(-1)).nonzero()[0])
    window, position, token = where[:, row].tolist()
    raise IntegrityError(
        f"the activation at {site} is not finite: shard {shard}, window {window}, position {position}",
        why=f"token {token} gave NaN or infinity in {str(acts.dtype).removeprefix('torch.')}",
        fix="use --dtype float32; if it stays, the model's weights are broken",
        code="not-finite",
    )
