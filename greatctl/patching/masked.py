"""A run in which only a chosen set of edges or nodes is the one run, and everything else is the other.

Every input reads its own mixture: from each sender before it either what that sender adds *in this very run* (the edge
is in the set) or what it adds in the other run. A sender's own value follows from its own mixed inputs, layer by
layer, so an effect passes through the set along whole paths and nowhere else. With every edge in the set the run is
the inside run, with none the other one; both are checked when the object is made. This is what the faithfulness of a
circuit is measured with (Conmy et al. 2023, arXiv 2304.14997; Hanna et al. 2024, arXiv 2403.17806).

*Sets of nodes* are the same with all edges out of a node in or out together. All inputs then read one stream, and the
run is a plain one in which the heads and MLPs outside the set are overwritten: it costs what a run costs, at any size.

*Sets of edges* keep, for every sender that has an edge in some set of the batch, the difference between what it adds
here and in the other run: rows x positions x such senders x d_model values in float32. A row of 32 tokens of an 8B
shape needs 0.55 GB for all of its 1057 senders, and a few MB for the dozens that a small circuit has. Batches that do
not fit are halved. What has no edge in a row's set is not computed for that row, so small sets cost less than a run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..errors import StageError
from ..extend.contracts import PatchMetric
from .edge_checks import allowance
from .graph import Edge, Graph, Input, Node, graph
from .halving import Halving, forked_cells
from .metrics import measure
from .runs import CORRUPTED, Edit, Group, ends, reuses_prefix, score, widened, with_scores
from .writes import Senders, Sources, Splittable, senders_of, stream_site

__all__ = ["Kept", "MaskedRuns"]

Kept = Sequence[Node | Edge] | frozenset[Node | Edge] | set[Node | Edge]
_PAIRS = 2  # pairs that the checks use


class MaskedRuns:
    """Masked runs of one group.

    Args:
        model: a frozen model of the lean engine.
        group: of `edge_group`.
        direction: `noising` keeps the clean run inside the set and takes everything else from the corrupted one (what
            faithfulness asks for); `denoising` the other way round.
        sources: what stands outside the set instead of the corrupted run (zero, mean or resample ablation), where the
            group was prepared with them; then `noising` only.
        batch: rows (a set of a pair) that go through the model at once; default as many as fit.
        said: told when a batch has to be halved.

    Raises:
        UsageError: the engine is not lean, or an ablation, which is no run of the model, is to be kept inside.
        StageError: all edges do not give the inside run, or none not the other one; `code` is `self-check`.
    """

    def __init__(
        self,
        model: Splittable,
        group: Group,
        *,
        direction: str = "noising",
        sources: Sources | None = None,
        batch: int | None = None,
        said: Callable[[str], None] = lambda words: None,
    ) -> None:
        self.model, self.group, self.graph = model, group, graph(model)
        self._inside, self._outside = ends(direction)
        self._counterpart = sources is None
        branches = range(len(group.branches))
        self.senders = [senders_of(model, self.graph, group, number, direction, sources) for number in branches]
        self.others = [_streams(senders) for senders in self.senders]
        first = min(pair.first_difference for pair in group.pairs) if self._counterpart and group.aligned else 0
        last = len(group.pairs[0].clean_ids) - 1
        self._start = min(first, last) if reuses_prefix(model) else 0
        streams = model.n_heads + 2 * model.n_kv_heads
        most = batch or forked_cells(model, self.senders[0].length - self._start, streams)
        self._halving = Halving(most, model.device, said)
        self._check()

    @torch.no_grad()
    def logits(self, sets: Sequence[Kept]) -> torch.Tensor:
        """Logits at the answer position, [n, b, V] in at least float32, of n sets of nodes or edges.

        A node in a set stands for all edges out of it.

        Raises:
            UsageError: a node or edge is not of this model.
            ResourceError: not even one row fits into memory.
        """
        found: list[torch.Tensor] = []
        self._each(sets, lambda rows, logits: found.append(logits[0][:, 0]))
        return torch.cat(found).unflatten(0, (len(sets), -1))

    @torch.no_grad()
    def effects(self, sets: Sequence[Kept], metrics: Mapping[str, PatchMetric]) -> dict[str, torch.Tensor]:
        """metric -> value of each set's run of each pair [n, b], float64 on the CPU; raises as `logits`, and a
        PluginError where a metric broke its contract."""
        found: dict[str, list[torch.Tensor]] = {name: [] for name in metrics}

        def take(rows: torch.Tensor, logits: list[torch.Tensor]) -> None:
            answers = with_scores(self.group.answers.rows(rows), score(self.group.branches, logits, rows))
            for name, metric in metrics.items():
                found[name].append(measure(name, metric, logits[0][:, 0], answers))

        self._each(sets, take)
        return {name: torch.cat(values).unflatten(0, (len(sets), -1)) for name, values in found.items()}

    def ends(self, metrics: Mapping[str, PatchMetric]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """metric -> value [b] of the (inside, outside) run: the 1 and the 0 of faithfulness. The outside of an
        ablation is the run with nothing kept."""
        found = []
        for run in (self._inside, self._outside):
            if run == self._outside and not self._counterpart:
                found.append({name: values[0] for name, values in self.effects([()], metrics).items()})
                continue
            answers, logits = self.group.end_answers(run), self.group.logits[run]
            found.append({name: measure(name, metric, logits, answers) for name, metric in metrics.items()})
        return found[0], found[1]

    def _each(self, sets: Sequence[Kept], take: Callable[[torch.Tensor, list[torch.Tensor]], None]) -> None:
        """Hand over the rows (set by set, each of all pairs) with their logits [n, m, V] of every branch."""
        nodes = [_only_nodes(kept, self.graph) for kept in sets]
        simple = all(some is not None for some in nodes)
        ready = [] if simple else [_by_input(kept, self.graph) for kept in sets]
        b = len(self.group.pairs)

        def work(begin: int, end: int) -> None:
            which = [at // b for at in range(begin, end)]
            rows = torch.tensor([at % b for at in range(begin, end)], device=self.model.device)
            logits = []
            for number in range(len(self.group.branches)):
                if simple:
                    edits = self._overwriting([nodes[at] or frozenset() for at in which], number, rows)
                    logits.append(self._run(number, rows, edits))
                else:
                    logits.append(self._mixed(number, rows, ready, which))
            take(rows, logits)

        self._halving.each(len(sets) * b, work)

    def _run(self, number: int, rows: torch.Tensor, edits: Sequence[Edit]) -> torch.Tensor:
        """Logits [n, m, V] of the inside run's rows under edits."""
        branch, start = self.group.branches[number], self._start
        entering = self.senders[number].base.embed[rows, start:]
        length, m = self.senders[number].length, branch.m
        more: dict[str, Any] = {"positions": None}
        if m == 1:
            more["positions"] = torch.full((len(rows),), length - 1, device=rows.device)
        if start:
            assert branch.pasts is not None
            more |= {"start": start, "past": branch.pasts[self._inside].rows(rows)}
        logits = self.model.resume(0, entering, edits, **more)
        return widened(logits[:, None] if m == 1 else logits[:, -m:])

    def _mixed(
        self, number: int, rows: torch.Tensor, sets: Sequence[Mapping[Input, list[int]]], which: Sequence[int]
    ) -> torch.Tensor:
        """Logits [n, m, V] of rows, each with the edges of its set."""
        branch = self.group.branches[number]
        past = branch.pasts[self._inside] if branch.pasts is not None else None
        end = _Mixing(self, number, rows, sets, which, self._start).end(past, branch.m)
        return widened(self.model.resume(self.model.n_layers, end))

    def _overwriting(self, kept: Sequence[frozenset[Node]], number: int, rows: torch.Tensor) -> list[Edit]:
        """Edits that overwrite what nodes outside each row's set add."""
        other, start, model = self.senders[number].other, self._start, self.model

        def edit(site: str, values: torch.Tensor, nodes: Sequence[Node]) -> Edit:
            inside = torch.tensor([[node in some for node in nodes] for some in kept], device=rows.device)
            shape = (len(rows), 1, *([len(nodes)] if values.ndim == 4 else []), 1)
            mask = inside.reshape(shape)
            return Edit(site, lambda value: torch.where(mask, value, values[rows, start:].to(value.dtype)))

        edits = [edit("blocks.0.hook_resid_pre", other.embed, [self.graph.senders[0]])]
        for layer in range(model.n_layers):
            *heads, mlp = self.graph.block(layer)
            edits.append(edit(f"blocks.{layer}.attn.hook_z", other.z[layer], heads))
            edits.append(edit(f"blocks.{layer}.hook_mlp_out", other.mlp[layer], [mlp]))
        return edits

    @torch.no_grad()
    def _check(self) -> None:
        """All edges are the inside run, none the other run, on a few pairs and over edges."""
        everything = {one: list(range(self.graph.reach(one))) for one in self.graph.inputs}
        for kept, run in ((everything, self._inside), ({}, self._outside)):
            if run == self._inside or (self._counterpart and self.group.aligned):
                n = min(len(self.group.pairs), _PAIRS)
                self._halving.each(n, lambda begin, end, kept=kept, run=run: self._agree(kept, run, begin, end))

    def _agree(self, kept: Mapping[Input, list[int]], run: int, begin: int, end: int) -> None:
        """Some pairs' masked runs with these edges kept are those of a plain run."""
        rows = torch.arange(begin, end, device=self.model.device)
        ours = self._mixed(0, rows, [kept], [0] * len(rows))[:, 0]
        expected = self.group.logits[run][begin:end]
        off, allowed = float((ours - expected).abs().max()), allowance(self.model, self.group, run)
        if not off <= allowed:
            what, which = "all edges" if kept else "no edge", "corrupted" if run == CORRUPTED else "clean"
            raise StageError(
                "the self-check of the masked run failed",
                why=f"with {what} kept its logits are {off:.2e} off the {which} run's, allowed are {allowed:.1e}",
                fix="this model's circuits cannot be tested; please report its name",
                code="self-check",
            )


