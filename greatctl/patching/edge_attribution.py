"""Attribution of edges (EAP, arXiv 2310.10348; EAP-IG, arXiv 2403.17806): what a sender's change does through one input alone.

The estimate of an edge is the sender's change, as it stands in the stream, times the gradient of the metric at what
one projection reads: each query head has an input, each key-value head one for its keys and one for its values, each
MLP one, the logits one. The receiver's norm is part of the gradient. All senders before a block meet all inputs of
the block in one matrix product, so the 830 thousand edges of an 8B model cost little more than its nodes.

Every input's gradient exists for one block at a time (see `gradients`); what stays are the senders' changes, and pairs
are taken in parts where these would fill the memory. By position a table is as many times larger, so that is asked
for a list of edges. `attribution-qk` computes for edges into queries and keys the attention pattern that the changed
query or key gives, exactly, norm included; only what follows from the pattern is then estimated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..extend.contracts import PatchMetric
from .attribution import PATTERN, Path, between, must_have_direction, path, pattern_of
from .cells import Place, places_of, plan_of
from .gradients import Block, Passed, Tape, cotangents, must_be_differentiable
from .graph import Edge, Graph, Input, graph
from .memory import free_bytes, tokens_at_once
from .pairs import EncodedPair
from .runs import Edit, ends, prepare, widened

__all__ = ["GraphScores", "edge_scores"]

_SHARE = 0.25  # of the free memory, for the senders' changes
_PULLED = 1 << 29  # bytes of input gradients that are made at once
_MLP, _MID = "hook_mlp_out", "hook_resid_mid"
_SLOTS = {"q": "attn.hook_q", "k": "attn.hook_k", "v": "attn.hook_v"}
_KINDS = (*_SLOTS.values(), "attn.hook_z", _MID, _MLP)


@dataclass(frozen=True)
class GraphScores:
    """Estimated effects of patching each sender, and each edge alone.

    Attributes:
        graph: names; `nodes` go with `graph.senders`, in order.
        places: where along the prompt an edge is patched.
        nodes: metric -> [b, senders] on the CPU: the sender patched at all positions, through every way.
        edges: metric -> [b, n, places] on the CPU, NaN where a pair has no such place: the edges that were asked for, in
            their order, or all of `graph.edges`.
    """

    graph: Graph
    places: Sequence[Place]
    nodes: dict[str, torch.Tensor]
    edges: dict[str, torch.Tensor]


def edge_scores(
    model: Any,
    pairs: Sequence[EncodedPair],
    metrics: Mapping[str, PatchMetric],
    direction: str = "denoising",
    *,
    method: str = "attribution",
    steps: int = 5,
    positions: str = "all",
    edges: Sequence[Edge] | None = None,
) -> GraphScores:
    """Estimated effect of every edge, and on the way of every sender.

    Args:
        model: the frozen model, of the lean engine.
        pairs: b pairs of the same two lengths.
        metrics: name -> differentiable metric.
        direction: `denoising` or `noising`.
        method: one of `attribution.METHODS` but `attribution-drop`; `eap-ig-activations` moves one layer's heads, or one
            MLP, at a time.
        steps: points of integrated gradients.
        positions: `each`, `spans`, or `all` for all positions at once; an edge's sender and receiver share a position.
        edges: which are kept, default all.

    Raises:
        UsageError: a metric has no gradient, the method no direction, an edge is not of this model, or the engine is not lean.
    """
    must_be_differentiable(metrics)
    must_have_direction(method)
    places = places_of(pairs, positions)
    size = _together(model, len(pairs[0].clean_ids), len(pairs))
    found = []
    for first in range(0, len(pairs), size):
        work = _Edges(model, pairs[first : first + size], metrics, direction, method, places, edges)
        found.append(work.run(steps))
    both = [
        {name: torch.cat([part[at][number] for part in found]) for number, name in enumerate(metrics)} for at in (0, 1)
    ]
    return GraphScores(graph(model), places, both[0], both[1])


def _together(model: Any, p: int, n: int) -> int:
    """Pairs at once: those whose senders' changes fit into a share of the memory."""
    senders = 1 + model.n_layers * (model.n_heads + 1)
    size = torch.empty(0, dtype=getattr(model, "dtype", torch.float32)).element_size()
    return max(1, min(n, int(_SHARE * free_bytes(model.device)) // (senders * p * model.d_model * size)))


class _Edges:
    """One part of the pairs."""

    def __init__(
        self,
        model: Any,
        pairs: Sequence[EncodedPair],
        metrics: Mapping[str, PatchMetric],
        direction: str,
        method: str,
        places: Sequence[Place],
        edges: Sequence[Edge] | None,
    ) -> None:
        self.model, self.metrics, self.direction, self.method = model, metrics, direction, method
        self.graph = graph(model)
        self.together = [place.span for place in places] == ["all"]
        self.base = ends(direction)[0]
        mlps = [f"blocks.{layer}.{_MLP}" for layer in range(model.n_layers)]
        self.group = prepare(model, pairs, "z", layers=range(model.n_layers), more=mlps)
        self.mask = [mask[0] for mask in plan_of(self.group, direction, "all").masks]
        self.plan = plan_of(self.group, direction, places)
        self.changes = [self._changes(number) for number in range(len(self.group.branches))]
        self.wanted = _columns(self.graph, edges)
        n = sum(len(columns) for _, columns in self.wanted.values())
        kind = {"device": model.device, "dtype": torch.promote_types(self.changes[0].dtype, torch.float32)}
        self.nodes = torch.zeros(len(metrics), len(pairs), len(self.graph.senders), **kind)
        self.edges = torch.zeros(len(metrics), len(pairs), n, len(places), **kind)

    def run(self, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(nodes [k, b, senders], edges [k, b, n, places]) on the CPU."""
        for point in path(self.method, steps):
            for tapes, low, high, first in self._tapes(point):
                _, back = cotangents(self.metrics, self.group, [tape.logits for tape in tapes])
                for number, tape in enumerate(tapes):
                    ending = tape.ending(back[number])
                    self._at_logits(number, ending, low, high, point.weight)
                    for passed in tape.back(ending, down_to=first):
                        self._at_block(number, passed, low, high, point.weight)
        exists = self.plan.exists.T[:, None]
        return self.nodes.cpu(), torch.where(exists, self.edges.cpu(), torch.nan)

    def _tapes(self, point: Path) -> Iterator[tuple[list[Tape], int, int, int]]:
        """The runs of one point of the path, a tape a branch, which senders (low … high - 1) are read off them, and the
        first block that is."""
        numbers, everyone = range(len(self.group.branches)), len(self.graph.senders)
        kinds = [*_KINDS, *([PATTERN] if self.method == "attribution-qk" else [])]
        if self.method == "eap-ig-activations":
            yield [self._between(n, point, kinds) for n in numbers], 0, 1, 0
            for layer in range(self.model.n_layers):
                at = self.graph.index(self.graph.block(layer)[0])
                mlp = at + self.model.n_heads
                for kind, low, high in (("attn.hook_z", at, mlp), (_MLP, mlp, mlp + 1)):
                    yield [self._moved(n, layer, kind, point, kinds) for n in numbers], low, high, layer
        elif self.method == "eap-ig":
            yield [self._between(n, point, kinds) for n in numbers], 0, everyone, 0
        else:
            branches = self.group.branches
            entering = [[branch.residuals[at][self.base] for at in range(self.model.n_layers)] for branch in branches]
            yield [Tape(self.model, e, kinds, m=b.m) for e, b in zip(entering, branches, strict=True)], 0, everyone, 0

    def _between(self, number: int, point: Path, kinds: Sequence[str]) -> Tape:
        residual = between(self.model, self.group, self.direction, number, point.at)
        return Tape(self.model, residual, kinds, m=self.group.branches[number].m)

    def _moved(self, number: int, layer: int, kind: str, point: Path, kinds: Sequence[str]) -> Tape:
        branch = self.group.branches[number]
        step = self._step(number, layer, kind) * point.at

        def move(value: torch.Tensor) -> torch.Tensor:
            return (value + step.to(value.dtype)).detach().requires_grad_()

        edits = {layer: [Edit(f"blocks.{layer}.{kind}", move)]}
        return Tape(self.model, branch.residuals[layer][self.base], kinds, first=layer, edits=edits, m=branch.m)

    def _step(self, number: int, layer: int, kind: str) -> torch.Tensor:
        """Other minus patched run at a site, 0 where there is no counterpart."""
        branch, (base, source) = self.group.branches[number], ends(self.direction)
        name = f"blocks.{layer}.{kind}"
        runs = (
            branch.values[layer]
            if kind == "attn.hook_z"
            else branch.residuals[0]
            if kind == "embed"
            else branch.more[name]
        )
        match = self.group.match(self.direction, number).clamp_min(0)
        new = runs[source][torch.arange(len(match), device=match.device)[:, None], match]
        mask = self.mask[number]
        return torch.where(mask.reshape(*mask.shape, *([1] * (new.ndim - 2))), new - runs[base], 0.0)

    def _changes(self, number: int) -> torch.Tensor:
        """Every sender's change in the stream [b, senders, p, d]."""
        first = self._step(number, 0, "embed")
        b, p, d = first.shape
        made = first.new_empty(b, len(self.graph.senders), p, d)
        made[:, 0] = first
        for layer in range(self.model.n_layers):
            at, n = self.graph.index(self.graph.block(layer)[0]), self.model.n_heads
            made[:, at : at + n] = self.model.head_outputs(layer, self._step(number, layer, "attn.hook_z")).transpose(
                1, 2
            )
            made[:, at + n] = self._step(number, layer, _MLP)
        return made

    def _at_logits(self, number: int, ending: torch.Tensor, low: int, high: int, weight: float) -> None:
        one = self.graph.inputs[-1]
        found = self._products(number, ending[:, :, None], low, high)
        self._put(one, found, low, high, weight)

    def _at_block(self, number: int, passed: Passed, low: int, high: int, weight: float) -> None:
        """The inputs of a block, and its senders as nodes."""
        block, layer = passed.block, passed.block.layer
        own = self.graph.inputs_of(layer)
        self._senders(number, passed, low, high, weight)
        reach = min(high, self.graph.reach(own[-1]))
        if low < reach and own[-1] in self.wanted:
            back = torch.stack([block.pull(_MLP, one[None], to=_MID)[0] for one in passed.grads[_MLP]])
            self._put(own[-1], self._products(number, back[:, :, None], low, reach), low, reach, weight)
        reach = min(high, self.graph.reach(own[0]))
        if low >= reach:
            return
        at = 0
        for slot, kind in _SLOTS.items():
            heads = passed.grads[kind].shape[3]
            here, at = own[at : at + heads], at + heads
            if not any(one in self.wanted for one in here):
                continue
            if self.method == "attribution-qk" and slot != "v":
                found = self._with_exact_patterns(number, passed, here, low, reach)
            else:
                parts = _input_gradients(block, kind, passed.grads[kind])
                found = torch.cat([self._products(number, part, low, reach) for part in parts], dim=2)
            for head, one in enumerate(here):
                self._put(one, found[:, :, head : head + 1], low, reach, weight)

    def _senders(self, number: int, passed: Passed, low: int, high: int, weight: float) -> None:
        """Nodes of a block (and the embedding at the first): change times gradient at the sender itself."""
        layer, n = passed.block.layer, self.model.n_heads
        at = self.graph.index(self.graph.block(layer)[0])
        if layer == 0 and low == 0:
            change = widened(self._step(number, 0, "embed"))
            self.nodes[:, :, 0] += weight * (change * widened(passed.entering)).sum((2, 3))
        if low <= at < high:
            change = widened(self._step(number, layer, "attn.hook_z"))
            self.nodes[:, :, at : at + n] += weight * (change * widened(passed.grads["attn.hook_z"])).sum((2, 4))
        if low <= at + n < high:
            change = widened(self._step(number, layer, _MLP))
            self.nodes[:, :, at + n] += weight * (change * widened(passed.grads[_MLP])).sum((2, 3))

    def _products(self, number: int, back: torch.Tensor, low: int, high: int) -> torch.Tensor:
        """[k, b, R, senders, places] of input gradients [k, b, R, p, d] with senders' changes."""
        change = self.changes[number][:, low:high]
        if self.together:
            return widened(back.flatten(3) @ change.flatten(2).transpose(1, 2))[..., None]
        each = widened(torch.einsum("kbrpd,bspd->kbrsp", back, change))
        return torch.einsum("kbrsp,wbp->kbrsw", each, self.plan.masks[number].to(each.dtype))

    def _put(self, one: Input, found: torch.Tensor, low: int, high: int, weight: float) -> None:
        """Add the scores of one input [k, b, 1, senders low … high - 1, places] where they are wanted."""
        senders, columns = self.wanted.get(one, ((), ()))
        if isinstance(columns, range):  # every sender, in order
            self.edges[:, :, columns[low] : columns[low] + high - low] += weight * found[:, :, 0]
            return
        some = [at for at, sender in enumerate(senders) if low <= sender < high]
        there = [senders[at] - low for at in some]
        self.edges[:, :, [columns[at] for at in some]] += weight * found[:, :, 0, there]

    def _with_exact_patterns(
        self, number: int, passed: Passed, inputs: Sequence[Input], low: int, high: int
    ) -> torch.Tensor:
        """[k, b, inputs, senders, places] of the queries (or keys) of a block: for each sender the patterns that its
        change of all of them gives. Heads do not see each other's queries and keys, so one run serves all of them."""
        block, masks = passed.block, self.plan.masks[number]
        before, grad = block.values[PATTERN].detach(), widened(passed.grads[PATTERN])
        other = "attn.hook_k" if inputs[0].slot == "q" else "attn.hook_q"
        fixed, entering = block.values[other].detach(), block.entering.detach()
        k, b, p = len(grad), *entering.shape[:2]
        found = grad.new_zeros(k, b, len(inputs), high - low, len(masks))
        wanted = sorted({s for one in inputs for s in self.wanted.get(one, ((),))[0] if low <= s < high})
        if not wanted:
            return found
        senders, places = torch.cartesian_prod(torch.tensor(wanted), torch.arange(len(masks))).T
        size = max(1, tokens_at_once(self.model.device) // (b * p))
        for sender, place in zip(senders.split(size), places.split(size), strict=True):
            some = self.changes[number][:, sender].transpose(0, 1) * masks[place][..., None]  # [s, b, p, d]
            s = len(some)
            hold = Edit(f"blocks.{block.layer}.{other}", lambda value, s=s: fixed.repeat(s, 1, 1, 1).to(value.dtype))
            after = pattern_of(self.model, block.layer, (entering + some).flatten(0, 1), [hold]).unflatten(0, (s, b))
            effect = (widened(after - before) * grad[:, None]).sum((-1, -2))  # [k, s, b, query heads]
            effect = effect.unflatten(3, (len(inputs), -1)).sum(4)
            found[:, :, :, sender - low, place] = effect.permute(0, 2, 3, 1)
        return found


def _columns(own: Graph, edges: Sequence[Edge] | None) -> dict[Input, tuple[Sequence[int], Sequence[int]]]:
    """input -> (the senders that are kept, in order; the column of each).

    Raises:
        UsageError: an edge is not of this model.
    """
    found: dict[Input, tuple[Sequence[int], Sequence[int]]] = {}
    if edges is None:
        at = 0
        for one in own.inputs:
            reach = own.reach(one)
            found[one], at = (range(reach), range(at, at + reach)), at + reach
        return found
    alike: dict[Input, list[tuple[int, int]]] = {}
    for column, edge in enumerate(edges):
        known = own.edge(edge.name)
        alike.setdefault(known.receiver, []).append((own.index(known.sender), column))
    for one, some in alike.items():
        senders, columns = zip(*sorted(some), strict=True)
        found[one] = senders, columns
    return found


def _input_gradients(block: Block, kind: str, back: torch.Tensor) -> Iterator[torch.Tensor]:
    """Gradients at what each head's projection reads, [k, b, some heads, p, d] at a time, from those at the projections'
    outputs [k, b, p, heads, d_head]: each head's own, the others' set to 0, through the projection and the norm."""
    k, heads = len(back), back.shape[3]
    size = max(1, _PULLED // (k * block.entering.numel() * 4))
    for first in range(0, heads, size):
        some = torch.arange(first, min(first + size, heads), device=back.device)
        one = torch.zeros(len(some), heads, 1, device=back.device, dtype=back.dtype)
        one[torch.arange(len(some)), some] = 1
        alone = back[:, None] * one[:, None, None]  # [k, heads, b, p, heads, d_head]
        pulled = block.pull(kind, alone.flatten(0, 1))
        yield pulled.unflatten(0, (k, len(some))).transpose(1, 2)
