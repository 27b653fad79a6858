"""What must be true of a site, checked while a sweep runs: an error that names the site, never a quiet number.

A hook that silently does nothing is this field's commonest fault. So at every layer the edit must be called,
patching all of a site must reproduce the run that the values were taken from (the other run for the whole
stream, the run itself for a part of it), a deliberate large edit must move the logits, and what precedes the
first differing token must be equal in both runs. Of the first batch some cells are computed once more by one
plain forward of the whole prompt, without resuming and without a reused prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..errors import StageError
from .runs import Edit, Group, ends, widened
from .sites import Donor

if TYPE_CHECKING:
    from .cells import Batch
    from .sweep import Layers, Sweep

__all__ = ["check_batch", "check_layers", "tolerance"]

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_PAIRS, _CELLS = 4, 1  # how many are enough
_NOISY, _TIMES = 0.25, 4  # the most that noise may excuse, relative to the logits; and how many times its size


def tolerance(logits: torch.Tensor, dtype: torch.dtype) -> float:
    """How far two computations of the same logits in `dtype` may differ."""
    return _TOLERANCE.get(dtype, 5e-2) * max(1.0, float(logits.abs().max()))


@torch.no_grad()
def check_layers(sweep: Sweep, layers: Sequence[int]) -> None:
    """The checks of some layers, in ascending order; a few rows each, in one walk where the model can.

    Raises:
        StageError: the site does not do what it must; `code` is `self-check`.
    """
    for layer in layers:
        _check_prefix(sweep.group, layer)
    for some in [layers] if sweep.prefix else [[layer] for layer in layers]:
        for layer, (found, after) in zip(some, _patched_whole(sweep, some), strict=True):
            _check_layer(sweep, layer, found, after)


def _check_layer(sweep: Sweep, layer: int, found: torch.Tensor, after: torch.Tensor | None) -> None:
    group, site = sweep.group, sweep.group.site.at(layer)
    base, _ = ends(sweep.direction)
    n = min(len(group.pairs), _PAIRS)
    expected = group.logits[_copied(sweep)][:n]
    allowed = _allowed(sweep, expected, group.residuals[layer][base].dtype)
    off = float((found[:n] - expected).abs().max())
    if not off <= allowed:
        what = "the run itself" if _copied(sweep) == base else "the other run"
        raise _failed(site, f"patching all of {what} in gives logits {off:.2e} off, allowed are {allowed:.1e}")
    moved = float((found[n] - group.logits[base][0]).abs().max())
    if after is not None:  # a saturated softmax later on may hide from the logits what the block itself shows
        moved = max(moved, float((after[n] - after[n + 1]).abs().max()))
    if not moved > allowed and not _inert(sweep, layer):
        raise _failed(site, f"a large edit moved the logits by {moved:.1e} only")


def _copied(sweep: Sweep) -> int:
    """Which run is patched in whole: the other one where the site is the whole stream, else the run itself."""
    base, source = ends(sweep.direction)
    group = sweep.group
    return source if group.site.whole and group.aligned and group.corruption == "counterpart" else base


@torch.no_grad()
def check_batch(sweep: Sweep, layers: Layers, batch: Batch) -> None:
    """A few cells of a batch, as the sweep computes them and by one plain forward.

    Raises:
        StageError: they disagree; `code` is `self-check`.
    """
    step = max(1, len(batch) // _CELLS)
    cut = slice(0, step * _CELLS, step)
    few = type(batch)(batch.rows[cut], batch.places[cut], batch.units[cut], batch.start)
    for ours, plain in zip(sweep.logits([layers], few), sweep.logits([layers], few, plain=True), strict=True):
        dtype = sweep.group.residuals[layers[0]][0].dtype
        allowed, off = _allowed(sweep, plain, dtype), float((ours - plain).abs().max())
        if not off <= allowed:
            site = sweep.group.site.at(layers[0])
            raise _failed(site, f"a resumed run is {off:.2e} off a plain forward, allowed are {allowed:.1e}")


def _allowed(sweep: Sweep, logits: torch.Tensor, dtype: torch.dtype) -> float:
    """How far two computations may be apart: the tolerance of the dtype, or in half precision some times what the
    shape of the batch alone changes, where that is more."""
    allowed = tolerance(logits, dtype)
    if dtype in _TOLERANCE:
        return allowed
    most = _NOISY * max(1.0, float(logits.abs().max()))
    return max(allowed, min(_TIMES * _noise(sweep), most))


def _noise(sweep: Sweep) -> float:
    """By how much the patched run's logits differ when the same prompt is computed in a larger batch."""
    if sweep.noise is None:
        base, _ = ends(sweep.direction)
        branch = sweep.group.branches[0]
        tokens = branch.tokens[base][:1].repeat(2 * len(sweep.group.pairs) + _PAIRS, 1)
        where = torch.full((len(tokens),), tokens.shape[1] - branch.m, device=tokens.device)
        again = widened(sweep.model.run(tokens, positions=where))
        sweep.noise = float((again - sweep.group.logits[base][0]).abs().max())
    return sweep.noise


