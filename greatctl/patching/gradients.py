"""Gradients of metrics at every site of a run, in memory that the depth of the model does not multiply.

A run is taken block by block, each block on its own from the residual that enters it; on the way back a block's
graph gives the gradients at the sites inside of it, and the one that the block below goes on with. So at most
the residuals of all blocks are held. Where memory allows, the graphs of the last blocks are kept from the way
there; the others are computed a second time, which changes no number.

Parameters take no part: a gradient exists because the entering residual asks for one, so nothing is accumulated
anywhere and the model stays frozen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import StageError, UsageError
from ..extend.contracts import PatchMetric
from .memory import free_bytes
from .runs import Edit, Group, score, widened, with_scores

__all__ = ["Block", "Tape", "cotangents", "must_be_differentiable"]

POST = "hook_resid_post"
STREAM = ("hook_resid_pre", "hook_resid_mid", POST)
_SHARE = 0.3  # of the free memory, for graphs that are kept


class _Left(Exception):
    """Ends a run once a block was left."""


class Block:
    """One block of a run, with its graph from the entering residual on.

    Args:
        model: the frozen model.
        layer: which block.
        residual: [b, p, d] entering it.
        kinds: sites whose values are kept (`attn.hook_z`, …).
        edits: applied first; what an edit returns is what is kept.

    Attributes:
        values: kind -> tensor of the run, `hook_resid_post` always among them.
    """

    def __init__(
        self, model: Any, layer: int, residual: torch.Tensor, kinds: Sequence[str], edits: Sequence[Edit] = ()
    ) -> None:
        self.layer = layer
        self.entering = residual.detach().requires_grad_()
        self.values: dict[str, torch.Tensor] = {}

        def look(kind: str) -> Edit:
            def keep(value: torch.Tensor) -> torch.Tensor:
                self.values[kind] = value
                if kind == POST:
                    raise _Left
                return value

            return Edit(f"blocks.{layer}.{kind}", keep)

        looks = [look(kind) for kind in dict.fromkeys([*kinds, POST])]
        with torch.enable_grad(), suppress(_Left):
            model.resume(layer, self.entering, [*edits, *looks])
        if not self.values[POST].requires_grad:
            raise StageError(
                "this model gives no gradients",
                why=f"the engine {getattr(model, 'engine', 'of it')!r} computed block {layer} without a graph",
                fix="use --method exact",
                code="no-gradient",
            )

    def pull(self, kind: str, back: torch.Tensor, to: str | None = None) -> torch.Tensor:
        """Gradients [n, …] that n gradients `back` [n, …] at a site give at `to` (default: the entering residual)."""
        source = self.entering if to is None else self.values[to]
        found = torch.autograd.grad(
            self.values[kind], source, back, retain_graph=True, is_grads_batched=True, allow_unused=True
        )[0]
        return source.new_zeros(len(back), *source.shape) if found is None else found

    def gradients(self, back: torch.Tensor, kinds: Sequence[str]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """For k gradients `back` [k, b, p, d] at the end of the block: those at its entrance, and kind -> [k, …]."""
        inputs = [self.entering, *(self.values[kind] for kind in kinds)]
        rows = [
            torch.autograd.grad(self.values[POST], inputs, one, retain_graph=True, allow_unused=True) for one in back
        ]
        full = [
            torch.stack([torch.zeros_like(value) if row[at] is None else row[at] for row in rows])
            for at, value in enumerate(inputs)
        ]
        return full[0], dict(zip(kinds, full[1:], strict=True))


@dataclass(frozen=True)
class Passed:
    """A block on the way back: its values, and k gradients [k, …] at its entrance and at each kind."""

    block: Block
    entering: torch.Tensor
    grads: Mapping[str, torch.Tensor]


class Tape:
    """A run from a residual on, ready to be walked back.

    Args:
        model: the frozen model.
        residual: [b, p, d] entering block `first`; or those entering every block from there on, where they are known.
        kinds: sites of interest, of every block.
        first: where the run begins.
        edits: layer -> edits of that block.
        m: how many last positions have logits that count.

    Attributes:
        logits: [b, m, V], at least float32, detached.
    """

    def __init__(
        self,
        model: Any,
        residual: torch.Tensor | Sequence[torch.Tensor],
        kinds: Sequence[str],
        *,
        first: int = 0,
        edits: Mapping[int, Sequence[Edit]] | None = None,
        m: int = 1,
    ) -> None:
        self.model, self.kinds, self.first, self._edits = model, list(dict.fromkeys(kinds)), first, edits or {}
        self._entering: list[torch.Tensor] = []
        self._kept: dict[int, Block] = {}
        if isinstance(residual, torch.Tensor):
            hidden = self._there(residual.detach())
        else:  # only the last block is needed now, for its end
            self._entering = list(residual)
            last = self._kept[model.n_layers - 1] = self._block(model.n_layers - 1)
            hidden = last.values[POST].detach()
        self._end = hidden.requires_grad_()
        with torch.enable_grad():
            self._out = widened(_unembedded(model, self._end, m))
        self.logits = self._out.detach()

    def _there(self, hidden: torch.Tensor) -> torch.Tensor:
        """The way up from `hidden`; returns the last residual."""
        kept_from = self.model.n_layers - _kept_blocks(self.model, hidden, self.kinds)
        for layer in range(self.first, self.model.n_layers):
            self._entering.append(hidden)
            block = self._block(layer)
            hidden = block.values[POST].detach()
            if layer >= kept_from:
                self._kept[layer] = block
            del block
        return hidden

    def ending(self, back: torch.Tensor) -> torch.Tensor:
        """Gradients [k, b, p, d] at the last residual, for k gradients `back` [k, b, m, V] at the logits."""
        return torch.stack([torch.autograd.grad(self._out, self._end, one, retain_graph=True)[0] for one in back])

    def back(self, ending: torch.Tensor, *, down_to: int | None = None, drops: bool = False) -> Iterator[Passed]:
        """The blocks from the last one down, each with its gradients; a block's graph is dropped when the next is asked for.

        Args:
            ending: [k, b, p, d], from `ending`.
            down_to: the last block to visit (default: the first of the run).
            drops: give k gradients more for each block that was visited, this one included, which leave out what flows
                through that block and keep the way around it: first the k that leave out nothing, then those
                without the last block, and so on down to those without this one.
        """
        here, k = ending, len(ending)
        last = self.first if down_to is None else down_to
        for layer in range(self.model.n_layers - 1, last - 1, -1):
            block = self._kept.pop(layer, None) or self._block(layer)
            around = here[:k]
            here, grads = block.gradients(here, self.kinds)
            if drops:
                here = torch.cat([here, around])
                grads = {
                    kind: torch.cat([some, around if kind in STREAM else torch.zeros_like(some[:k])])
                    for kind, some in grads.items()
                }
            yield Passed(block, here, grads)
            del block, grads

    def _block(self, layer: int) -> Block:
        return Block(self.model, layer, self._entering[layer - self.first], self.kinds, self._edits.get(layer, ()))


def cotangents(
    metrics: Mapping[str, PatchMetric], group: Group, logits: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """k metrics of a run and their gradients at its logits.

    Args:
        metrics: name -> metric, k of them.
        group: the pairs; its answers and branches.
        logits: per branch [b, m, V].

    Returns:
        (values [k, b], per branch the gradients [k, b, m, V]). A pair's metric depends on no other pair, so the sum
        over pairs has each pair's own gradient in its row.

    Raises:
        UsageError: a metric has no gradient.
    """
    with torch.enable_grad():
        leaves = [some.detach().requires_grad_() for some in logits]
        answers = with_scores(group.answers, score(group.branches, leaves, None))
        values, grads = [], []
        for name, metric in metrics.items():
            value = metric(leaves[0][:, 0], answers)
            if not isinstance(value, torch.Tensor) or value.shape != leaves[0].shape[:1] or not value.requires_grad:
                raise _not_differentiable(name, "what it returned has no gradient, one number an example")
            found = torch.autograd.grad(value.sum(), leaves, allow_unused=True, retain_graph=True)
            grads.append([torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)])
            values.append(value.detach())
    if not all(bool(torch.isfinite(g).all()) for some in grads for g in some):
        raise _not_differentiable(next(iter(metrics)), "its gradient is not finite")
    return torch.stack(values), [torch.stack(some) for some in zip(*grads, strict=True)]


def must_be_differentiable(metrics: Mapping[str, PatchMetric]) -> None:
    """Refuse metrics that say of themselves that gradients mean nothing to them.

    Raises:
        UsageError: naming the first.
    """
    for name, metric in metrics.items():
        if not metric.differentiable:
            raise _not_differentiable(
                name, "it counts or ranks, so it does not change with a small change of the logits"
            )


def _not_differentiable(name: str, why: str) -> UsageError:
    return UsageError(
        f"--metric {name} cannot be approximated by gradients",
        why=why,
        fix="use --metric logit-diff, or --method exact",
    )


def _unembedded(model: Any, end: torch.Tensor, m: int) -> torch.Tensor:
    """Logits [b, m, V] of the last m positions."""
    if m > 1:
        return model.resume(model.n_layers, end)[:, -m:]
    last = torch.full((len(end),), end.shape[1] - 1, device=end.device)
    return model.resume(model.n_layers, end, positions=last)[:, None]


def _kept_blocks(model: Any, residual: torch.Tensor, kinds: Sequence[str]) -> int:
    """How many blocks' graphs may be held at once: norms work in float32, everything else in the model's dtype."""
    b, p, d = residual.shape
    size = residual.element_size()
    block = 16 * d * 4 + 5 * int(getattr(model, "d_mlp", 0) or 4 * d) * size
    if "attn.hook_pattern" in kinds:
        block += 6 * p * int(getattr(model, "n_heads", 0) or d // 64) * size
    return int(_SHARE * free_bytes(model.device)) // (b * p * block)
