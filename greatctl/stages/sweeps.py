"""The work of stage `patch`: which pairs can be swept, what exactly is patched, and batch after batch of it.

Three short passes go before the sweep: both unpatched runs of every pair (a pair whose runs do not differ has
nothing to find), the choice of neurons or latents where there are too many, and the means of an ablation. The
sweep then goes through groups of pairs, directions, layers and batches, in an order that depends on nothing
but the settings, and skips what is on disk already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch

from ..errors import InputError, StageError, UsageError
from ..model.interface import Site
from ..model.tokenizer import encode, load_tokenizer
from ..patching.cells import Batch, Place
from ..patching.checks import check_batch, check_layers
from ..patching.latents import PARTS, Latents
from ..patching.memory import auto_cells, overhead_of
from ..patching.metrics import measure
from ..patching.pairs import EncodedPair, Refusal, encode_pairs
from ..patching.promising import promising_latents, promising_neurons
from ..patching.runs import CLEAN, CORRUPTED, PatchSite, prepare
from ..patching.sites import Label, Plain
from ..patching.sources import Source, make_source
from ..patching.sweep import Layers, Sweep
from ..patching.tables import effect_rows
from ..patching.units import Units, groups
from .context import Context
from .models import open_model
from .saes import open_sae

if TYPE_CHECKING:
    from ..extend.contracts import PatchMetric
    from .patch import Config, Job

__all__ = ["Outcome", "Sweeps"]


@dataclass
class Outcome:
    """What the sweep leaves besides its effects.

    Attributes:
        refused, executed: the pairs that were not, and that were swept.
        ends: metric -> pair id -> (clean, corrupted) value.
        words: pair id -> token strings of the (clean, corrupted) prompt.
        chosen: how neurons or latents were chosen, in words; "" where nothing was.
    """

    refused: list[Refusal]
    executed: list[EncodedPair] = field(default_factory=list)
    ends: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    words: dict[str, tuple[list[str], list[str]]] = field(default_factory=dict)
    chosen: str = ""


class Sweeps:
    """One run of the stage, before anything is written."""

    def __init__(self, ctx: Context, config: Config, job: Job) -> None:
        self.ctx, self.config, self.job = ctx, config, job
        self.encoded, refused = self._encode()
        self.outcome = Outcome(refused)
        self.metrics: dict[str, PatchMetric] = {
            name: ctx.plugins.registry.get("metrics", name)() for name in job.metrics
        }
        self.model = open_model(ctx, job.info.name)
        self._done = self._already = self._total = 0
        self._checked: set[object] = set()

    def look_at_ends(self) -> None:
        """Both unpatched runs of every pair; those that do not differ in the first metric are refused."""
        for members in groups(self.encoded):
            group = prepare(self.model, members, "resid_pre", layers=())
            ends = {
                name: [
                    measure(name, m, group.logits[run], group.end_answers(run)).tolist() for run in (CLEAN, CORRUPTED)
                ]
                for name, m in self.metrics.items()
            }
            for row, pair in enumerate(members):
                self._judge(pair, {name: (clean[row], corrupted[row]) for name, (clean, corrupted) in ends.items()})
        order = {pair.pair.id: at for at, pair in enumerate(self.encoded)}
        self.outcome.executed.sort(key=lambda pair: order[pair.pair.id])

    def run(self, units: Units) -> pa.Table:
        """Sweep what `units` does not have yet; returns all effects, a row a cell and pair."""
        parts = groups(self.outcome.executed)
        fixed = self._fixed(units)
        site, by_layer = self._site(parts, units)
        steps = [(layer,) for layer in by_layer] + self._windows()
        source = self._source(site, list(by_layer))
        self._count(parts, by_layer, steps)
        self._done = self._already = units.tasks()
        if self._already:
            self._say()
        effects = []
        for number, members in enumerate(parts):
            group = prepare(self.model, members, site, layers=list(by_layer), source=source)
            for direction in self.job.directions:
                sweep = Sweep(
                    self.model, group, direction, self.metrics, self.job.positions, notice=self.ctx.run.notice
                )
                for together in self._together(sweep, steps, by_layer, fixed["batch_cells"]):
                    effects += self._steps(units, number, sweep, together, by_layer[together[0][0]], fixed)
        return pa.concat_tables(effects)

    def _fixed(self, units: Units) -> dict[str, int]:
        """The two numbers that batches depend on."""
        pairs = self.outcome.executed
        longest = max(max(len(p.clean_ids), len(p.corrupted_ids)) for p in pairs)
        several = max(len(a) for p in pairs for a in (*p.answers, *p.wrong_answers))
        cells = self.config.batch_cells or auto_cells(
            self.model, longest + several - 1, pattern=self.config.site == "pattern", continued=several
        )
        return units.fixed(batch_cells=cells, overhead=overhead_of(self.model.device))

    def _together(
        self, sweep: Sweep, steps: Sequence[Layers], by_layer: Mapping[int, Sequence[int]], cells: int
    ) -> list[list[Layers]]:
        """Steps that share one walk up the model: neighbours with the same units, as many as a batch has room for."""
        alike: list[list[Layers]] = []
        for step in steps:
            last = alike[-1][-1] if alike else None
            if last and last[0] <= step[0] and list(by_layer[last[0]]) == list(by_layer[step[0]]):
                alike[-1].append(step)
            else:
                alike.append([step])
        found = []
        for some in alike:
            tasks = len(by_layer[some[0][0]]) * int(sweep.plan.changes.sum())
            room = max(1, cells // max(1, tasks)) if sweep.prefix else 1
            size = -(-len(some) // -(-len(some) // room))  # as even as possible
            found += [some[at : at + size] for at in range(0, len(some), size)]
        return found

    def _steps(
        self,
        units: Units,
        number: int,
        sweep: Sweep,
        steps: Sequence[Layers],
        own: Sequence[int],
        fixed: Mapping[str, int],
    ) -> list[pa.Table]:
        """All cells of some layers (or windows of layers) of one group in one direction, a table a step."""
        n = len(steps)
        tables = [{name: table.numpy() for name, table in sweep.table(len(own)).items()} for _ in steps]
        column = {unit: at for at, unit in enumerate(own)}
        # a batch's fixed cost is paid once for all steps, of which half are under way on average
        overhead = fixed["overhead"] if n == 1 else max(1, 2 * fixed["overhead"] // n)
        batches = sweep.batches(own, max(1, fixed["batch_cells"] // n), overhead)
        size = len(sweep.group.pairs) * len(own) * len(sweep.plan.places)
        for at, batch in enumerate(batches):
            unit = (number, sweep.direction, _name(steps), at)
            if unit not in units:
                self._check(number, sweep, steps, batch)
                found = sweep.run(steps, batch)
                units.write(unit, {name: torch.cat([f[name] for f in found]).numpy() for name in self.metrics})
                self._progress(n * len(batch))
            for metric, values in units.values(unit).items():
                for table, part in zip(tables, values.reshape(n, -1), strict=True):
                    table[metric][batch.rows, [column[u] for u in batch.units], batch.places] = part
        self._progress(n * (size - sum(map(len, batches))))
        return [self._effects(sweep, step, own, table) for step, table in zip(steps, tables, strict=True)]

    def _check(self, number: int, sweep: Sweep, steps: Sequence[Layers], batch: Batch) -> None:
        """Each layer once a group, and the first batch of each direction against plain forwards."""
        layers = sorted({layer for step in steps for layer in step if (number, layer) not in self._checked})
        if layers:
            check_layers(sweep, layers)
            self._checked |= {(number, layer) for layer in layers}
        if sweep.direction not in self._checked:
            check_batch(sweep, steps[0], batch)
            self._checked.add(sweep.direction)

    def _effects(
        self,
        sweep: Sweep,
        layers: tuple[int, ...],
        own: Sequence[int],
        values: Mapping[str, np.ndarray],
        exact: Mapping[str, np.ndarray] | None = None,
    ) -> pa.Table:
        labels = [sweep.group.site.label(layers[0], unit) for unit in own]
        return self._rows(sweep.group.pairs, layers, sweep.direction, labels, sweep.plan.places, values, exact)

    def _rows(
        self,
        pairs: Sequence[EncodedPair],
        layers: Sequence[int],
        direction: str,
        labels: Sequence[Label],
        places: Sequence[Place],
        values: Mapping[str, np.ndarray],
        exact: Mapping[str, np.ndarray] | None = None,
    ) -> pa.Table:
        """The table of patched values [b, labels, places], by the method that was asked for."""
        ids = [pair.pair.id for pair in pairs]
        numbers = {
            name: (*np.array([self.outcome.ends[name][id] for id in ids]).T, patched)
            for name, patched in values.items()
        }
        return effect_rows(
            ids,
            [self.outcome.words[id][0] for id in ids],
            self.config.site,
            layers,
            direction,
            labels,
            [(place.position, place.span) for place in places],
            numbers,
            [{at: name for name, (clean, _) in pair.spans.items() for at in clean} for pair in pairs],
            method=self.config.method,
            exact=exact,
        )

    def _encode(self) -> tuple[list[EncodedPair], list[Refusal]]:
        from .patch import nothing_left

        job = self.job
        tokenizer = load_tokenizer(job.source, offline=self.ctx.offline)
        encoded, refused = encode_pairs(
            job.pairs, lambda text: encode(tokenizer, text), n_ctx=job.info.n_ctx, plain=False
        )
        if self.config.site == "pattern":
            reason = (
                "the prompts are of unequal length, and a row of a pattern is a distribution over one prompt's places"
            )
            refused += [Refusal(pair.pair, reason) for pair in encoded if not pair.equally_long]
            encoded = [pair for pair in encoded if pair.equally_long]
        if self.config.positions == "spans":
            refused += [Refusal(pair.pair, "it has no marked span") for pair in encoded if not pair.spans]
            encoded = [pair for pair in encoded if pair.spans]
        for refusal in refused:
            self.ctx.run.notice(f"patch: pair {refusal.pair.id!r} refused: {refusal.reason}")
        if not encoded:
            raise nothing_left(job, refused)
        return encoded, refused

    def _judge(self, pair: EncodedPair, ends: Mapping[str, tuple[float, float]]) -> None:
        """Refuse a pair without a gap, with the number; keep what the tables need of any other."""
        first, out = next(iter(ends)), self.outcome
        gap = ends[first][CLEAN] - ends[first][CORRUPTED]
        if abs(gap) < self.config.min_gap or gap == 0:
            reason = f"the runs differ by {gap:.3g} in {first}; --min-gap asks for {self.config.min_gap:g}"
            self.ctx.run.notice(f"patch: pair {pair.pair.id!r} refused: {reason}")
            out.refused.append(Refusal(pair.pair, reason))
            return
        out.executed.append(pair)
        clean, corrupted = (
            [self.model.tokenizer.decode([i]) for i in row] for row in (pair.clean_ids, pair.corrupted_ids)
        )
        out.words[pair.pair.id] = clean, corrupted
        for name, both in ends.items():
            out.ends.setdefault(name, {})[pair.pair.id] = both

    def _site(self, parts: Sequence[Sequence[EncodedPair]], units: Units) -> tuple[PatchSite, dict[int, Sequence[int]]]:
        """What is patched, and the units of each layer that has any; a choice stands from the beginning of the work."""
        config, model = self.config, self.model
        if config.site == "latents":
            return self._latents(parts, units)
        site = Plain(config.site)
        self._must_know(site.at(0))
        if config.site == "mlp_post":
            width = model.d_mlp
            kept = units.kept("chosen", lambda: {"neuron": [at * width + n for at, n in self._neurons(parts)]})
            chosen = [divmod(int(at), width) for at in kept["neuron"]]
            self._say_chosen(len(chosen), width * model.n_layers, "neurons")
            found = {layer: sorted(n for at, n in chosen if at == layer) for layer in range(model.n_layers)}
            return site, {layer: units for layer, units in found.items() if units}
        count = {"head": model.n_kv_heads if site.of_keys else model.n_heads}.get(site.unit, 0)
        return site, {layer: range(count) if count else [-1] for layer in range(model.n_layers)}

    def _latents(
        self, parts: Sequence[Sequence[EncodedPair]], units: Units
    ) -> tuple[PatchSite, dict[int, Sequence[int]]]:
        found = self.job.sae
        assert found is not None and found.hook_point is not None
        where = Site.parse(found.hook_point)
        self._must_know(found.hook_point)
        sae = open_sae(self.ctx, found, str(self.model.device))
        target = getattr(sae, "target_hook_point", None)
        if target not in (None, found.hook_point) or sae.W_dec.shape[1] != self.model.d_model:
            raise InputError(
                f"{found.path.name} is a transcoder: it reads {found.hook_point} and writes {target}",
                why="its latents explain another activation than the one they are read from",
                fix="name an autoencoder with --sae",
                code="transcoder",
            )
        special = self.model.special_ids
        site = Latents(sae, found.hook_point, special_ids=special)
        first = torch.tensor([parts[0][0].clean_ids], device=self.model.device)
        site.check(self.model.capture(first, [found.hook_point])[found.hook_point][:, 1:])
        chosen = list(dict.fromkeys(self.config.latent))
        if not chosen:
            kept = units.kept("chosen", lambda: {"latent": self._promising(parts, site, where.layer)})
            chosen = kept["latent"].astype(int).tolist()
            self._say_chosen(len(chosen), found.d_sae, "latents")
        site = Latents(sae, found.hook_point, chosen, special_ids=special)
        return site, {where.layer: range(len(chosen) + len(PARTS))}

    def _neurons(self, parts: Sequence[Sequence[EncodedPair]]) -> list[tuple[int, int]]:
        """(layer, neuron) of those to patch."""
        return promising_neurons(self.model, self._exploring(parts), self.config.top)

    def _promising(self, parts: Sequence[Sequence[EncodedPair]], site: Latents, layer: int) -> list[int]:
        """The latents to patch."""
        return promising_latents(self.model, self._exploring(parts), site, layer, self.config.top)

    def _how(self, n: int) -> tuple[str, str]:
        """By what n neurons or latents (or edges) were chosen, and what it did not look at, in words."""
        return (
            "those that change the stream most between the two runs (|clean - corrupted| activation times the "
            "norm of what it writes)",
            ", without looking at a metric",
        )

    def _exploring(self, parts: Sequence[Sequence[EncodedPair]]) -> list[list[EncodedPair]]:
        """The pairs that choose what is patched: those that are not held out, where there are any."""
        chosen = [[pair for pair in members if not pair.pair.heldout] for members in parts]
        return [members for members in chosen if members] or [list(members) for members in parts]

    def _say_chosen(self, n: int, total: int, what: str) -> None:
        by_what, blind = self._how(n)
        by, everyone = sum(map(len, self._exploring(groups(self.outcome.executed)))), len(self.outcome.executed)
        whose = f"the {by} pairs that are not held out" if by < everyone else "the same pairs"
        option = {"latents": "name a latent with --latent and ", "edges": "name an edge with --edge and "}.get(
            what, "use "
        )
        self.outcome.chosen = (
            f"{n:,} of {total:,} {what} are listed: {by_what}. They were chosen on "
            f"{whose}{blind}, and the tests use all {everyone}; so this is exploration: "
            f"to confirm a finding, {option}other pairs"
        )

    def _must_know(self, hook_point: str) -> None:
        if hook_point not in self.model.sites():
            raise StageError(
                f"{self.job.info.name} cannot be patched at {hook_point}",
                why=f"the {self.model.engine} engine does not know the site",
                fix="use another --site",
            )

    def _windows(self) -> list[tuple[int, ...]]:
        n = self.config.layer_window
        if not n:
            return []
        return [tuple(range(first, first + n)) for first in range(self.model.n_layers - n + 1)]

    def _source(self, site: PatchSite, layers: Sequence[int]) -> Source | None:
        kind = self.config.corruption
        if kind == "counterpart":
            return None
        pairs = self.outcome.executed
        if any(len(a) > 1 for p in pairs for a in (*p.answers, *p.wrong_answers)) and site.name == "pattern":
            raise UsageError("patterns cannot be ablated behind a prompt", why="an answer has several tokens")
        return make_source(self.model, pairs, site, layers, kind, seed=self.config.seed)

    def _count(
        self,
        parts: Sequence[Sequence[EncodedPair]],
        by_layer: Mapping[int, Sequence[int]],
        steps: Sequence[tuple[int, ...]],
    ) -> None:
        """How many cells there are, for the progress bar."""
        units = sum(len(by_layer[layers[0]]) for layers in steps)
        for members in parts:
            spans = {name for pair in members for name in pair.spans}
            places = {"each": members[0].length, "all": 1}.get(self.job.positions, len(spans))
            self._total += len(members) * places * units * len(self.job.directions)

    def _progress(self, cells: int) -> None:
        self._done += cells
        if cells:
            self._say()
            self.ctx.run.stop_here()

    def _say(self) -> None:
        self.ctx.run.progress("patch", self._done, self._total, "cells", already=self._already)


def _name(steps: Sequence[Layers]) -> str:
    """005 for a layer, 005x3 for a window that begins there, 005+2 for it and the two steps behind it."""
    first, more = steps[0], len(steps) - 1
    return f"{first[0]:03d}" + (f"x{len(first)}" if len(first) > 1 else "") + (f"+{more}" if more else "")
