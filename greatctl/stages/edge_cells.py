"""`--site edges`: what one component adds to one input of a later one, by gradients and exactly.

An 8B model has 830 thousand edges. Gradients estimate all of them at once, so they choose which are listed: those
named with --edge, or the strongest and some at random. The exact method runs what is listed; the others run a part of
it, as `approximate` does for cells. Whether an edge is patched at all positions together or at each (or each marked
span) by itself, both do alike; edges are chosen by what they do at all positions, whatever is tabulated of them.

The choice and the estimates are on disk before any edge is run, so that a run that goes on after an interruption
speaks of the same edges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..patching.calibration import to_verify
from ..patching.cells import Place, places_of
from ..patching.edge_attribution import edge_scores
from ..patching.edges import EdgeSweep
from ..patching.gradients import must_be_differentiable
from ..patching.graph import Edge, graph
from ..patching.halving import forked_cells
from ..patching.pairs import EncodedPair
from ..patching.sites import Label
from ..patching.units import Units, groups
from ..patching.writes import Sources, edge_group, make_sources
from .approximate import drawn, place_name
from .sweeps import Sweeps

__all__ = ["Edges"]

Cubes = dict[str, NDArray[np.float64]]  # metric -> [b, edges, places]
Cells = set[tuple[int, object]]  # (number of an edge, name of a place)


class Part(NamedTuple):
    """One group in one direction, and its estimated effects (none where the method is exact)."""

    number: int
    members: Sequence[EncodedPair]
    direction: str
    places: Sequence[Place]
    effects: Cubes


class Edges(Sweeps):
    """One run of the stage over edges."""

    def run(self, units: Units) -> pa.Table:
        """Estimate, choose, run; returns all effects, a row an edge, place and pair."""
        parts = groups(self.outcome.executed)
        self._batch = units.fixed(batch_cells=self.config.batch_cells or self._fitting())["batch_cells"]
        self._ranked: dict[tuple[int, str], Cubes] = {}
        edges = self._listed(parts, units)
        kind = self.config.corruption
        sources = None if kind == "counterpart" else make_sources(self.model, self.outcome.executed, kind)
        self._total = len(parts) * len(self.job.directions)
        if self.config.method == "exact":
            self._total *= len(edges)
            return pa.concat_tables(
                self._table(part, edges, self._patched(units, part, edges, sources))
                for direction in self.job.directions
                for part in self._parts(parts, direction)
            )
        must_be_differentiable(self.metrics)
        found = []
        for at, direction in enumerate(self.job.directions):
            done = [self._estimated(units, part, edges) for part in self._parts(parts, direction)]
            cells = self._verified(done, self.config.seed + at)
            for part in done:
                exact = self._patched(units, part, edges, sources, cells)
                base = self._unpatched(part)
                patched = {name: base[name][:, None, None] + effects for name, effects in part.effects.items()}
                found.append(self._table(part, edges, patched, exact))
        return pa.concat_tables(found)

    def _fitting(self) -> int:
        """Tasks that fit into memory."""
        pairs = self.outcome.executed
        longest = max(max(len(pair.clean_ids), len(pair.corrupted_ids)) for pair in pairs)
        several = max(len(ids) for pair in pairs for ids in (*pair.answers, *pair.wrong_answers))
        return forked_cells(self.model, longest + several - 1, self.model.n_heads)

    def _parts(self, parts: Sequence[Sequence[EncodedPair]], direction: str) -> list[Part]:
        return [
            Part(number, members, direction, places_of(members, self.job.positions), {})
            for number, members in enumerate(parts)
        ]

    def _listed(self, parts: Sequence[Sequence[EncodedPair]], units: Units) -> list[Edge]:
        """The edges of the table, in the graph's order: named, or chosen once and for all."""
        known = graph(self.model)
        if self.config.edge:
            return known.select(self.config.edge)
        everyone = list(known.edges)
        chosen = units.kept("chosen", lambda: self._choice(parts, len(everyone)))["edge"].astype(int).tolist()
        self._say_chosen(len(chosen), len(everyone), "edges")
        return [everyone[at] for at in chosen]

    def _choice(self, parts: Sequence[Sequence[EncodedPair]], n: int) -> dict[str, Sequence[float] | NDArray]:
        """The places of the chosen edges among all n of the graph, and the estimates that they were chosen by."""
        first, everyone = next(iter(self.metrics)), [pair for members in parts for pair in members]
        held = all(pair.pair.heldout for pair in everyone)
        sizes = np.zeros(n)
        for direction in self.job.directions:
            total = np.zeros(n)
            for number, members in enumerate(parts):
                rows = [held or not pair.pair.heldout for pair in members]
                total += self._ranking(number, members, direction)[first][rows, :, 0].sum(0)
            sizes += np.abs(total)
        others = 0 if self.config.method == "exact" else self.config.verify
        chosen = sorted(drawn(sizes, self.config.top, others, self.config.seed))
        return {"edge": chosen, "estimate": sizes[chosen]}

    def _ranking(self, number: int, members: Sequence[EncodedPair], direction: str) -> Cubes:
        """The estimates of every edge at all positions of a group; by attribution where the method is exact."""
        exact = self.config.method == "exact"
        metrics = dict(list(self.metrics.items())[: 1 if exact else None])
        must_be_differentiable(metrics)
        method = "attribution" if exact else self.config.method
        scores = edge_scores(self.model, members, metrics, direction, method=method, steps=self.config.steps)
        self.ctx.run.stop_here()
        found = {name: values.double().numpy() for name, values in scores.edges.items()}
        if not exact and self.job.positions == "all":  # these are the table's, too
            self._ranked[number, direction] = found
        return found

    def _how(self, n: int) -> tuple[str, str]:
        method = "attribution" if self.config.method == "exact" else self.config.method
        more = f", and {n - self.config.top:,} of the others at random" if n > self.config.top else ""
        best = f"the {self.config.top:,} with the largest estimates by {method} of {next(iter(self.metrics))}"
        return best + more, ""

    def _estimated(self, units: Units, part: Part, edges: Sequence[Edge]) -> Part:
        """With the estimates of its edges at its places, of a finished unit or anew."""
        unit = (part.number, part.direction, "estimates")
        if unit not in units:
            ready = self._ranked.get((part.number, part.direction))
            if ready is None:
                scores = edge_scores(
                    self.model,
                    part.members,
                    self.metrics,
                    part.direction,
                    method=self.config.method,
                    steps=self.config.steps,
                    positions=self.job.positions,
                    edges=edges,
                )
                effects = {name: values.double().numpy() for name, values in scores.edges.items()}
            else:
                columns = self._columns(edges)
                effects = {name: values[:, columns] for name, values in ready.items()}
            units.write(unit, {name: values.ravel() for name, values in effects.items()})
        self._progress(1)
        shape = (len(part.members), len(edges), len(part.places))
        return part._replace(effects={name: flat.reshape(shape) for name, flat in units.values(unit).items()})

    def _columns(self, edges: Sequence[Edge]) -> list[int]:
        """The places of edges among all of the graph."""
        known = graph(self.model)
        starts, total = {}, 0
        for one in known.inputs:
            starts[one] = total
            total += known.reach(one)
        return [starts[edge.receiver] + known.index(edge.sender) for edge in edges]

    def _verified(self, done: Sequence[Part], seed: int) -> Cells:
        """The cells to run exactly: the strongest by the first metric, and as many others at random."""
        first = next(iter(self.metrics))
        sums: dict[tuple[int, object], list[float]] = {}
        for part in done:
            effects = part.effects[first]
            total, count = np.nansum(effects, axis=0), (~np.isnan(effects)).sum(axis=0)
            for w, place in enumerate(part.places):
                name = place_name(place, part.members)
                for at in range(len(total)):
                    entry = sums.setdefault((at, name), [0.0, 0.0])
                    entry[0] += float(total[at, w])
                    entry[1] += float(count[at, w])
        keys = sorted(sums, key=str)
        means = np.array([sums[key][0] / sums[key][1] if sums[key][1] else np.nan for key in keys])
        top, others = to_verify(means, self.config.verify, seed=seed)
        return {keys[at] for at in (*top, *others)}

    def _patched(
        self, units: Units, part: Part, edges: Sequence[Edge], sources: Sources | None, cells: Cells | None = None
    ) -> Cubes:
        """The exact patched values of a part; NaN where a pair has no such place, or outside of `cells`."""
        found = {name: np.full((len(part.members), len(edges), len(part.places)), np.nan) for name in self.metrics}
        only: dict[Edge, NDArray[np.bool_]] = {}
        for at, edge in enumerate(edges):
            row = np.array([cells is None or (at, place_name(p, part.members)) in cells for p in part.places])
            if row.any():
                only[edge] = row
        if not only:
            return found
        sweep = EdgeSweep(
            self.model,
            edge_group(self.model, part.members, sources=sources),
            self.metrics,
            part.direction,
            positions=self.job.positions,
            edges=list(only),
            batch=self._batch,
            sources=sources,
            said=self.ctx.run.notice,
        )
        column = {edge: at for at, edge in enumerate(edges)}
        for step in sweep.steps:
            unit = (part.number, part.direction, f"{step.slot}{step.layer + 2:03d}")
            if unit not in units:
                ran = sweep.run(step, None if cells is None else np.stack([only[edge] for edge in step.edges]))
                units.write(unit, {name: table.numpy().ravel() for name, table in ran.items()})
            for name, values in units.values(unit).items():
                shape = (len(part.members), len(step.edges), len(part.places))
                found[name][:, [column[edge] for edge in step.edges]] = values.reshape(shape)
            if cells is None:
                self._progress(len(step.edges))
            self.ctx.run.stop_here()
        return found

    def _unpatched(self, part: Part) -> Cubes:
        """metric -> [b] of the run that is patched."""
        at = 1 if part.direction == "denoising" else 0
        ids = [pair.pair.id for pair in part.members]
        return {name: np.array([self.outcome.ends[name][id][at] for id in ids]) for name in self.metrics}

    def _table(self, part: Part, edges: Sequence[Edge], patched: Cubes, exact: Mapping | None = None) -> pa.Table:
        """The rows of a part, layer by layer of what the edges enter (the logits' is behind the last)."""
        layers: dict[int, list[int]] = {}
        for at, edge in enumerate(edges):
            layer = edge.receiver.layer if edge.receiver.layer >= 0 else int(self.model.n_layers)
            layers.setdefault(layer, []).append(at)
        made = []
        for layer, some in layers.items():
            labels = [Label(edge=edges[at].name) for at in some]
            numbers = {name: values[:, some] for name, values in patched.items()}
            known = None if exact is None else {name: values[:, some] for name, values in exact.items()}
            made.append(self._rows(part.members, (layer,), part.direction, labels, part.places, numbers, known))
        return pa.concat_tables(made)
