"""What an SAE is worth on rows that it has not seen: in all, and for each author, work or character by itself.

Explained variance is one quotient of two sums over all rows and dimensions, about the mean of each dimension;
sums are float64. (A mean of ratios, or a variance about zero, flatters: both have been published by
accident.) `nmse`, which has the second moment about zero below the line, is printed beside it under its own
name. A group is a set of rows like any other, with a mean of its own. What cannot be computed is None, and
`undefined` says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..store.files import write_json
from ..store.tables import write_table
from .directions import neighbours
from .loss import Edit, cross_entropy

__all__ = ["Edit", "Reads", "cross_entropy", "evaluate", "write_evaluation"]

_PERCENTILES = (5, 25, 50, 75, 95)
_FLOOR = -7  # log10 density below which a latent counts into the first bin
_LARGEST = 2**27  # latent activations of a chunk: half a GiB of float32


class Reads(Protocol):
    """What is evaluated: encode and decode of raw activations. One that has a target also has `reconstruct`."""

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        ...

    def encode(self, x: Tensor) -> Tensor:
        """[n, d_in] -> [n, d_sae]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """[n, d_sae] -> [n, d_out]."""
        ...


class _Parts:
    """Rows cut into groups, with the sums of each group (float64 [g]); the whole is the case of one group."""

    def __init__(self, labels: Sequence[str], truth: Tensor, chunk: int, device: torch.device) -> None:
        self.labels = sorted(set(labels))
        number = {label: at for at, label in enumerate(self.labels)}
        self.codes = torch.tensor([number[label] for label in labels], device=device)
        g = len(self.labels)
        self.rows = torch.bincount(self.codes, minlength=g).double()
        total = torch.zeros(g, truth.shape[1], dtype=torch.float64, device=device)
        for part, codes in zip(truth.split(chunk), self.codes.split(chunk), strict=True):
            total.index_add_(0, codes, part.to(device).double())
        self.mean = total / self.rows[:, None]
        self.residual, self.variance, self.square, self.l0 = torch.zeros(4, g, dtype=torch.float64, device=device)

    def add(self, start: int, truth: Tensor, residual: Tensor, l0: Tensor) -> None:
        """Count rows from `start` on: truth [n, d] and residual [n, d] float64, l0 [n]."""
        codes = self.codes[start : start + truth.shape[0]]
        self.residual.index_add_(0, codes, residual.square().sum(dim=1))
        self.variance.index_add_(0, codes, (truth - self.mean[codes]).square().sum(dim=1))
        self.square.index_add_(0, codes, truth.square().sum(dim=1))
        self.l0.index_add_(0, codes, l0.double())

    def row(self, group: int) -> dict[str, float | int | None]:
        """The measurements of one group."""
        residual, variance, square = (float(s[group]) for s in (self.residual, self.variance, self.square))
        fvu = residual / variance if variance > 0 else None
        return {
            "rows": int(self.rows[group]),
            "explained_variance": None if fvu is None else 1 - fvu,
            "fvu": fvu,
            "nmse": residual / square if square > 0 else None,
            "l0": float(self.l0[group] / self.rows[group]),
        }


@dataclass(frozen=True)
class _Activity:
    """How many latents are active in each row, int64 [n], and how many rows each latent is active in [d_sae]."""

    l0: Tensor
    firing: Tensor


