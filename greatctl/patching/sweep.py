"""The sweep: one run's activation at one place, put into the other run, for every layer, unit and place.

*Denoising* puts clean activations into the corrupted run (is this place sufficient?), *noising* corrupted
ones into the clean run (is it necessary?). A batch of cells goes through the model together: resumed from
the stored residual that enters the layer, at the first position that any of its patches changes (keys and
values of what stands before come from the unpatched run), and only where the answer is read are logits
computed. Where a layer has few cells, those of many layers share one walk up the model, which each joins at
its own layer. Places that hold equal activations in both runs are checked to do so and then not computed.
`checks` holds every site against what must be true of it while the sweep runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..errors import ResourceError, StageError
from ..extend.contracts import PatchMetric
from .cells import Batch, Plan, batches_of, plan_of
from .checks import check_batch, check_layers
from .memory import is_out_of_memory, overhead_of
from .metrics import measure
from .runs import Branch, Edit, Group, Patchable, Start, ends, reuses_prefix, score, widened, with_scores
from .sites import Donor

__all__ = ["Layers", "Sweep", "patch", "sweep_layer"]

Notice = Callable[[str], None]
Layers = tuple[int, ...]  # the layers that one step patches: one, or a window of them


class Sweep:
    """One group in one direction.

    Args:
        model: the frozen model.
        group: prepared pairs.
        direction: `denoising` or `noising`.
        metrics: name -> metric.
        positions: `each`, `spans` or `all`.
        notice: told when a batch has to be halved.

    Attributes:
        noise: what the shape of a batch changes in half precision, once `checks` has measured it.
    """

    def __init__(
        self,
        model: Patchable,
        group: Group,
        direction: str,
        metrics: Mapping[str, PatchMetric],
        positions: str = "each",
        *,
        notice: Notice = lambda words: None,
    ) -> None:
        self.model, self.group, self.direction, self.metrics = model, group, direction, metrics
        self.prefix = reuses_prefix(model)
        self.plan: Plan = plan_of(group, direction, positions)
        self._notice, self._limit = notice, 1 << 30
        self.noise: float | None = None
        base, _ = ends(direction)
        self.unpatched = {
            name: measure(name, metric, group.logits[base], group.end_answers(base)) for name, metric in metrics.items()
        }

    def batches(self, units: Sequence[int], batch_cells: int, overhead: int) -> list[Batch]:
        """The tasks of one layer, cut into batches; the same for every layer of the same units."""
        return batches_of(
            self.plan, units, self.group.lengths(self.direction)[0], batch_cells, overhead, prefix=self.prefix
        )

    def table(self, n_units: int) -> dict[str, torch.Tensor]:
        """metric -> [b, n_units, places] of the unpatched run's value, NaN where a pair has no such place."""
        exists = self.plan.exists.T[:, None]
        return {
            name: torch.where(exists, value[:, None, None], torch.nan).repeat(1, n_units, 1)
            for name, value in self.unpatched.items()
        }

    @torch.no_grad()
    def run(self, steps: Sequence[Layers], batch: Batch) -> list[dict[str, torch.Tensor]]:
        """For each step, metric -> value of each task of the batch [c], float64 on the CPU.

        Several steps go through the model in one walk, which the runs of each join at its own layer.

        Raises:
            StageError: an edit was not called.
            PluginError: a metric broke its contract.
            ResourceError: not even one task fits into memory.
        """
        if len(batch) * len(steps) > self._limit:
            return self._halves(steps, batch)
        try:
            return self._measured(steps, batch)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self._halve(len(batch) * len(steps), error)
        return self.run(steps, batch)

    def _halves(self, steps: Sequence[Layers], batch: Batch) -> list[dict[str, torch.Tensor]]:
        """The same from two runs: of half the tasks each, or of half the steps each where there is but one task."""
        if len(batch) == 1:
            middle = len(steps) // 2
            return self.run(steps[:middle], batch) + self.run(steps[middle:], batch)
        middle = len(batch) // 2
        parts = [self.run(steps, part) for part in (batch.part(0, middle), batch.part(middle, len(batch)))]
        return [{name: torch.cat([a[name], b[name]]) for name in a} for a, b in zip(*parts, strict=True)]

    def logits(self, steps: Sequence[Layers], batch: Batch, *, plain: bool = False) -> list[torch.Tensor]:
        """Per branch the logits [steps * c, m, V] of a batch; with `plain` from whole forwards of the tokens."""
        device = self.group.logits[0].device
        rows = torch.tensor(batch.rows, device=device)
        places = torch.tensor(batch.places, device=device)
        unit = None if min(batch.units) < 0 else torch.tensor(batch.units, device=device)
        start = batch.start if self.prefix and not plain else 0
        found = []
        for number in range(len(self.group.branches)):
            mask = self.plan.masks[number][places, rows][:, start:]
            edits = [
                [
                    self._edit(layer, number, rows, mask, unit, start, self.group.donor(self.direction, layer, number))
                    for layer in layers
                ]
                for layers in steps
            ]
            if plain:
                found.append(torch.cat([self._whole(number, rows, some) for some in edits]))
            else:
                found.append(self.resumed([layers[0] for layers in steps], number, rows, edits, start))
        return found

    def resumed(
        self, layers: Sequence[int], branch: int, rows: torch.Tensor, edits: Sequence[Sequence[Edit]], start: int = 0
    ) -> torch.Tensor:
        """Logits [layers * c, m, V] of the patched run's rows, from each layer on under its edits, and from a position
        on."""
        here, (base, _) = self.group.branches[branch], ends(self.direction)
        again = rows.repeat(len(layers))
        more: dict[str, Any] = {"positions": self._where(here, len(again))}
        if start:
            assert here.pasts is not None
            more |= {"start": start, "past": here.pasts[base].rows(again)}
        starts = [
            Start(layer, here.residuals[layer][base][rows, start:], some)
            for layer, some in zip(layers, edits, strict=True)
        ]
        if len(starts) == 1:
            return _counted(self.model.resume(*starts[0], **more), here)
        return _counted(self.model.climb(starts, **more), here)

    def _whole(self, branch: int, rows: torch.Tensor, edits: Sequence[Edit]) -> torch.Tensor:
        """Logits [c, m, V] of one forward of all tokens under edits."""
        here, (base, _) = self.group.branches[branch], ends(self.direction)
        return _counted(self.model.run(here.tokens[base][rows], edits, positions=self._where(here, len(rows))), here)

    def _where(self, branch: Branch, n: int) -> torch.Tensor | None:
        """The one position [n] whose logits count; None where several do."""
        tokens = branch.tokens[ends(self.direction)[0]]
        return torch.full((n,), tokens.shape[1] - 1, device=tokens.device) if branch.m == 1 else None

    def _edit(
        self,
        layer: int,
        branch: int,
        rows: torch.Tensor,
        mask: torch.Tensor,
        unit: torch.Tensor | None,
        start: int,
        values: torch.Tensor,
    ) -> Edit:
        """The edit of one layer, which must be called once before its logits are believed."""
        site, (base, _) = self.group.site, ends(self.direction)
        old = Donor(self.group.branches[branch].values[layer][base], rows, start) if site.needs_old else None
        new = Donor(values, rows, start)
        return Edit(site.at(layer), lambda value: site.write(value, old, new, mask, unit))

    def _measured(self, steps: Sequence[Layers], batch: Batch) -> list[dict[str, torch.Tensor]]:
        logits = self.logits(steps, batch)
        rows = torch.tensor(batch.rows, device=logits[0].device).repeat(len(steps))
        answers = with_scores(self.group.answers.rows(rows), score(self.group.branches, logits, rows))
        values = {name: measure(name, metric, logits[0][:, 0], answers) for name, metric in self.metrics.items()}
        n = len(batch)
        return [{name: v[at * n : (at + 1) * n] for name, v in values.items()} for at in range(len(steps))]

    def _halve(self, cells: int, error: BaseException) -> None:
        """Note that so many cells at once do not fit."""
        if cells == 1:
            raise ResourceError(
                f"one cell does not fit into the memory of {self.model.device}",
                why=str(error).splitlines()[0],
                fix="use shorter prompts, a smaller --model, or another --device",
                code="out-of-memory",
            ) from error
        self._limit = max(1, cells // 2)
        self._notice(f"{cells} cells do not fit into memory; going on with {self._limit} at once")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _counted(logits: torch.Tensor, branch: Branch) -> torch.Tensor:
    """The logits that count, [c, m, V], at least float32."""
    return widened(logits[:, None] if branch.m == 1 else logits[:, -branch.m :])


@torch.no_grad()
def sweep_layer(
    model: Patchable,
    group: Group,
    layer: int,
    direction: str,
    metrics: Mapping[str, PatchMetric],
    batch_cells: int = 64,
    *,
    positions: str = "each",
    units: Sequence[int] | None = None,
) -> dict[str, torch.Tensor]:
    """Patch every place of every pair at one layer.

    Args:
        model: the frozen model.
        group: pairs of the same two lengths, prepared.
        layer: the layer whose site is patched.
        direction: `denoising` or `noising`.
        metrics: name -> metric.
        batch_cells: cells that go through the model at once; bounds the memory.
        positions: `each`, `spans` or `all`.
        units: heads or neurons to patch one by one; default all heads or neurons (a site of the stream has none).

    Returns:
        metric name -> value of the patched run, float64 on the CPU: [b, places], or [b, units, places] at a site
        that has units; without the last axis for `all`. NaN where a pair has no such place.

    Raises:
        StageError: a self-check failed; names the site.
        PluginError: a metric broke its contract.
        ResourceError: a batch does not fit into memory.
    """
    sweep = Sweep(model, group, direction, metrics, positions)
    check_layers(sweep, [layer])
    unit = getattr(group.site, "unit", "")
    if units is None:
        axis = 1 if group.site.name == "pattern" else 2
        units = range(group.values[layer][0].shape[axis]) if unit else [-1]
    table = sweep.table(len(units))
    for number, batch in enumerate(sweep.batches(units, batch_cells, overhead_of(model.device))):
        if number == 0:
            check_batch(sweep, (layer,), batch)
        column = {unit: at for at, unit in enumerate(units)}
        at = [torch.tensor(x) for x in (batch.rows, [column[u] for u in batch.units], batch.places)]
        for name, values in sweep.run([(layer,)], batch)[0].items():
            table[name][at[0], at[1], at[2]] = values
    flat = {name: values if unit else values[:, 0] for name, values in table.items()}
    return {name: values[..., 0] if positions == "all" else values for name, values in flat.items()}


@torch.no_grad()
def patch(
    model: Patchable,
    group: Group,
    layer: int,
    direction: str,
    rows: torch.Tensor,
    mask: torch.Tensor,
    *,
    unit: int | torch.Tensor | None = None,
    donor: torch.Tensor | None = None,
    at: int = -1,
) -> torch.Tensor:
    """Logits [c, V] after patching c copies of the group's pairs, each at its own set of positions, one by one
    and without reusing a prefix.

    Args:
        model: the frozen model.
        group: pairs of the same two lengths, prepared; answers of one token.
        layer: the layer whose site is patched.
        direction: which run is patched into which.
        rows: pair of each copy [c].
        mask: [c, p] bool, True where the site is overwritten.
        unit: head or neuron, or one for each copy [c]; default all.
        donor: values [c, p, …] to write; default: the other run's.
        at: the position whose logits are wanted; default the answer position.

    Raises:
        StageError: the edit was never called.
    """
    base, _ = ends(direction)
    device, branch = group.logits[0].device, group.branches[0]
    rows, mask = rows.to(device), mask.to(device)
    if isinstance(unit, int):
        unit = None if unit < 0 else torch.full_like(rows, unit)
    new = Donor(group.donor(direction, layer, 0), rows)
    if donor is not None:
        new = Donor(donor, torch.arange(len(rows), device=device))
    old = Donor(branch.values[layer][base], rows)
    site, calls = group.site, []

    def write(value: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return site.write(value, old, new, mask, unit)

    where = torch.full((len(rows),), at % mask.shape[1], device=device)
    residual = branch.residuals[layer][base][rows]
    logits = model.resume(layer, residual, [Edit(site.at(layer), write)], positions=where)
    if len(calls) != 1:
        why = f"the edit was called {len(calls)} times instead of once"
        raise StageError(f"the self-check at {site.at(layer)} failed", why=why, code="self-check")
    return widened(logits)
