"""Approximate, then verify: every cell of a sweep by gradients, and some of them exactly.

The estimates of all cells cost a few runs (`patching.attribution`). By them the cells are ranked; the strongest, and
as many others at random, are then patched as the exact sweep patches them, and both values stand side by side in the
tables. The comparison goes into the summary (`patching.calibration`), so that no estimate is shown without what is
known of its error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from ..patching.attribution import DROP, LatentScores, latent_scores, node_scores
from ..patching.calibration import calibrate, to_verify
from ..patching.cells import Batch, Place
from ..patching.checks import check_batch, check_layers
from ..patching.gradients import must_be_differentiable
from ..patching.latents import Latents
from ..patching.pairs import EncodedPair
from ..patching.runs import Group, PatchSite, prepare
from ..patching.sites import Plain
from ..patching.sweep import Sweep
from ..patching.units import Units, groups
from .sweeps import Sweeps

__all__ = ["Approximate", "calibration", "combined", "drawn", "place_name"]

Key = tuple[int, int, object]  # layer, unit, and a position from the end or a span's name
Estimates = dict[str, dict[int, np.ndarray]]  # metric -> layer -> patched value [b, units, places]


class Done(NamedTuple):
    """One group in one direction: its sweep and what gradients say of it."""

    number: int
    sweep: Sweep
    estimates: Estimates


class Approximate(Sweeps):
    """One run of the stage by gradients."""

    def run(self, units: Units) -> pa.Table:
        """Estimate all cells, then run some; returns all effects, a row a cell and pair."""
        must_be_differentiable(self.metrics)
        parts = groups(self.outcome.executed)
        batch = self._fixed(units)["batch_cells"]
        site, by_layer = self._site(parts, units)
        source = self._source(site, list(by_layer))
        self._total = len(parts) * len(self.job.directions)
        found: list[pa.Table] = []
        for at, direction in enumerate(self.job.directions):
            done: list[Done] = []
            for number, members in enumerate(parts):
                group = prepare(self.model, members, site, layers=list(by_layer), source=source)
                sweep = Sweep(
                    self.model, group, direction, self.metrics, self.job.positions, notice=self.ctx.run.notice
                )
                done.append(Done(number, sweep, self._estimated(units, number, sweep, by_layer)))
                self._progress(1)
            self._warn(done)
            chosen = self._chosen(done, by_layer, self.config.seed + at)
            for one in done:
                found += self._verified(units, one, by_layer, chosen, batch)
        return pa.concat_tables(found)

    def _estimated(self, units: Units, number: int, sweep: Sweep, by_layer: Mapping[int, Sequence[int]]) -> Estimates:
        """Patched values as gradients estimate them, of a finished unit or anew."""
        unit = (number, sweep.direction, "estimates")
        shapes = {
            layer: (len(sweep.group.pairs), len(own), len(sweep.plan.places)) for layer, own in sorted(by_layer.items())
        }
        if unit not in units:
            scores = self._scores(sweep.group, sweep.direction, sweep)
            flat: dict[str, np.ndarray] = {}
            for name, layers in scores.items():
                base = sweep.unpatched[name][:, None, None]
                kept = [
                    base + layers[at][:, self._columns(sweep.group.site, own)] for at, own in sorted(by_layer.items())
                ]
                flat[name] = torch.cat([values.flatten() for values in kept]).numpy()
            units.write(unit, flat)
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])[:-1]
        return {
            name: {at: part.reshape(shapes[at]) for at, part in zip(shapes, np.split(values, ends), strict=True)}
            for name, values in units.values(unit).items()
        }

    def _scores(self, group: Group, direction: str, sweep: Sweep | None = None) -> dict[str, dict[int, torch.Tensor]]:
        return node_scores(
            self.model,
            group,
            self.metrics,
            direction,
            method=self.config.method,
            steps=self.config.steps,
            plan=sweep.plan if sweep else None,
        )

    @staticmethod
    def _columns(site: PatchSite, own: Sequence[int]) -> Sequence[int] | slice:
        """Which units of the scores are listed; of a layer's neurons only some."""
        return list(own) if site.name == "mlp_post" else slice(None)

    def _warn(self, done: Sequence[Done]) -> None:
        """Say where a metric has no slope, so that every estimate is nothing."""
        for name in self.metrics:
            base = [one.sweep.unpatched[name].numpy()[:, None, None] for one in done]
            moved = max(
                float(np.nanmax(np.abs(values - start)))
                for one, start in zip(done, base, strict=True)
                for values in one.estimates[name].values()
            )
            if moved < 1e-6:
                self.ctx.run.notice(
                    f"patch: {name} has no slope at the run that {done[0].sweep.direction} patches, so every estimate is 0 "
                    "there; --method eap-ig looks farther"
                )

    def _chosen(self, done: Sequence[Done], by_layer: Mapping[int, Sequence[int]], seed: int) -> set[Key]:
        """The cells to run exactly, by the first metric."""
        first = next(iter(self.metrics))
        sums: dict[Key, list[float]] = {}
        for one in done:
            names = [place_name(place, one.sweep.group.pairs) for place in one.sweep.plan.places]
            base = one.sweep.unpatched[first].numpy()[:, None, None]
            for layer, values in one.estimates[first].items():
                change = values - base
                total, count = np.nansum(change, axis=0), (~np.isnan(change)).sum(axis=0)
                for u, unit in enumerate(by_layer[layer]):
                    for w, name in enumerate(names):
                        entry = sums.setdefault((layer, unit, name), [0.0, 0.0])
                        entry[0] += float(total[u, w])
                        entry[1] += float(count[u, w])
        keys = list(sums)
        means = np.array([total / count if count else np.nan for total, count in sums.values()])
        top, others = to_verify(means, self.config.verify, seed=seed)
        return {keys[at] for at in (*top, *others)}

    def _verified(
        self, units: Units, one: Done, by_layer: Mapping[int, Sequence[int]], chosen: set[Key], batch: int
    ) -> list[pa.Table]:
        """The rows of a group in a direction, with the exact values of the chosen cells."""
        sweep, tables = one.sweep, []
        names = [place_name(place, sweep.group.pairs) for place in sweep.plan.places]
        for layer, own in by_layer.items():
            cells = [
                (u, unit, w)
                for u, unit in enumerate(own)
                for w, name in enumerate(names)
                if (layer, unit, name) in chosen
            ]
            exact = {name: np.full_like(values[layer], np.nan) for name, values in one.estimates.items()}
            if cells:
                unit = (one.number, sweep.direction, f"exact{layer:03d}")
                if unit not in units:
                    units.write(unit, self._exactly(sweep, layer, [(n, w) for _, n, w in cells], batch))
                for name, values in units.values(unit).items():
                    for column, (u, _, w) in zip(values.reshape(-1, len(sweep.group.pairs)), cells, strict=True):
                        exact[name][:, u, w] = column
                self.ctx.run.stop_here()
            estimates = {name: values[layer] for name, values in one.estimates.items()}
            tables.append(self._effects(sweep, (layer,), own, estimates, exact))
        return tables

    def _exactly(self, sweep: Sweep, layer: int, cells: Sequence[tuple[int, int]], size: int) -> dict[str, np.ndarray]:
        """metric -> patched values [cells, b], flat, of (unit, place) at a layer."""
        check_layers(sweep, [layer])
        b = len(sweep.group.pairs)
        exists = sweep.plan.exists.numpy()
        places = [w for _, w in cells]
        table = {
            name: np.where(exists[places], value.numpy(), np.nan)  # [cells, b]
            for name, value in sweep.unpatched.items()
        }
        tasks = [(at, row) for at, (_, w) in enumerate(cells) for row in range(b) if sweep.plan.changes[w, row]]
        for begin in range(0, len(tasks), size):
            some = tasks[begin : begin + size]
            rows, here = tuple(row for _, row in some), [cells[at] for at, _ in some]
            first = min(int(sweep.plan.first[w, row]) for (_, w), row in zip(here, rows, strict=True))
            batch = Batch(rows, tuple(w for _, w in here), tuple(n for n, _ in here), first if sweep.prefix else 0)
            if begin == 0:
                check_batch(sweep, (layer,), batch)
            for name, values in sweep.run([(layer,)], batch)[0].items():
                table[name][[at for at, _ in some], rows] = values.numpy()
        return {name: values.ravel() for name, values in table.items()}

    def _neurons(self, parts: Sequence[Sequence[EncodedPair]]) -> list[tuple[int, int]]:
        """The neurons with the largest estimates, and others at random, to be verified."""
        total: torch.Tensor | None = None
        for members in self._exploring(parts):
            group = prepare(self.model, members, Plain("mlp_post"))
            for direction in self.job.directions:
                scores = next(iter(self._scores(group, direction).values()))
                here = torch.stack([scores[at].nansum((0, 2)) for at in sorted(scores)]).abs()
                total = here if total is None else total + here
        assert total is not None
        return [divmod(at, total.shape[1]) for at in self._listed(total.flatten().numpy())]

    def _promising(self, parts: Sequence[Sequence[EncodedPair]], site: Latents, layer: int) -> list[int]:
        """The latents with the largest estimates, and others at random, to be verified."""
        first = next(iter(self.metrics.values()))
        sums = torch.zeros(len(site.sae.W_dec), dtype=torch.float64)
        for members in self._exploring(parts):
            for direction in self.job.directions:
                found: LatentScores = latent_scores(
                    self.model,
                    members,
                    site,
                    layer,
                    first,
                    direction,
                    method=self.config.method,
                    steps=self.config.steps,
                )
                sums += found.latents.sum(0).abs()
        return self._listed(sums.numpy())

    def _listed(self, sizes: np.ndarray) -> list[int]:
        """`top` of the largest, then `verify` of the others at random; never one that has no effect at all."""
        return drawn(np.where(sizes > 0, sizes, np.nan), self.config.top, self.config.verify, self.config.seed)

    def _how(self, n: int) -> tuple[str, str]:
        best = (
            f"the {self.config.top:,} with the largest estimates by {self.config.method} of {next(iter(self.metrics))}"
        )
        return f"{best}, and {max(0, n - self.config.top):,} of the others at random", ""


