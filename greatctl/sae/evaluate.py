"""What an SAE is worth on rows that it has not seen.

Explained variance is one quotient of two sums over all rows and dimensions, about the mean of each dimension;
sums are float64. (A mean of ratios, or a variance about zero, flatters: both have been published by
accident.) `nmse`, which has the second moment about zero below the line, is printed beside it under its own
name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Reads", "cross_entropy", "evaluate"]

_PERCENTILES = (5, 25, 50, 75, 95)
_FLOOR = -7  # log10 density below which a latent counts into the first bin

Edit = Callable[[Tensor], Tensor]


class Reads(Protocol):
    """What is evaluated: encode and decode of raw activations."""

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        ...

    def encode(self, x: Tensor) -> Tensor:
        """[n, d_in] -> [n, d_sae]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """[n, d_sae] -> [n, d_in]."""
        ...


@dataclass(frozen=True)
class _Sums:
    residual: Tensor
    variance: Tensor
    square: Tensor
    l0: Tensor
    firing: Tensor


@torch.no_grad()
def evaluate(sae: Reads, rows: Tensor, *, device: str | torch.device = "cpu", chunk: int = 4096) -> dict[str, object]:
    """Reconstruction and sparsity on `rows` [n, d_in] (raw, ordinary tokens, held out).

    Returns JSON values: `rows`, `explained_variance` = 1 - sum|x - x^|^2 / sum|x - mean|^2, `fvu` = 1 - that,
    `nmse` = sum|x - x^|^2 / sum|x|^2, `l0` (mean active latents a token), `l0_percentiles`, `silent_fraction`
    (latents that fire on none of these rows), `density_histogram` (latents by log10 of the fraction of rows
    they fire on). Values that are undefined (no rows, no variance) are None.
    """
    if not rows.shape[0]:
        return {"rows": 0, "explained_variance": None, "fvu": None, "nmse": None, "l0": None}
    sums = _accumulate(sae, rows, device, chunk)
    n = rows.shape[0]
    fvu = _ratio(sums.residual, sums.variance)
    density = sums.firing.double() / n
    points = torch.tensor(_PERCENTILES, dtype=torch.float64) / 100
    percentiles = torch.quantile(sums.l0.double(), points).tolist()
    return {
        "rows": n,
        "explained_variance": None if fvu is None else 1 - fvu,
        "fvu": fvu,
        "nmse": _ratio(sums.residual, sums.square),
        "l0": float(sums.l0.double().mean()),
        "l0_percentiles": {str(p): v for p, v in zip(_PERCENTILES, percentiles, strict=True)},
        "silent_fraction": float((density == 0).double().mean()),
        "density_histogram": _histogram(density),
    }


def cross_entropy(ce: Callable[[Edit | None], float], sae: Reads) -> dict[str, float | None]:
    """What the splice costs the language model.

    Args:
        ce: mean next-token cross-entropy (nats) of the model with an edit [n, d_in] -> [n, d_in] applied at
            the SAE's site to every ordinary position; None = untouched.
        sae: reads that site.

    Returns:
        `ce_clean`, `ce_spliced`, `ce_zero` and `ce_loss_recovered` = (ce_zero - ce_spliced) / (ce_zero -
        ce_clean).
    """
    clean, zero = ce(None), ce(torch.zeros_like)
    spliced = ce(lambda x: sae.decode(sae.encode(x.float())).to(x.dtype))
    gap = zero - clean
    recovered = (zero - spliced) / gap if abs(gap) > 1e-9 else None
    return {"ce_clean": clean, "ce_spliced": spliced, "ce_zero": zero, "ce_loss_recovered": recovered}


def _accumulate(sae: Reads, rows: Tensor, device: str | torch.device, chunk: int) -> _Sums:
    mean = torch.stack([part.double().sum(dim=0) for part in rows.split(chunk)]).sum(dim=0) / rows.shape[0]
    residual, variance, square = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    firing, l0 = torch.zeros(sae.d_sae, dtype=torch.int64), []
    for part in rows.split(chunk):
        latents = sae.encode(part.to(device))
        active = latents > 0
        firing += active.sum(dim=0).cpu()
        l0.append(active.sum(dim=1).cpu())
        x = part.double()
        residual += (x - sae.decode(latents).cpu().double()).square().sum()
        variance += (x - mean).square().sum()
        square += x.square().sum()
    return _Sums(residual, variance, square, torch.cat(l0), firing)


def _ratio(above: Tensor, below: Tensor) -> float | None:
    return float(above / below) if float(below) > 0 else None


def _histogram(density: Tensor) -> dict[str, list]:
    """Latents in bins of half a decade of log10 density; silent latents are in none of them."""
    logs = density[density > 0].log10().clamp(_FLOOR, 0)
    bins = -2 * _FLOOR
    counts = torch.histc(logs, bins=bins, min=_FLOOR, max=0) if logs.numel() else torch.zeros(bins)
    edges = torch.linspace(_FLOOR, 0, bins + 1, dtype=torch.float64)
    return {"log10_density": edges.tolist(), "latents": [int(c) for c in counts]}
