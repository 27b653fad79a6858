"""The sweep: one run's activation at one place, put into the other run, for every layer and position.

*Denoising* puts clean activations into the corrupted run (is this place sufficient?), *noising* corrupted
ones into the clean run (is it necessary?). A cell is one (pair, position) at one layer. All cells of a
layer go through the model in batches, resumed from the stored residual that enters the layer, and only the
answer position is unembedded; positions before a pair's first differing token hold equal activations in
both runs, which is checked and then not computed.

A hook that silently does nothing is this field's commonest fault, so every layer is checked while it runs:
the edit must have been called, patching everything must reproduce the run it was taken from, and a
deliberate large edit must move the logits. Otherwise the site's name is in an error, never a quiet number
in a table.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..errors import ResourceError, StageError
from ..extend.contracts import PatchMetric
from .metrics import measure
from .runs import Edit, Group, Patchable, ends, rows_of, widened

__all__ = ["patch", "sweep_layer", "tolerance"]

_WHOLE = ("resid_pre", "resid_mid", "resid_post")  # sites that carry everything the later layers see
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


@torch.no_grad()
def sweep_layer(
    model: Patchable,
    group: Group,
    layer: int,
    direction: str,
    metrics: Mapping[str, PatchMetric],
    batch_cells: int = 64,
) -> dict[str, torch.Tensor]:
    """Patch every position of every pair at one layer.

    Args:
        model: the frozen model.
        group: pairs of one length, prepared.
        layer: the layer whose site is patched.
        direction: `denoising` or `noising`.
        metrics: name -> metric.
        batch_cells: cells that go through the model at once; bounds the memory.

    Returns:
        metric name -> value of the patched run [b, p], float64 on the CPU.

    Raises:
        StageError: a self-check failed; names the site.
        PluginError: a metric broke its contract.
        ResourceError: a batch does not fit into memory.
    """
    _check_layer(model, group, layer, direction)
    base, _ = ends(direction)
    n, length = len(group.pairs), group.pairs[0].length
    unpatched = {name: measure(name, m, group.logits[base], group.answers) for name, m in metrics.items()}
    table = {name: values[:, None].repeat(1, length) for name, values in unpatched.items()}
    first = torch.tensor([pair.first_difference for pair in group.pairs])
    cells = [(row, at) for at in range(length) for row in range(n) if at >= first[row]]
    for start in range(0, len(cells), batch_cells):
        rows, places = (torch.tensor(x) for x in zip(*cells[start : start + batch_cells], strict=True))
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        mask[torch.arange(len(rows)), places] = True
        logits = patch(model, group, layer, direction, rows, mask)
        answers = rows_of(group.answers, rows.to(logits.device))
        for name, metric in metrics.items():
            table[name][rows, places] = measure(name, metric, logits, answers)
    return table


@torch.no_grad()
def patch(
    model: Patchable,
    group: Group,
    layer: int,
    direction: str,
    rows: torch.Tensor,
    mask: torch.Tensor,
    *,
    donor: torch.Tensor | None = None,
    at: int = -1,
) -> torch.Tensor:
    """Logits [c, V] after patching c copies of the group's pairs, each at its own set of positions.

    Args:
        model: the frozen model.
        group: pairs of one length, prepared.
        layer: the layer whose site is patched.
        direction: which run is patched into which.
        rows: pair of each copy [c].
        mask: [c, p] bool, True where the site is overwritten.
        donor: values [c, p, d] to write; default: the other run's.
        at: the position whose logits are wanted; default the answer position.

    Raises:
        StageError: the edit was never called.
        ResourceError: it does not fit into memory.
    """
    base, source = ends(direction)
    device = group.logits[0].device
    rows, mask = rows.to(device), mask.to(device)[:, :, None]
    new = group.values[layer][source][rows] if donor is None else donor
    site = f"blocks.{layer}.hook_{group.site}"
    calls = 0

    def write(value: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return torch.where(mask, new.to(value.dtype), value)

    where = torch.full((len(rows),), at % mask.shape[1], device=device)
    try:
        logits = model.resume(layer, group.residuals[layer][base][rows], [Edit(site, write)], positions=where)
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"{len(rows)} cells do not fit into the memory of {device}",
            why=str(error).splitlines()[0],
            fix=f"use --batch-cells {max(1, len(rows) // 2)}",
            code="out-of-memory",
        ) from error
    if calls != 1:
        raise _failed(site, f"the edit was called {calls} times instead of once")
    return widened(logits)


def tolerance(logits: torch.Tensor, dtype: torch.dtype) -> float:
    """How far two computations of the same logits in `dtype` may differ."""
    return _TOLERANCE.get(dtype, 5e-2) * max(1.0, float(logits.abs().max()))


def _check_layer(model: Patchable, group: Group, layer: int, direction: str) -> None:
    """The self-checks of one layer; one batch of b + 1 rows."""
    site = f"blocks.{layer}.hook_{group.site}"
    base, source = ends(direction)
    n, length = len(group.pairs), group.pairs[0].length
    values = group.values[layer]
    _check_prefix(group, layer, site)
    donor_run = source if group.site in _WHOLE else base
    expected = group.logits[donor_run]
    rows = torch.tensor([*range(n), 0])
    mask = torch.ones(n + 1, length, dtype=torch.bool)
    mask[n, :-1] = False
    donor = torch.cat([values[donor_run], values[base][:1]])
    donor[n, -1] = _far_away(group.residuals[layer][base][0, -1])
    found = patch(model, group, layer, direction, rows, mask, donor=donor)
    allowed = tolerance(expected, values[0].dtype)
    off = float((found[:n] - expected).abs().max())
    if not off <= allowed:
        what = "the other run" if group.site in _WHOLE else "the run itself"
        raise _failed(site, f"patching all of {what} in gives logits {off:.2e} off, allowed are {allowed:.1e}")
    moved = float((found[n] - group.logits[base][0]).abs().max())
    if not moved > allowed:
        raise _failed(site, f"a large edit at the answer position moved the logits by {moved:.1e} only")


def _check_prefix(group: Group, layer: int, site: str) -> None:
    """Before the first differing token both runs hold the same activations, or the model is not causal."""
    clean, corrupted = group.values[layer]
    first = torch.tensor([pair.first_difference for pair in group.pairs], device=clean.device)
    before = torch.arange(clean.shape[1], device=clean.device)[None, :] < first[:, None]
    gap = ((clean - corrupted).abs().amax(-1) * before).max()
    if not float(gap) <= tolerance(clean, clean.dtype):
        raise _failed(site, f"activations before the first differing token differ by {float(gap):.2e}")


def _far_away(residual: torch.Tensor) -> torch.Tensor:
    """A vector [d] well outside of what the stream holds: alternating signs, ten times its size."""
    signs = torch.ones_like(residual)
    signs[1::2] = -1
    return signs * 10 * residual.float().pow(2).mean().sqrt().clamp_min(1.0).to(residual.dtype)


def _failed(site: str, why: str) -> StageError:
    return StageError(
        f"the self-check at {site} failed",
        why=why,
        fix="this model cannot be patched there; please report its name",
        code="self-check",
    )
