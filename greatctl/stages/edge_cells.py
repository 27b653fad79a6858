"""`--site edges`: what one component adds to one input of a later one, by gradients and exactly.

An 8B model has 830 thousand edges. Gradients estimate all of them at once, so they choose which are listed: those
named with --edge, or the strongest and some at random. The exact method runs what is listed; the others run a part of
it, as `approximate` does for cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from ..patching.calibration import to_verify
from ..patching.edge_attribution import edge_scores
from ..patching.edges import EdgeSweep, Step
from ..patching.gradients import must_be_differentiable
from ..patching.graph import Edge, graph
from ..patching.pairs import EncodedPair
from ..patching.runs import ends
from ..patching.sites import Label
from ..patching.units import Units, groups
from ..patching.writes import Sources, edge_group, make_sources
from .approximate import drawn
from .sweeps import Sweeps

__all__ = ["Edges"]

Scores = dict[tuple[int, str], dict[str, np.ndarray]]  # (group, direction) -> metric -> [b, all edges]


class Edges(Sweeps):
    """One run of the stage over edges."""

    def run(self, units: Units) -> pa.Table:
        """Estimate, choose, run; returns all effects, a row an edge and pair (and place)."""
        parts = groups(self.outcome.executed)
        exact = self.config.method == "exact"
        scores: Scores = {}
        if not exact:
            must_be_differentiable(self.metrics)
            scores = self._scores(parts, self.config.method)
        edges = self._listed(parts, scores)
        found: list[pa.Table] = []
        kind = self.config.corruption
        sources = None if kind == "counterpart" else make_sources(self.model, self.outcome.executed, kind)
        verified = {
            d: edges if exact else self._verified(edges, scores, d, at) for at, d in enumerate(self.job.directions)
        }
        self._total = len(parts) * sum(map(len, verified.values()))
        for number, members in enumerate(parts):
            for direction in self.job.directions:
                sweep = self._sweep(members, direction, verified[direction], sources)
                values = self._run(units, number, sweep)
                if not exact:
                    values = self._beside(edges, scores[number, direction], sweep, values)
                found += self._tables(members, sweep, values)
        return pa.concat_tables(found)

    def _scores(self, parts: Sequence[Sequence[EncodedPair]], method: str) -> Scores:
        """Every edge's estimate, of all groups in all directions."""
        found: Scores = {}
        for number, members in enumerate(parts):
            for direction in self.job.directions:
                scores = edge_scores(
                    self.model, members, self.metrics, direction, method=method, steps=self.config.steps
                )
                found[number, direction] = {name: values.float().numpy() for name, values in scores.edges.items()}
                self.ctx.run.stop_here()
        return found

    def _listed(self, parts: Sequence[Sequence[EncodedPair]], scores: Scores) -> list[Edge]:
        """The edges of the table, in the graph's order."""
        known = graph(self.model)
        if self.config.edge:
            return known.select(self.config.edge)
        everyone = list(known.edges)
        if not scores:
            first = next(iter(self.metrics.items()))
            must_be_differentiable(dict([first]))
            scores = self._scores(parts, "attribution")
        total = np.zeros(len(everyone))
        for direction in self.job.directions:
            rows = [
                values[next(iter(self.metrics))][at]
                for (number, way), values in scores.items()
                if way == direction
                for at, pair in enumerate(parts[number])
                if not pair.pair.heldout or all(p.pair.heldout for members in parts for p in members)
            ]
            total += np.abs(np.sum(rows, axis=0, dtype=np.float64))
        others = 0 if self.config.method == "exact" else self.config.verify
        chosen = drawn(total, self.config.top, others, self.config.seed)
        how = "attribution" if self.config.method == "exact" else self.config.method
        at_random = (
            f", and {len(chosen) - self.config.top:,} of the others at random" if len(chosen) > self.config.top else ""
        )
        self._say_chosen(
            len(chosen),
            len(everyone),
            "edges",
            f"the {self.config.top:,} with the largest estimates by {how} of {next(iter(self.metrics))}{at_random}",
            "",
        )
        return [everyone[at] for at in sorted(chosen)]

    def _verified(self, edges: Sequence[Edge], scores: Scores, direction: str, at: int) -> list[Edge]:
        """The edges to run exactly in a direction: the strongest of those listed, and as many others at random."""
        first, columns = next(iter(self.metrics)), self._columns(edges)
        rows = [values[first][:, columns] for (_, way), values in scores.items() if way == direction]
        means = np.concatenate(rows).mean(axis=0, dtype=np.float64)
        top, others = to_verify(means, self.config.verify, seed=self.config.seed + at)
        return [edges[i] for i in sorted((*top, *others))]

    def _columns(self, edges: Sequence[Edge]) -> list[int]:
        """The places of edges among all of the graph."""
        known = graph(self.model)
        starts, total = {}, 0
        for one in known.inputs:
            starts[one] = total
            total += known.reach(one)
        return [starts[edge.receiver] + known.index(edge.sender) for edge in edges]

    def _sweep(
        self, members: Sequence[EncodedPair], direction: str, edges: Sequence[Edge], sources: Sources | None
    ) -> EdgeSweep:
        return EdgeSweep(
            self.model,
            edge_group(self.model, members, sources=sources),
            self.metrics,
            direction,
            positions=self.job.positions,
            edges=edges,
            batch=self.config.batch_cells,
            sources=sources,
            said=self.ctx.run.notice,
        )

    def _run(self, units: Units, number: int, sweep: EdgeSweep) -> list[tuple[Step, dict[str, np.ndarray]]]:
        """Each step with its patched values [b, edges, places], of finished units or anew."""
        found = []
        for step in sweep.steps:
            unit = (number, sweep.direction, f"{step.slot}{step.layer + 2:03d}")
            if unit not in units:
                units.write(unit, {name: table.numpy().ravel() for name, table in sweep.run(step).items()})
            shape = (len(sweep.group.pairs), len(step.edges), len(sweep.plan.places))
            found.append((step, {name: values.reshape(shape) for name, values in units.values(unit).items()}))
            self._progress(len(step.edges))
        return found

    def _beside(
        self,
        edges: Sequence[Edge],
        scores: Mapping[str, np.ndarray],
        sweep: EdgeSweep,
        verified: list[tuple[Step, dict[str, np.ndarray]]],
    ) -> list[tuple[Step, dict[str, np.ndarray]]]:
        """Estimates of all listed edges as steps, with the exact values beside them (`NAME exact`), NaN where not run."""
        base = ends(sweep.direction)[0]
        exact = {
            (name, edge): table[:, at]
            for step, tables in verified
            for name, table in tables.items()
            for at, edge in enumerate(step.edges)
        }
        nothing = np.full((len(sweep.group.pairs), 1), np.nan)
        steps: dict[tuple[str, int], list[Edge]] = {}
        for edge in edges:
            steps.setdefault((edge.receiver.slot, edge.receiver.layer), []).append(edge)
        found = []
        for (slot, layer), some in steps.items():
            columns, tables = self._columns(some), {}
            for name in self.metrics:
                unpatched = sweep.ends[base][name].numpy()[:, None]
                tables[name] = (unpatched + scores[name][:, columns])[:, :, None]
                tables[f"{name} exact"] = np.stack([exact.get((name, edge), nothing) for edge in some], axis=1)
            found.append((Step(slot, layer, tuple(some)), tables))
        return found

    def _tables(
        self,
        members: Sequence[EncodedPair],
        sweep: EdgeSweep,
        values: list[tuple[Step, dict[str, np.ndarray]]],
    ) -> list[pa.Table]:
        made = []
        for step, tables in values:
            layer = step.layer if step.layer >= 0 else int(self.model.n_layers)
            exact = {name: tables[f"{name} exact"] for name in self.metrics if f"{name} exact" in tables}
            labels = [Label(edge=edge.name) for edge in step.edges]
            patched = {name: tables[name] for name in self.metrics}
            made.append(
                self._rows(members, (layer,), sweep.direction, labels, sweep.plan.places, patched, exact or None)
            )
        return made
