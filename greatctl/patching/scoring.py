"""One number for every component of a circuit to be: how much of the metric it carries, in the metric's unit.

Exactly, by patching one component at a time, or estimated from gradients. Both directions speak: what restores the
behaviour when it alone is put into the corrupted run (denoising) and what breaks it when it alone is taken out of the
clean one (noising) need not be the same components. A back-up restores without being needed, one of two that are
both needed breaks without being enough; so the mean of both ranks, positive where a component helps.

Scores always compare the two prompts, also where zeros or means will stand outside of the circuit; exact scores of
latents alone are those of their removal under that ablation. Only the pairs that may choose are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..extend.contracts import PatchMetric
from .attribution import latent_scores
from .components import ComponentRuns, LatentRuns, layer_of, removal_scores
from .edge_attribution import edge_scores
from .edges import edge_effects
from .graph import graph
from .masked import MaskedRuns
from .metrics import measure
from .pairs import EncodedPair
from .runs import CLEAN, CORRUPTED
from .writes import edge_group

__all__ = ["score"]

Scores = NDArray[np.float64]
Metric = tuple[str, PatchMetric]
Progress = Callable[[int, int], None]


def score(
    runs: ComponentRuns,
    kind: str,
    rows: NDArray[np.bool_],
    metric: Metric,
    *,
    method: str = "exact",
    steps: int = 5,
    directions: Sequence[str] = ("denoising", "noising"),
    progress: Progress = lambda done, total: None,
) -> Scores:
    """The mean score of every component over pairs and directions, [N] float64.

    Args:
        runs: the components, and the groups of pairs.
        kind: `nodes`, `edges` or `latents`.
        rows: [n_pairs] bool: the pairs that count.
        metric: name and metric; differentiable unless the method is exact.
        method: `exact`, or one of `attribution.METHODS` but `attribution-drop`. Exact scores of latents are those of
            their removal.
        steps: points of integrated gradients.
        directions: `denoising`, `noising` or both.
        progress: told (done, total).
    """
    if method == "exact" and kind == "latents":
        return removal_scores(runs, rows, progress)
    found, at = [], 0
    jobs = []
    for members in runs.parts:
        own = rows[at : at + len(members)]
        at += len(members)
        chosen = [pair for pair, row in zip(members, own, strict=True) if row]
        jobs += [(chosen, direction) for direction in directions] if chosen else []
    for number, (chosen, direction) in enumerate(jobs):
        progress(number, len(jobs))
        if method == "exact":
            one = _exact(runs.model, chosen, kind, metric, direction)
        else:
            one = _estimated(runs, chosen, kind, metric, direction, method, steps)
        found.append(one if direction == "denoising" else -one)
    progress(len(jobs), len(jobs))
    both = [np.concatenate(found[way :: len(directions)]) for way in range(len(directions))]
    return np.stack(both).mean((0, 1))


def _exact(model: Any, pairs: Sequence[EncodedPair], kind: str, metric: Metric, direction: str) -> Scores:
    """[b, N] patched minus unpatched, every component patched by itself at all positions."""
    name, own = metric[0], dict([metric])
    group = edge_group(model, pairs)
    if kind == "edges":
        effects = edge_effects(model, group, own, direction)
        base = (effects.corrupted if direction == "denoising" else effects.clean)[name]
        return (effects.values[name][:, :, 0] - base[:, None]).numpy()
    senders = graph(model).senders
    base = CORRUPTED if direction == "denoising" else CLEAN
    unpatched = measure(name, metric[1], group.logits[base], group.end_answers(base))
    masked = MaskedRuns(model, group, direction=direction)  # inside the set is the run that is patched
    without = [[other for other in senders if other != node] for node in senders[1:]]
    values = masked.effects(without, own)[name]
    return (values - unpatched).T.numpy()


def _estimated(
    runs: ComponentRuns,
    pairs: Sequence[EncodedPair],
    kind: str,
    metric: Metric,
    direction: str,
    method: str,
    steps: int,
) -> Scores:
    """[b, N] the same from gradients."""
    if isinstance(runs, LatentRuns):
        columns = []
        for hook_point, site in runs.sites.items():
            layer = layer_of(hook_point)
            found = latent_scores(runs.model, pairs, site, layer, metric[1], direction, method=method, steps=steps)
            columns += [found.latents[:, site.chosen], found.error[:, None]]
        return torch.cat(columns, dim=1).numpy()
    found = edge_scores(runs.model, pairs, dict([metric]), direction, method=method, steps=steps)
    table = found.edges[metric[0]][:, :, 0] if kind == "edges" else found.nodes[metric[0]][:, 1:]
    return table.double().numpy()
