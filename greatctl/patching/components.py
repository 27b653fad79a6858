"""Runs of the model that keep a set of components and replace all the others, whatever the components are.

Nodes and edges are `masked` runs: what is kept is computed in this very run, from what the replaced ones before it
left, so a kept head behind a replaced one is fed what it would be fed if the circuit were all there is. The embedding
is kept in every set of nodes; a set without it could do nothing.

Latents are kept or replaced in the clean run by the change of their decoded part (see `latents`); what an autoencoder
leaves unexplained is a component of its own at its layer, `error`. A latent that no run of the pairs ever uses is
outside of every set, so it stays silent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import StageError
from ..extend.contracts import PatchMetric
from .checks import tolerance
from .circuits import Wiring
from .graph import Edge, Graph, Node, graph
from .latents import Latents, SparseCode
from .masked import MaskedRuns
from .memory import auto_cells
from .metrics import measure
from .pairs import EncodedPair
from .runs import CLEAN, CORRUPTED, Edit, Group, prepare, widened
from .sources import make_source
from .writes import edge_group, make_sources

__all__ = ["ERROR", "ComponentRuns", "GraphRuns", "LatentRuns", "removal_scores", "unfit", "wiring_of"]

ERROR = "error"
_TOGETHER = 64  # sets handed to the model at once
Sets = NDArray[np.bool_]
Values = NDArray[np.float64]


def unfit(pair: EncodedPair) -> str:
    """Why latents cannot be kept in a pair, or "": they are at all positions, and answers are one token."""
    if not pair.equally_long:
        return "the prompts are of unequal length, so not every latent has a value to take"
    if any(len(ids) > 1 for ids in (*pair.answers, *pair.wrong_answers)):
        return "an answer has several tokens, and circuits of latents are judged at one"
    return ""


class ComponentRuns:
    """What all components share; implements `faithfulness.Runs`.

    Args:
        model: the frozen model.
        parts: groups of pairs, see `units.groups`.
        metric: name and metric.
        ablation: `counterpart`, `mean` or `zero`.

    Attributes:
        names: [N] the components, in the order in which they are computed.
        pairs: all pairs in the order of the columns of `values`.
        strata: [N] label of each component, for random sets that are like the circuit; None where `wiring` is.
        wiring: what the components connect, where they are edges.
    """

    names: Sequence[str]
    strata: Sequence[object] | None = None
    wiring: Wiring | None = None

    def __init__(
        self, model: Any, parts: Sequence[Sequence[EncodedPair]], metric: tuple[str, PatchMetric], ablation: str
    ) -> None:
        self.model, self.parts, self.ablation, self._metric = model, parts, ablation, metric
        self.pairs = [pair for members in parts for pair in members]

    def values(self, keep: Sets, rows: Sets | None = None) -> Values:
        """The metric [s, n_pairs] of runs that keep the components of each row of `keep` [s, N].

        With `rows` [n_pairs] bool, groups without such a pair are not run, and are NaN.
        """
        found, at = [], 0
        for number, members in enumerate(self.parts):
            if rows is None or rows[at : at + len(members)].any():
                found.append(self._group(number, keep))
            else:
                found.append(np.full((len(keep), len(members)), np.nan))
            at += len(members)
        return np.concatenate(found, axis=1)

    def _group(self, number: int, keep: Sets) -> Values:
        """`values` of one group, [s, b]."""
        raise NotImplementedError


class GraphRuns(ComponentRuns):
    """All nodes (heads and MLPs) or all edges of the graph.

    Raises:
        UsageError: the engine is not lean.
        StageError: a self-check of `MaskedRuns` failed.
    """

    def __init__(
        self,
        model: Any,
        parts: Sequence[Sequence[EncodedPair]],
        metric: tuple[str, PatchMetric],
        ablation: str,
        kind: str,
    ) -> None:
        super().__init__(model, parts, metric, ablation)
        own = graph(model)
        self._embed = own.senders[0]
        self._components: list[Node | Edge] = list(own.edges if kind == "edges" else own.senders[1:])
        self.names = [one.name for one in self._components]
        if kind == "edges":
            self.wiring = wiring_of(own)
        else:
            self.strata = [one.kind for one in own.senders[1:]]
        sources = make_sources(model, self.pairs, ablation)
        self._runs = [
            MaskedRuns(model, edge_group(model, members, sources=sources), sources=sources) for members in parts
        ]

    def _group(self, number: int, keep: Sets) -> Values:
        sets = [self._set(row) for row in keep]
        name, metric = self._metric
        step = max(1, _TOGETHER // len(self.parts[number]))
        found = [self._runs[number].effects(sets[at : at + step], {name: metric}) for at in range(0, len(sets), step)]
        return torch.cat([values[name] for values in found]).numpy()

    def _set(self, row: Sets) -> list[Node | Edge]:
        always = [] if self.wiring is not None else [self._embed]
        return [*always, *(self._components[at] for at in np.flatnonzero(row))]


def wiring_of(own: Graph) -> Wiring:
    """What the edges of a graph connect, in the order of `Graph.edges`."""
    place = {node: at for at, node in enumerate(own.nodes)}
    feeds = {one: [place[node] for node in own.nodes_at(one)] for one in own.inputs}
    edges = list(own.edges)
    return Wiring([place[edge.sender] for edge in edges], [feeds[edge.receiver] for edge in edges], len(own.nodes))


class LatentRuns(ComponentRuns):
    """The latents of one or more autoencoders that fire on any of the pairs, and the error of each: HOOK#17, HOOK#error.

    Args:
        saes: hook point -> autoencoder.

    Raises:
        StageError: a decoder is not affine, or keeping everything is not the clean run.
    """

    def __init__(
        self,
        model: Any,
        parts: Sequence[Sequence[EncodedPair]],
        metric: tuple[str, PatchMetric],
        ablation: str,
        saes: Mapping[str, SparseCode],
    ) -> None:
        super().__init__(model, parts, metric, ablation)
        self.sites: dict[str, Latents] = {}
        self.first: dict[str, int] = {}
        self._groups: list[dict[str, Group]] = [{} for _ in parts]
        names: list[str] = []
        for hook_point in sorted(saes, key=layer_of):
            chosen = self._firing(hook_point, saes[hook_point])
            site = Latents(saes[hook_point], hook_point, chosen, special_ids=model.special_ids)
            self.sites[hook_point], self.first[hook_point] = site, len(names)
            names += [f"{hook_point}#{latent}" for latent in (*chosen, ERROR)]
            layers, source = [layer_of(hook_point)], None
            if ablation != "counterpart":
                source = make_source(model, self.pairs, site, layers, ablation)
            for groups, members in zip(self._groups, parts, strict=True):
                groups[hook_point] = prepare(model, members, site, layers=layers, source=source)
        self.names = names
        self.strata = [(name.partition("#")[0], name.endswith(ERROR)) for name in names]
        self._check()

    @torch.no_grad()
    def _firing(self, hook_point: str, sae: SparseCode) -> list[int]:
        """Latents that fire in either run of any pair, at a token that the autoencoder knows."""
        site, fires = Latents(sae, hook_point), torch.zeros(len(sae.W_dec), dtype=torch.bool)
        for members in self.parts:
            for run in (CLEAN, CORRUPTED):
                ids = [(pair.clean_ids, pair.corrupted_ids)[run] for pair in members]
                tokens = torch.tensor(ids, device=self.model.device)
                found = self.model.capture(tokens, [hook_point])[hook_point]
                ordinary = ~torch.isin(tokens, torch.tensor(self.model.special_ids, device=tokens.device))
                site.check(found[ordinary][None])
                fires |= (site.acts(found)[ordinary] != 0).any(0).cpu()
        return fires.nonzero()[:, 0].tolist()

    @torch.no_grad()
    def _group(self, number: int, keep: Sets) -> Values:
        sites, b = self._groups[number], len(self.parts[number])
        group = next(iter(sites.values()))
        found = []
        step = max(1, auto_cells(self.model, self.parts[number][0].length) // b)
        for at in range(0, len(keep), step):
            some = torch.from_numpy(keep[at : at + step]).to(self.model.device)
            rows = torch.arange(b, device=some.device).repeat(len(some))
            tokens = group.branches[0].tokens[CLEAN][rows]
            last = torch.full((len(rows),), tokens.shape[1] - 1, device=tokens.device)
            edits = self._edits(sites, rows, some.repeat_interleave(b, 0))
            logits = widened(self.model.run(tokens, edits, positions=last))
            found.append(measure(*self._metric, logits, group.answers.rows(rows)).reshape(-1, b))
        return torch.cat(found).numpy()

    def _edits(self, sites: Mapping[str, Group], rows: torch.Tensor, keep: torch.Tensor) -> list[Edit]:
        """What is written where, for the pairs `rows` [r] with the components `keep` [r, N]."""
        edits = []
        for hook_point, site in self.sites.items():
            first = self.first[hook_point]
            kept = keep[:, first : first + len(site.chosen) + 1]
            if not bool(kept.all()):
                edits.append(_recode(sites[hook_point], site, layer_of(hook_point), rows, kept))
        return edits

    def _check(self) -> None:
        """Going through the edit with every component kept must change nothing, to rounding."""
        group = next(iter(self._groups[0].values()))
        rows = torch.arange(len(self.parts[0]), device=self.model.device)
        tokens = group.branches[0].tokens[CLEAN]
        last = torch.full((len(rows),), tokens.shape[1] - 1, device=tokens.device)
        for hook_point, site in self.sites.items():
            kept = torch.ones(len(rows), len(site.chosen) + 1, dtype=torch.bool, device=rows.device)
            edit = _recode(self._groups[0][hook_point], site, layer_of(hook_point), rows, kept)
            logits = widened(self.model.run(tokens, [edit], positions=last))
            off = float((logits - group.logits[CLEAN]).abs().max())
            if not off <= tolerance(group.logits[CLEAN], getattr(self.model, "dtype", torch.float32)):
                raise StageError(
                    f"the self-check at {hook_point} failed",
                    why=f"with every latent and the error kept, logits are {off:.1e} off the clean run's",
                    fix="this autoencoder's latents cannot be kept one by one",
                    code="self-check",
                )


def _recode(group: Group, site: Latents, layer: int, rows: torch.Tensor, kept: torch.Tensor) -> Edit:
    """Give the latents and the error outside of `kept` [r, n + 1] their other values, by the change of the decoded part."""
    n = len(site.chosen)
    other = group.donor("noising", layer, 0)[rows]
    tokens = group.branches[0].tokens[CLEAN][rows]
    ordinary = ~torch.isin(tokens, torch.tensor(sorted(site.skips), device=tokens.device, dtype=tokens.dtype))
    there = (group.there("noising", 0)[rows] & ordinary)[..., None]

    def edit(value: torch.Tensor) -> torch.Tensor:
        x = value.float()
        live = site.acts(x)
        wanted = torch.zeros_like(live)
        wanted[..., site.chosen] = torch.where(kept[:, None, :n], live[..., site.chosen], other[..., :n].to(live.dtype))
        before, after = (site.sae.decode(acts.flatten(0, -2)).float().view_as(x) for acts in (live, wanted))
        error = other[..., n + x.shape[-1] :] - (x - before)
        delta = after - before + torch.where(kept[:, None, n:], 0.0, error)
        return torch.where(there & (delta != 0), (x + delta).to(value.dtype), value)

    return Edit(site.at(layer), edit)


def layer_of(hook_point: str) -> int:
    """The layer of `blocks.L.…`."""
    return int(hook_point.split(".")[1])


def removal_scores(
    runs: ComponentRuns, rows: Sets, progress: Callable[[int, int], None] = lambda done, total: None
) -> Values:
    """The exact score of every component: what the metric loses when it alone is replaced, [N], meaned over pairs.

    Args:
        runs: the model.
        rows: [n_pairs] bool: the pairs that count.
        progress: told (done, total).
    """
    total = len(runs.names)
    full = runs.values(np.ones((1, total), dtype=bool), rows)
    found = []
    for begin in range(0, total, _TOGETHER):
        keep = np.ones((min(_TOGETHER, total - begin), total), dtype=bool)
        keep[np.arange(len(keep)), np.arange(begin, begin + len(keep))] = False
        found.append((full - runs.values(keep, rows))[:, rows].mean(1))
        progress(min(begin + _TOGETHER, total), total)
    return np.concatenate(found)