class _Mixing:
    """One batch of rows with sets of edges; `differences` fills as it goes up the model.

    A block's heads, and its MLP, run for those rows alone whose set keeps an edge out of them: nobody reads the others.

    Args:
        runs: the masked runs.
        number: the branch.
        rows: pair of each row [n].
        sets: input -> indices of the senders that are kept, in order.
        which: the set of each row [n].
        start: the first position computed.
    """

    def __init__(
        self,
        runs: MaskedRuns,
        number: int,
        rows: torch.Tensor,
        sets: Sequence[Mapping[Input, list[int]]],
        which: Sequence[int],
        start: int,
    ) -> None:
        self._model, self._graph, self._rows, self._start = runs.model, runs.graph, rows, start
        self._senders, self._other = runs.senders[number], runs.others[number]
        here = sorted(set(which))
        self._sets = [sets[at] for at in here]
        self._which = torch.tensor([here.index(at) for at in which])
        self._used = [{at for senders in some.values() for at in senders} for some in self._sets]
        used = sorted(set().union(*self._used))
        self._column = {at: column for column, at in enumerate(used)}
        positions = self._senders.length - start
        wide = next(iter(self._other.values())).dtype
        size = (len(rows), len(used), positions, self._senders.base.embed.shape[-1])
        self._differences = torch.zeros(size, dtype=wide, device=rows.device)

    def end(self, past: Any, m: int) -> torch.Tensor:
        """What the unembedding reads at the last m positions, [n, m, d_model].

        Args:
            past: keys and values of the positions before the first computed one, for all pairs.
            m: how many.
        """
        senders, every = self._senders, torch.arange(len(self._rows), device=self._rows.device)
        if 0 in self._column:
            self._keep(0, every, senders.base.embed[self._rows, self._start :], senders.other.embed)
        for layer in range(self._graph.n_layers):
            *inputs, mlp = self._graph.inputs_of(layer)
            self._heads(layer, inputs, past)
            at = self._graph.index(Node("mlp", layer))
            some = self._using([at])
            if len(some):
                self._keep(
                    at, some, self._model.mlp_values(layer, self._mixed([mlp], some)[:, :, 0]), senders.other.mlp[layer]
                )
        return self._mixed([self._graph.inputs[-1]], every, m)[:, :, 0]

    def _using(self, senders: Sequence[int]) -> torch.Tensor:
        """The rows [r] whose sets keep an edge out of any of some senders."""
        those = torch.tensor([not used.isdisjoint(senders) for used in self._used])
        return those[self._which].nonzero()[:, 0].to(self._rows.device)

    def _of_set(self, some: torch.Tensor) -> list[torch.Tensor]:
        """The rows `some` [r] of each set; they stand in the order of the sets."""
        which = self._which[some.cpu()]
        return [some[(which == number).to(some.device)] for number in range(len(self._sets))]

    def _heads(self, layer: int, inputs: Sequence[Input], past: Any) -> None:
        first = self._graph.index(Node("head", layer, 0))
        heads = [head for head in range(self._graph.n_heads) if first + head in self._column]
        some = self._using([first + head for head in heads])
        if not len(some):
            return
        read = {one for head in heads for one in self._graph.inputs_to(Node("head", layer, head))}
        q, k, v = (self._mixed([one for one in inputs if one.slot == slot and one in read], some) for slot in "qkv")
        before = past.rows(self._rows[some]) if self._start else None
        z = self._model.head_values(layer, (q, k, v), heads, start=self._start, past=before)
        change = (
            z.to(self._differences.dtype) - self._senders.other.z[layer][self._rows[some], self._start :][:, :, heads]
        )
        column = self._column[first + heads[0]]
        added = self._model.head_outputs(layer, change, heads).transpose(1, 2)
        self._differences[some, column : column + len(heads)] = added

    def _mixed(self, inputs: Sequence[Input], some: torch.Tensor, m: int = 0) -> torch.Tensor:
        """What inputs of one kind read in the rows `some` [r]: the other run's stream and the kept senders' differences,
        [r, q, inputs, d_model], of the last m positions only where m is not 0."""
        other = self._other[stream_site(inputs[0], self._graph)][self._rows[some], self._start :][:, -m:]
        read = other.unsqueeze(1).repeat(1, len(inputs), 1, 1)
        at = 0
        for rows, kept in zip(self._of_set(some), self._sets, strict=True):
            here = slice(at, at + len(rows))
            at += len(rows)
            keeps = [kept.get(one, ()) for one in inputs]
            columns = sorted({self._column[sender] for senders in keeps for sender in senders})
            if not len(rows) or not columns:
                continue
            weights = torch.zeros(len(inputs), len(columns), dtype=other.dtype)
            for number, senders in enumerate(keeps):
                weights[number, [columns.index(self._column[sender]) for sender in senders]] = 1
            those = rows[:, None], torch.tensor(columns, device=rows.device)
            change = self._differences[those][:, :, -m:].flatten(2)
            read[here] += (weights.to(change.device) @ change).unflatten(2, other.shape[1:])
        return read.transpose(1, 2)

    def _keep(self, sender: int, some: torch.Tensor, value: torch.Tensor, other: torch.Tensor) -> None:
        wide, there = self._differences.dtype, self._rows[some]
        self._differences[some, self._column[sender]] = value.to(wide) - other[there, self._start :].to(wide)


def _streams(senders: Senders) -> dict[str, torch.Tensor]:
    """Each place of the other run's stream [b, p, d_model], in at least float32."""
    return {site: senders.streams[site] + total for site, total in senders.totals().items()}


def _by_input(kept: Kept, graph: Graph) -> dict[Input, list[int]]:
    """input -> indices of the senders that are kept."""
    found: dict[Input, set[int]] = {}
    for one in set(kept):
        checked = graph.edge(one.name) if isinstance(one, Edge) else graph.node(one.name)
        if isinstance(checked, Edge):
            found.setdefault(checked.receiver, set()).add(graph.index(checked.sender))
        elif checked.kind != "logits":
            at = graph.index(checked)
            for receiver in graph.inputs:
                if at < graph.reach(receiver):
                    found.setdefault(receiver, set()).add(at)
    return {receiver: sorted(senders) for receiver, senders in found.items()}


def _only_nodes(kept: Kept, graph: Graph) -> frozenset[Node] | None:
    """The set where it is of nodes alone, else None."""
    nodes = frozenset(graph.node(one.name) for one in kept if isinstance(one, Node))
    return nodes if len(nodes) == len(set(kept)) else None