@torch.no_grad()
def evaluate(
    sae: Reads,
    rows: Tensor,
    *,
    target: Tensor | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    device: str | torch.device = "cpu",
    chunk: int = 4096,
) -> dict[str, object]:
    """Reconstruction and sparsity on `rows` [n, d_in] (raw, ordinary tokens, held out).

    Args:
        target: [n, d_out], what a transcoder should give; None = the rows themselves.
        groups: name of a grouping (`author`, say) -> the label of each row.
        chunk: rows at once, fewer where the SAE is wide.

    Returns JSON values: `rows`, `explained_variance` = 1 - sum|y - y^|^2 / sum|y - mean|^2, `fvu` = 1 - that,
    `nmse` = sum|y - y^|^2 / sum|y|^2, `l0` (mean active latents a row), `l0_percentiles`, `silent_fraction`
    (latents that fire on none of these rows), `density_histogram` (latents by log10 of the fraction of rows
    they fire on), `decoder_neighbours`, and for each grouping `per_<name>`: one row a label with the same
    measurements. `undefined` maps what is None to the reason.
    """
    if not rows.shape[0]:
        nothing = dict.fromkeys(("explained_variance", "fvu", "nmse", "l0"))
        return {"rows": 0, **nothing, "undefined": dict.fromkeys(nothing, "no row is held out")}
    place = torch.device(device)
    truth = rows if target is None else target
    chunk = max(1, min(chunk, _LARGEST // sae.d_sae))
    exact = torch.device("cpu") if place.type == "mps" else place  # mps has no float64
    named = {"": [""] * rows.shape[0], **(groups or {})}
    parts = {name: _Parts(labels, truth, chunk, exact) for name, labels in named.items()}
    activity = _accumulate(sae, rows, target, list(parts.values()), place, chunk)
    whole = parts.pop("").row(0)
    density = activity.firing.double() / rows.shape[0]
    found: dict[str, object] = {
        **whole,
        "l0_percentiles": _percentiles(activity.l0),
        "silent_fraction": float((density == 0).double().mean()),
        "density_histogram": _histogram(density),
        "undefined": {key: "the rows do not vary" for key in ("explained_variance", "fvu") if whole[key] is None},
    }
    if isinstance(directions := getattr(sae, "W_dec", None), Tensor):
        found["decoder_neighbours"] = neighbours(directions.detach())
    return found | {f"per_{name}": _table(part, activity.l0) for name, part in parts.items()}


def write_evaluation(folder: Path, measured: Mapping[str, object]) -> None:
    """Write evaluation.json, and evaluation_<grouping>.parquet (reconstruction and loss side by side) for each grouping."""
    write_json(folder / "evaluation.json", measured)
    for key, rows in measured.items():
        if not key.startswith("per_") or not isinstance(rows, list) or not rows:
            continue
        name = key.removeprefix("per_")
        losses = measured.get(f"ce_per_{name}")
        by_label = {row["label"]: row for row in losses} if isinstance(losses, list) else {}
        more = list(next(iter(by_label.values()), {}))
        joined = [{**dict.fromkeys(more), **by_label.get(row["label"], {}), **row} for row in rows]
        columns = [*rows[0], *(column for column in more if column not in rows[0])]
        write_table(
            folder / f"evaluation_{name}.parquet", {column: [row[column] for row in joined] for column in columns}
        )


def _accumulate(
    sae: Reads, rows: Tensor, target: Tensor | None, parts: Sequence[_Parts], device: torch.device, chunk: int
) -> _Activity:
    """One pass: fill the sums of every grouping."""
    firing, l0 = torch.zeros(sae.d_sae, dtype=torch.int64), []
    exact = parts[0].codes.device
    for start in range(0, rows.shape[0], chunk):
        x = rows[start : start + chunk].to(device)
        latents = sae.encode(x)
        active = latents > 0
        firing += active.sum(dim=0).cpu()
        l0.append(active.sum(dim=1))
        if target is None:
            truth, rebuilt = x, sae.decode(latents)
        else:  # a skip connection reads x itself
            truth, rebuilt = target[start : start + chunk], sae.reconstruct(x)  # type: ignore[attr-defined]
        y = truth.to(exact).double()
        residual = y - rebuilt.to(exact).double()
        for part in parts:
            part.add(start, y, residual, l0[-1].to(exact))
    return _Activity(torch.cat(l0).cpu(), firing)


def _percentiles(l0: Tensor) -> dict[str, float]:
    points = torch.tensor(_PERCENTILES, dtype=torch.float64) / 100
    return dict(zip(map(str, _PERCENTILES), torch.quantile(l0.double(), points).tolist(), strict=True))


def _table(part: _Parts, l0: Tensor) -> list[dict[str, object]]:
    codes, rows = part.codes.cpu(), []
    for number, label in enumerate(part.labels):
        row = part.row(number)
        spread = _percentiles(l0[codes == number])
        why = "its rows do not vary" if row["explained_variance"] is None else None
        rows.append({"label": label, **row, **{f"l0_p{p}": v for p, v in spread.items()}, "undefined": why})
    return rows


def _histogram(density: Tensor) -> dict[str, list]:
    """Latents in bins of half a decade of log10 density; silent latents are in none of them."""
    logs = density[density > 0].log10().clamp(_FLOOR, 0)
    bins = -2 * _FLOOR
    counts = torch.histc(logs, bins=bins, min=_FLOOR, max=0) if logs.numel() else torch.zeros(bins)
    edges = torch.linspace(_FLOOR, 0, bins + 1, dtype=torch.float64)
    return {"log10_density": edges.tolist(), "latents": [int(c) for c in counts]}
