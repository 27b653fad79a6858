"""Edges, exactly: what one sender adds to one input, taken from the other run.

*Which paths are frozen.* In the patched run, the input of one projection (the q of a head, the k or v of a key-value
head, what the MLP or the unembedding reads) is computed anew as

    the stream that it reads + (what the sender adds in the other run - what it adds in this run)

before the norm, which is applied to the sum. Everything between the sender and that input keeps the patched run's
value, so only the direct path counts: the effect through other heads and MLPs in between is theirs. So do all other
projections that read the same stream, those of the same head included, and the skip connection. Everything behind the
receiver then runs on. This is path patching with one edge (Goldowsky-Dill et al. 2023, arXiv 2304.05969), and what
edge attribution patching approximates (Syed et al. 2023, arXiv 2310.10348). A k or v input belongs to a key-value head
and moves its whole query group.

Nothing before the receiver has to be computed again, so a batch holds many edges into the same kind of input of one
layer, from many senders, resumes at that layer and behind the prefix that no task of it changes. An edge whose sender
does not differ, or whose input nobody reads any more, is the unpatched run by definition and is not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..extend.contracts import PatchMetric
from .cells import Place, Plan, plan_of
from .edge_checks import allowance, check_step
from .graph import Edge, Input, graph
from .halving import Halving, forked_cells
from .metrics import measure
from .runs import Edit, Group, ends, reuses_prefix, score, widened, with_scores
from .writes import Senders, Sources, Splittable, senders_of, stream_site

__all__ = ["EdgeEffects", "EdgeSweep", "Step", "edge_effects"]

_NEVER = 1 << 30  # a position that no prompt has


class Step(NamedTuple):
    """Edges into the inputs of one kind of one layer, which share their batches."""

    slot: str
    layer: int
    edges: tuple[Edge, ...]

    @property
    def site(self) -> str | None:
        """Where the inputs are edited; None for the logits, whose input is the end of the stream."""
        if self.slot == "logits":
            return None
        return f"blocks.{self.layer}.hook_{'mlp_in' if self.slot == 'mlp' else self.slot + '_input'}"


class Tasks(NamedTuple):
    """Edges of a step at a place of a pair: three columns [n], and the first position that each changes."""

    edges: torch.Tensor
    places: torch.Tensor
    rows: torch.Tensor
    first: torch.Tensor

    def part(self, begin: int, end: int) -> Tasks:
        """Some of them."""
        return Tasks(*(column[begin:end] for column in self))


@dataclass(frozen=True)
class EdgeEffects:
    """What patching each edge gives.

    Attributes:
        edges: n edges, in the graph's order.
        places: where along the prompt.
        values: metric -> value of the patched run [b, n, places], float64 on the CPU; NaN where a pair has no such
            place.
        clean, corrupted: metric -> value of the unpatched runs [b].
    """

    edges: Sequence[Edge]
    places: Sequence[Place]
    values: Mapping[str, torch.Tensor]
    clean: Mapping[str, torch.Tensor]
    corrupted: Mapping[str, torch.Tensor]

    def normalised(self, metric: str) -> torch.Tensor:
        """[b, n, places]: 0 at the corrupted and 1 at the clean run, in either direction."""
        clean, corrupted = (ends[metric][:, None, None] for ends in (self.clean, self.corrupted))
        return (self.values[metric] - corrupted) / (clean - corrupted)


class EdgeSweep:
    """One group in one direction; `steps` may be run one by one, in any order.

    Args:
        model: a frozen model of the lean engine.
        group: of `edge_group`.
        metrics: name -> metric.
        direction: `denoising` or `noising`.
        positions: `each`, `spans`, or `all` for an edge at all positions at once.
        edges: default all edges of the graph.
        batch: tasks that go through the model at once; default as many as fit.
        sources: what replaces the corrupted run's values, where the group was prepared with them.
        said: told when a batch has to be halved.
    """

    def __init__(
        self,
        model: Splittable,
        group: Group,
        metrics: Mapping[str, PatchMetric],
        direction: str,
        *,
        positions: str = "all",
        edges: Sequence[Edge] | None = None,
        batch: int | None = None,
        sources: Sources | None = None,
        said: Callable[[str], None] = lambda words: None,
    ) -> None:
        self.model, self.group, self.direction, self.metrics = model, group, direction, metrics
        self.graph = graph(model)
        self.prefix = reuses_prefix(model)
        chosen = self.graph.edges if edges is None else self.graph.select(edge.name for edge in edges)
        self.steps = _steps(chosen)
        self.plan: Plan = plan_of(group, direction, positions)
        self.senders: list[Senders] = [
            senders_of(model, self.graph, group, number, direction, sources) for number in range(len(group.branches))
        ]
        self.ablated = sources is not None
        most = batch or forked_cells(model, self.senders[0].length, model.n_heads)
        self._halving = Halving(most, model.device, said)
        self._moves = [senders.moves() for senders in self.senders]
        self._totals: dict[int, dict[str, torch.Tensor]] = {}
        self.allowed = allowance(model, group, ends(direction)[0])
        self.ends = [self._unpatched(run) for run in (0, 1)]

    @torch.no_grad()
    def run(self, step: Step, only: NDArray[np.bool_] | None = None) -> dict[str, torch.Tensor]:
        """metric -> value of the patched run [b, edges, places], float64 on the CPU, after the step's self-checks.

        Args:
            step: one of `steps`.
            only: [edges, places] the cells to run, default all; the others are NaN.

        Raises:
            StageError: a self-check failed; names the input.
            PluginError: a metric broke its contract.
            ResourceError: not even one task fits into memory.
        """
        tasks, base = self.tasks(step), ends(self.direction)[0]
        exists = self.plan.exists.T[:, None]
        if only is not None:
            wanted = torch.from_numpy(only)
            tasks = Tasks(*(column[wanted[tasks.edges, tasks.places]] for column in tasks))
            exists = exists & wanted
        self._halving.each(1, lambda begin, end: check_step(self, step, tasks))
        exists = exists.expand(-1, len(step.edges), -1)
        table = {name: torch.where(exists, value[:, None, None], torch.nan) for name, value in self.ends[base].items()}

        def work(begin: int, end: int) -> None:
            some = tasks.part(begin, end)
            for name, values in self._measured(step, some).items():
                table[name][some.rows, some.edges, some.places] = values

        self._halving.each(len(tasks.rows), work)
        return table

    def tasks(self, step: Step) -> Tasks:
        """What has to be computed, ordered by the first position that changes."""
        found: torch.Tensor | None = None
        nodes = list(dict.fromkeys(edge.sender for edge in step.edges))
        for number, moves in enumerate(self._moves):
            mask = self.plan.masks[number] & self._read(step, number)
            here = moves[:, :, [self.graph.index(node) for node in nodes]].permute(2, 0, 1)[:, None] & mask[None]
            first = torch.where(here.any(-1), here.int().argmax(-1), _NEVER).cpu()  # [senders, places, b]
            found = first if found is None else torch.minimum(found, first)
        assert found is not None
        column = torch.tensor([nodes.index(edge.sender) for edge in step.edges])
        first = found[column]
        edges, places, rows = (first < _NEVER).nonzero(as_tuple=True)
        firsts = first[edges, places, rows]
        order = firsts.argsort(stable=True)
        return Tasks(edges[order], places[order], rows[order], firsts[order])

    def logits(self, step: Step, tasks: Tasks, *, plain: bool = False) -> list[torch.Tensor]:
        """Per branch the logits [n, m, V] of some tasks; with `plain` from whole forwards of the tokens."""
        nodes = [step.edges[at].sender for at in tasks.edges.tolist()]
        heads = torch.tensor([step.edges[at].receiver.head for at in tasks.edges.tolist()])
        start = int(tasks.first.min()) if self.prefix and not plain and step.site else 0
        found = []
        for number, senders in enumerate(self.senders):
            rows, places = tasks.rows.to(self.model.device), tasks.places.to(self.model.device)
            mask = self.plan.masks[number][places, rows][:, start:, None]
            change = senders.change(nodes, rows, start) * mask
            found.append(self.changed(step, number, rows, heads.to(rows.device), change, start, plain=plain))
        return found

    def changed(
        self,
        step: Step,
        number: int,
        rows: torch.Tensor,
        heads: torch.Tensor,
        change: torch.Tensor,
        start: int = 0,
        *,
        plain: bool = False,
    ) -> torch.Tensor:
        """Logits [n, m, V] of the patched run's `rows`, with `change` [n, p - start, d_model] added to what the inputs
        `heads` [n] of a step read, from position `start` on."""
        branch, (base, _) = self.group.branches[number], ends(self.direction)
        stream = self.senders[number].stream(step.edges[0].receiver)
        tokens, m = branch.tokens[base][rows], branch.m
        site = step.site
        if site is None and not plain:
            return widened(self.model.resume(self.model.n_layers, (stream[rows] + change)[:, -m:]))
        edit = Edit(site or stream_site(step.edges[0].receiver, self.graph), _adding(change, heads))
        more: dict[str, Any] = {"positions": torch.full((len(rows),), tokens.shape[1] - 1, device=tokens.device)}
        if m > 1:
            more["positions"] = None
        if plain:
            logits = self.model.run(tokens, [edit], **more)
        else:
            if start:
                assert branch.pasts is not None
                more |= {"start": start, "past": branch.pasts[base].rows(rows)}
            entering = self.senders[number].entering(step.layer)[rows, start:]
            logits = self.model.resume(step.layer, entering, [edit], **more)
        return widened(logits[:, None] if m == 1 else logits[:, -m:])

    def _measured(self, step: Step, tasks: Tasks) -> dict[str, torch.Tensor]:
        logits = self.logits(step, tasks)
        rows = tasks.rows.to(logits[0].device)
        answers = with_scores(self.group.answers.rows(rows), score(self.group.branches, logits, rows))
        return {name: measure(name, metric, logits[0][:, 0], answers) for name, metric in self.metrics.items()}

    def total(self, receiver: Input, n: int) -> torch.Tensor:
        """All that senders add more in the other run to what an input reads, [n, p, d_model] of the first n pairs."""
        if n not in self._totals:
            self._totals[n] = self.senders[0].totals(slice(n))
        return self._totals[n][stream_site(receiver, self.graph)]

    def _read(self, step: Step, number: int) -> torch.Tensor:
        """[p] bool: positions of an input that reach a logit that counts; in the last block only those that have one."""
        length, m = self.senders[number].length, self.group.branches[number].m
        read = torch.ones(length, dtype=torch.bool, device=self.model.device)
        if step.slot == "logits" or (step.layer == self.graph.n_layers - 1 and step.slot in ("q", "mlp")):
            read[: length - m] = False
        return read

    def _unpatched(self, run: int) -> dict[str, torch.Tensor]:
        answers = self.group.end_answers(run)
        return {name: measure(name, metric, self.group.logits[run], answers) for name, metric in self.metrics.items()}


def edge_effects(
    model: Splittable,
    group: Group,
    metrics: Mapping[str, PatchMetric],
    direction: str,
    *,
    positions: str = "all",
    edges: Sequence[Edge] | None = None,
    batch: int | None = None,
    sources: Sources | None = None,
    said: Callable[[str], None] = lambda words: None,
) -> EdgeEffects:
    """Patch every edge of every pair; the arguments are those of `EdgeSweep`, which does it step by step.

    Raises:
        UsageError: an edge is not of this model, or the engine is not lean.
        StageError: a self-check failed; names the input.
        PluginError: a metric broke its contract.
        ResourceError: not even one task fits into memory.
    """
    sweep = EdgeSweep(
        model,
        group,
        metrics,
        direction,
        positions=positions,
        edges=edges,
        batch=batch,
        sources=sources,
        said=said,
    )
    tables = [sweep.run(step) for step in sweep.steps]
    made = [edge for step in sweep.steps for edge in step.edges]
    order = sorted(range(len(made)), key=lambda at: sweep.graph.order(made[at]))
    values = {name: torch.cat([table[name] for table in tables], dim=1)[:, order] for name in metrics}
    return EdgeEffects([made[at] for at in order], sweep.plan.places, values, *sweep.ends)


def _steps(edges: Iterator[Edge] | Sequence[Edge]) -> list[Step]:
    """Edges by the kind and the layer of what they enter, in the graph's order."""
    found: dict[tuple[str, int], list[Edge]] = {}
    for edge in edges:
        found.setdefault((edge.receiver.slot, edge.receiver.layer), []).append(edge)
    return [Step(slot, layer, tuple(some)) for (slot, layer), some in found.items()]


def _adding(change: torch.Tensor, heads: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """An edit that adds change [n, q, d_model] to what each row's head reads, or to the whole where there are no heads."""

    def edit(value: torch.Tensor) -> torch.Tensor:
        if value.ndim == 3:
            return (value + change).to(value.dtype)
        each = torch.arange(len(value), device=value.device)
        edited = value.clone()
        edited[each, :, heads] = (edited[each, :, heads] + change).to(value.dtype)
        return edited

    return edit