def drawn(sizes: np.ndarray, top: int, others: int, seed: int) -> list[int]:
    """The places of the `top` largest numbers, then of so many others at random; NaN is never taken."""
    largest, _ = to_verify(sizes, top, seed=seed)
    rest = np.setdiff1d(np.flatnonzero(~np.isnan(sizes)), largest)
    some = np.random.default_rng(seed).choice(rest, min(others, len(rest)), replace=False) if len(rest) else rest
    return [*largest, *sorted(some.tolist())]


def calibration(cells: pa.Table, verify: int) -> dict[str, dict[str, dict[str, object]]]:
    """metric -> direction -> what the verified cells say (`Calibration.row`).

    Args:
        cells: the means over pairs; the strongest `verify` of the first metric were run for their rank.
    """
    found: dict[str, dict[str, dict[str, object]]] = {}
    random: dict[str, np.ndarray] = {}
    for metric in dict.fromkeys(cells["metric"].to_pylist()):
        for direction in dict.fromkeys(cells["direction"].to_pylist()):
            here = (cells["metric"].to_numpy(zero_copy_only=False) == metric) & (
                cells["direction"].to_numpy(zero_copy_only=False) == direction
            )
            part = cells.filter(pa.array(here))
            guess, exact = (
                part[name].to_numpy(zero_copy_only=False).astype(float) for name in ("approximate", "exact")
            )
            if direction not in random:  # the first metric ranks
                order = np.argsort(-np.abs(guess), kind="stable")
                random[direction] = np.isin(np.arange(len(guess)), order[:verify], invert=True)
            known = ~np.isnan(exact)
            found.setdefault(metric, {})[direction] = calibrate(
                guess[known], exact[known], random[direction][known]
            ).row()
    return found


def combined(found: Mapping[str, Mapping[str, Mapping[str, object]]], method: str) -> list[str]:
    """A sentence a metric and direction on what verification found."""
    said = []
    for metric, directions in found.items():
        for direction, row in directions.items():
            n = int(row["n_top"]) + int(row["n_random"])  # type: ignore[call-overload]
            if row["spearman"] is None or row["slope"] is None:
                said.append(
                    f"{metric}, {direction}: estimates by {method}; {n} cells run exactly, too few or too alike to compare"
                )
                continue
            what = "sizes without a direction" if method == DROP else "estimates"
            said.append(
                f"{metric}, {direction}: {what} by {method}; of {n} cells run exactly ({row['n_top']} strongest, "
                f"{row['n_random']} at random) rank correlation {row['spearman']:.2f}, slope {row['slope']:.2f} on exact"
            )
    return said


def place_name(place: Place, members: Sequence[EncodedPair]) -> object:
    """A place's name across groups of different lengths: a span's, or a position counted from the end."""
    if place.position is None:
        return place.span
    return place.position - len(members[0].clean_ids)