def _patched_whole(sweep: Sweep, layers: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Per layer the logits [n + 1, V] of n pairs with every position and unit of the site copied from a run, and of one
    with a large edit everywhere; for a site inside the block also of one with its own values, and what leaves the block."""
    group, (base, _) = sweep.group, ends(sweep.direction)
    branch, n = group.branches[0], min(len(group.pairs), _PAIRS)
    inside = not group.site.whole
    rows = torch.tensor([*range(n), 0, *([0] if inside else [])], device=group.logits[0].device)
    mask = torch.ones(len(rows), branch.tokens[base].shape[1], dtype=torch.bool, device=rows.device)
    calls, left = [0] * len(layers), [None] * len(layers)

    def edits(at: int, layer: int) -> list[Edit]:
        values = group.values[layer]
        own = [values[base][:1]] if inside else []
        donor = torch.cat([values[_copied(sweep)][:n], _far_away(values[base][:1]), *own])
        old, new = Donor(values[base], rows), Donor(donor, torch.arange(len(rows), device=rows.device))

        def write(value: torch.Tensor) -> torch.Tensor:
            calls[at] += 1
            return group.site.write(value, old, new, mask, None)

        def look(value: torch.Tensor) -> torch.Tensor:
            left[at] = value  # type: ignore[call-overload]
            return value

        seen = [Edit(f"blocks.{layer}.hook_resid_post", look)] if inside else []
        return [Edit(group.site.at(layer), write), *seen]

    logits = sweep.resumed(layers, 0, rows, [edits(at, layer) for at, layer in enumerate(layers)])[:, 0]
    for layer, count in zip(layers, calls, strict=True):
        if count != 1:
            raise _failed(group.site.at(layer), f"the edit was called {count} times instead of once")
    return list(zip(logits.split(len(rows)), left, strict=True))


def _check_prefix(group: Group, layer: int) -> None:
    """Before the first differing token both runs hold the same activations, or the model is not causal."""
    clean, corrupted = group.values[layer]
    turned = group.site.name == "pattern"
    worst = 0.0
    for row, pair in enumerate(group.pairs):
        n = pair.first_difference
        a, b = (v[row, :, :n, :n] if turned else v[row, :n] for v in (clean, corrupted))
        worst = max(worst, float((a - b).abs().max())) if n else worst
    if not worst <= tolerance(clean, clean.dtype):
        why = f"activations before the first differing token differ by {worst:.2e}"
        raise _failed(group.site.at(layer), why)


def _far_away(values: torch.Tensor) -> torch.Tensor:
    """Values well outside of what the site holds: ten times its size, with signs that alternate along every axis."""
    signs = torch.ones_like(values)
    for axis, size in enumerate(values.shape):
        shape = [1] * values.ndim
        shape[axis] = size
        signs = signs * (1 - 2 * (torch.arange(size, device=values.device) % 2)).reshape(shape).to(values.dtype)
    return signs * 10 * values.float().pow(2).mean().sqrt().clamp_min(1.0).to(values.dtype)


def _inert(sweep: Sweep, layer: int) -> bool:
    """Whether the part of the block behind the site writes exactly nothing (weights that are zero)."""
    name = {"mlp_post": "hook_mlp_out"}.get(sweep.group.site.name, "hook_attn_out")
    if sweep.group.site.at(layer).startswith(f"blocks.{layer}.hook_"):
        return False  # a site of the stream is read by what follows, whatever the weights
    tokens = sweep.group.branches[0].tokens[0][:1]
    return not bool(sweep.model.capture(tokens, [f"blocks.{layer}.{name}"])[f"blocks.{layer}.{name}"].any())


def _failed(site: str, why: str) -> StageError:
    return StageError(
        f"the self-check at {site} failed",
        why=why,
        fix="this model cannot be patched there; please report its name",
        code="self-check",
    )
