"""What must be true of every input that edges lead into, checked before its edges are believed.

An edge patch has nothing to compare itself with, except where all edges into one input are patched at once: the input
is then the other run's, and the logits are those with the other run's q, k, v or MLP output put in place by quite
another way. The same input with nothing added must give the unpatched run, and one task is computed once more by a
plain forward of the whole prompt, without resuming and without a reused prefix.

In half precision a stream summed in another order is another stream after some blocks, without either being wrong. How
far that carries is measured: the unpatched run once more, with every stream value moved by one rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..errors import StageError
from .checks import tolerance
from .runs import Edit, Group, ends, widened

if TYPE_CHECKING:
    from .edges import EdgeSweep, Step, Tasks
    from .writes import Splittable

__all__ = ["allowance", "check_step"]

_PAIRS = 2  # how many are enough
_TIMES, _MOST = 4, 0.25  # how many times what rounding does may be excused; and the most, relative to the logits


@torch.no_grad()
def allowance(model: Splittable, group: Group, run: int) -> float:
    """How far the logits of two ways to compute a run of the group may be apart, in the dtype of the model."""
    branch = group.branches[0]
    tokens, expected = branch.tokens[run][:_PAIRS], group.logits[run][:_PAIRS]
    site = "blocks.0.hook_resid_pre"
    dtype = model.capture(tokens[:1], [site])[site].dtype
    allowed = tolerance(expected, dtype)
    if dtype not in (torch.bfloat16, torch.float16):
        return allowed
    dice = torch.Generator().manual_seed(0)

    def moved(value: torch.Tensor) -> torch.Tensor:
        signs = torch.randint(0, 2, value.shape, generator=dice).to(value.device) * 2 - 1
        return (value.float() * (1 + signs * torch.finfo(dtype).eps)).to(dtype)

    edits = [Edit(f"blocks.{layer}.hook_resid_{at}", moved) for layer in range(model.n_layers) for at in ("pre", "mid")]
    where = torch.full((len(tokens),), tokens.shape[1] - branch.m, device=tokens.device)
    apart = float((widened(model.run(tokens, edits, positions=where)) - expected).abs().max())
    return max(allowed, min(_TIMES * apart, _MOST * float(expected.abs().max())))


def check_step(sweep: EdgeSweep, step: Step, tasks: Tasks) -> None:
    """The checks of the first input of a step; a few rows each.

    Raises:
        StageError: an input does not do what it must; `code` is `self-check`.
    """
    receiver = step.edges[0].receiver
    n = min(len(sweep.group.pairs), _PAIRS)
    rows = torch.arange(n, device=sweep.model.device)
    heads = torch.full_like(rows, receiver.head)
    base = sweep.group.logits[ends(sweep.direction)[0]][:n]
    allowed = sweep.allowed
    total = sweep.total(receiver, n)
    idle = sweep.changed(step, 0, rows, heads, torch.zeros_like(total))[:, 0]
    _compare(receiver.name, idle, base, allowed, "with nothing added it gives logits {} off the unpatched run's")
    if not sweep.ablated:
        whole = sweep.changed(step, 0, rows, heads, total)[:, 0]
        why = "all senders patched together give logits {} off those with the other run's value"
        _compare(receiver.name, whole, _replaced(sweep, step, n), allowed, why)
    if len(tasks.rows):
        one = tasks.part(0, 1)
        for ours, plain in zip(sweep.logits(step, one), sweep.logits(step, one, plain=True), strict=True):
            _compare(receiver.name, ours, plain, allowed, "a resumed run is {} off a plain forward")


def _replaced(sweep: EdgeSweep, step: Step, n: int) -> torch.Tensor:
    """Logits [n, V] with the other run's value of what the first input of a step makes, put in behind the projection."""
    receiver = step.edges[0].receiver
    source = ends(sweep.direction)[1]
    group, model, branch = sweep.group, sweep.model, sweep.group.branches[0]
    if step.slot == "logits":
        stream = sweep.senders[0].stream(receiver)[:n]
        site = f"blocks.{model.n_layers - 1}.hook_resid_post"
    else:
        stream = sweep.senders[0].entering(step.layer)[:n]
        site = f"blocks.{step.layer}.{'hook_mlp_out' if step.slot == 'mlp' else 'attn.hook_' + step.slot}"
    values = model.capture(branch.tokens[source][:n], [site])[site]
    match = group.match(sweep.direction, 0)[:n]
    row = torch.arange(n, device=match.device)[:, None]
    there = match >= 0
    values = values[row, match.clamp_min(0)]

    def write(value: torch.Tensor) -> torch.Tensor:
        wide = there.reshape(*there.shape, *[1] * (value.ndim - 2))
        if value.ndim == 4:
            only = torch.arange(value.shape[2], device=value.device) == receiver.head
            wide = wide & only[:, None]
        return torch.where(wide, values.to(value.dtype), value)

    where = torch.full((n,), stream.shape[1] - branch.m, device=stream.device)
    if step.slot == "logits":
        return widened(model.resume(model.n_layers, write(stream), positions=where))
    return widened(model.resume(step.layer, stream, [Edit(site, write)], positions=where))


def _compare(name: str, ours: torch.Tensor, expected: torch.Tensor, allowed: float, why: str) -> None:
    off = float((ours - expected).abs().max())
    if not off <= allowed:
        raise StageError(
            f"the self-check at the input {name} failed",
            why=why.format(f"{off:.2e}") + f", allowed are {allowed:.1e}",
            fix="this model's edges cannot be patched; please report its name",
            code="self-check",
        )
