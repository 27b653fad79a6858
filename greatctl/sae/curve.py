"""The training curve: in memory, as JSON lines while it grows, as columns when it is done.

`metrics.jsonl` can be followed with `tail -f` in the work folder and needs no account anywhere. It holds no times, so
an interrupted run ends with the bytes of an undisturbed one: on resume it is written anew up to the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..store.files import canonical_json, disk_errors, write_text
from .coder import Coder
from .micro import Parts

__all__ = ["Curve", "Point", "columns", "fetched", "glance"]

Point = dict[str, Tensor | float]
"""A row of the curve whose tensors (scalars) still lie on the device."""

_PRE_ACTS, _FEWEST = 1 << 26, 64  # pre-activations of a glance (256 MiB), and rows at least


class Curve:
    """Rows of named numbers, one a logged step. `path` is the file of JSON lines, None for none."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []

    def restore(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Begin (again) with these rows."""
        self.rows = [dict(row) for row in rows]
        if self.path is not None:
            write_text(self.path, "".join(map(_line, self.rows)))

    def add(self, row: Mapping[str, float]) -> None:
        """One more point."""
        self.rows.append(dict(row))
        if self.path is not None:
            with disk_errors(self.path), self.path.open("a", encoding="utf-8") as stream:
                stream.write(_line(row))


def fetched(points: Sequence[Point]) -> list[dict[str, float]]:
    """Points as plain numbers; the CPU waits for the device once for all of them."""
    found = [value for point in points for value in point.values() if isinstance(value, Tensor)]
    numbers = iter(torch.stack([value.detach().double() for value in found]).tolist() if found else [])
    return [{k: next(numbers) if isinstance(v, Tensor) else v for k, v in point.items()} for point in points]


@torch.no_grad()
def glance(coder: Coder, parts: Parts, x: Tensor, target: Tensor | None) -> dict[str, Tensor]:
    """`explained_variance` and `l0` (float64 scalars on the device) of a coder on one training batch, part by part;
    changes nothing about it. Of a wide coder's batch only the first rows are looked at.
    """
    most = max(_FEWEST, _PRE_ACTS // coder.config.d_sae)
    x, wanted = x[:most], (x if target is None else target)[:most]
    fired, counts, buffers = coder._fired, coder.counts.copy(), [b.clone() for b in coder.buffers()]
    residual = torch.zeros((), dtype=torch.float64, device=x.device)
    active = torch.zeros((), dtype=torch.int64, device=x.device)
    plain = type(coder).reconstruct is Coder.reconstruct
    for part, truth in zip(parts.split(x), parts.split(wanted), strict=True):
        latents = coder.encode(part)
        active += (latents > 0).sum()
        residual += (truth - (coder.decode(latents) if plain else coder.reconstruct(part))).double().square().sum()
    for buffer, before in zip(coder.buffers(), buffers, strict=True):
        buffer.copy_(before)  # looking must not change what is looked at
    coder._fired, coder.counts = fired, counts
    around = (wanted - wanted.mean(dim=0)).double().square().sum()
    return {
        "explained_variance": 1 - residual / around.clamp_min(1e-30),
        "l0": active.double() / x.shape[0],
    }


def columns(rows: Iterable[Mapping[str, float]]) -> dict[str, list]:
    """The curve by columns, in an order that does not depend on which part of it came from a checkpoint."""
    rows = list(rows)
    names = ["step", "tokens", *sorted({name for row in rows for name in row} - {"step", "tokens"})]
    return {name: [row.get(name) for row in rows] for name in names}


def _line(row: Mapping[str, float]) -> str:
    return canonical_json(row) + "\n"
