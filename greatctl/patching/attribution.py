"""Attribution: what patching every cell would do, estimated from gradients of a few runs.

*Attribution patching* (AtP, arXiv 2403.00745) takes the change that a patch would make at a site, times the
gradient of the metric there in the run that is patched: two unpatched runs and one way back for all cells of all
layers. It is the first term of a series, and misleads where the rest is not small:

* through a saturated softmax. `attribution-qk` mends it for queries and keys (AtP*'s QK-fix): the change of the
  attention pattern is computed exactly, with the patched query or key and everything else as it was, and only what
  follows from the pattern is estimated. It mends the q and k nodes themselves (and edges into them, see
  `edge_attribution`); a head, a value or a stretch of the stream whose influence passes through the *next* layer's
  saturated softmax is estimated as badly as before.
* where the gradient at one end of the way says nothing about the middle. *Integrated gradients* average it over
  the way: `eap-ig` (arXiv 2403.17806) moves the input embedding from the patched run's to the other's and reads all
  sites there; `eap-ig-activations` moves the site itself, one layer at a time, which costs a run a layer and
  step. The attributions of a layer then sum to the effect of patching all of it, the better the more steps.

* where the ways from a site to the logits cancel in the sum. `attribution-drop` (AtP* in whole: GradDrop, and the
  QK-fix at q and k) takes the gradient once for each block with that block's part left out, and the mean of the
  absolute values: a size without a direction. Here it has the sign that leads to the other run, so that tables read
  as always. It costs half as many ways back as there are blocks.

Nothing here replaces a patch. `calibration` says how far the estimates can be believed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UsageError
from ..extend.contracts import PatchMetric
from .cells import Plan, plan_of
from .gradients import Passed, Tape, cotangents, must_be_differentiable
from .latents import Latents
from .memory import tokens_at_once
from .metrics import measure
from .pairs import EncodedPair
from .runs import Edit, Group, ends, prepare, widened
from .sites import Donor

__all__ = ["DROP", "METHODS", "LatentScores", "Path", "latent_scores", "must_have_direction", "node_scores", "path"]

DROP = "attribution-drop"
METHODS = ("attribution", "attribution-qk", DROP, "eap-ig", "eap-ig-activations")
PATTERN = "attn.hook_pattern"
Table = dict[str, dict[int, torch.Tensor]]


@dataclass(frozen=True)
class Path:
    """One point of the way from the patched run to the other, and how much it counts.

    Attributes:
        at: 0 is the patched run, 1 the other.
        weight: all weights sum to 1.
    """

    at: float
    weight: float


def path(method: str, steps: int) -> list[Path]:
    """The points at which gradients are taken: the patched run, or the middles of `steps` equal parts of the way.

    Middles converge with the square of the steps, where the ends that EAP-IG's authors take do with their number.
    """
    if not method.startswith("eap-ig"):
        return [Path(0.0, 1.0)]
    return [Path((i + 0.5) / steps, 1 / steps) for i in range(steps)]


def node_scores(
    model: Any,
    group: Group,
    metrics: Mapping[str, PatchMetric],
    direction: str = "denoising",
    *,
    method: str = "attribution",
    steps: int = 5,
    positions: str = "all",
    plan: Plan | None = None,
) -> Table:
    """Estimated effect of patching every unit and place of the group's site, at each of its layers.

    Args:
        model: the frozen model.
        group: prepared pairs, with the site (`prepare(model, pairs, "z")`).
        metrics: name -> differentiable metric.
        direction: `denoising` or `noising`.
        method: one of `METHODS`; the QK-fix changes q and k alone. `attribution-drop` gives sizes, see above.
        steps: points of integrated gradients.
        positions: `each`, `spans` or `all`; not looked at with a plan.
        plan: the places, where they are known.

    Returns:
        metric -> layer -> [b, units, places], float64 on the CPU, in the metric's unit: patched minus unpatched. The
        stream has one unit. NaN where a pair has no such place.

    Raises:
        UsageError: a metric has no gradient, or the method does not go with an ablation.
    """
    must_be_differentiable(metrics)
    _must_fit(group, method)
    work = _Nodes(model, group, metrics, direction, method, plan or plan_of(group, direction, positions))
    for point in path(method, steps):
        for tapes, layers in work.tapes(point):
            _, back = cotangents(metrics, group, [tape.logits for tape in tapes])
            for number, tape in enumerate(tapes):
                for passed in tape.back(tape.ending(back[number]), down_to=min(layers), drops=method == DROP):
                    if passed.block.layer in layers:
                        work.add(number, passed, point.weight)
    return work.table()


class _Nodes:
    """The sums of one call of `node_scores`."""

    def __init__(
        self,
        model: Any,
        group: Group,
        metrics: Mapping[str, PatchMetric],
        direction: str,
        method: str,
        plan: Plan,
    ) -> None:
        self.model, self.group, self.metrics, self.direction, self.plan = model, group, metrics, direction, plan
        self.method, self.base = method, ends(direction)[0]
        self.layers = sorted(group.values)
        self.fixes = method in ("attribution-qk", DROP) and group.site.name in ("q", "k")
        self.sums: dict[int, torch.Tensor] = {}

    def kind(self, layer: int) -> str:
        return self.group.site.at(layer).split(".", 2)[2]

    def tapes(self, point: Path) -> Iterator[tuple[list[Tape], list[int]]]:
        """The runs of one point of the path, each with the layers that are read off it; a tape a branch."""
        kinds = [self.kind(self.layers[0]), *([PATTERN] if self.fixes else [])]
        branches = range(len(self.group.branches))
        if self.method == "eap-ig-activations":
            for layer in self.layers:
                yield [self._moved(n, layer, point, kinds) for n in branches], [layer]
        elif self.method == "eap-ig":
            yield [self._between(n, point, kinds) for n in branches], self.layers
        else:
            yield [self._unpatched(n, kinds) for n in branches], self.layers

    def _unpatched(self, number: int, kinds: Sequence[str]) -> Tape:
        branch, first = self.group.branches[number], self.layers[0]
        known = [layer for layer in range(first, self.model.n_layers) if layer in branch.residuals]
        entering = [branch.residuals[layer][self.base] for layer in known]
        whole = len(known) == self.model.n_layers - first
        return Tape(self.model, entering if whole else entering[0], kinds, first=first, m=branch.m)

    def _between(self, number: int, point: Path, kinds: Sequence[str]) -> Tape:
        residual = between(self.model, self.group, self.direction, number, point.at)
        return Tape(self.model, residual, kinds, m=self.group.branches[number].m)

    def _moved(self, number: int, layer: int, point: Path, kinds: Sequence[str]) -> Tape:
        """A run with the whole site of a layer moved along the way. What moves is cut off from its past: the gradient
        wanted is that at the site."""
        branch = self.group.branches[number]
        old, new = self._ends(number, layer)
        step = (_activation(self.group, new) - _activation(self.group, old)) * self._there(number, layer)

        def move(value: torch.Tensor) -> torch.Tensor:
            return (value + point.at * step.to(value.dtype)).detach().requires_grad_()

        edits = {layer: [Edit(self.group.site.at(layer), move)]}
        return Tape(self.model, branch.residuals[layer][self.base], kinds, first=layer, edits=edits, m=branch.m)

    def _there(self, number: int, layer: int) -> torch.Tensor:
        """1 at the positions that any place overwrites, in the shape of the site."""
        mask = self.plan.masks[number].any(0)
        shape = self._ends(number, layer)[0].ndim
        if self.group.site.name == "pattern":
            return mask[:, None, :, None]
        return mask.reshape(*mask.shape, *([1] * (shape - 2)))

    def _ends(self, number: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the site keeps of the patched run, and what would be written."""
        branch = self.group.branches[number]
        return branch.values[layer][self.base], self.group.donor(self.direction, layer, number)

    def add(self, number: int, passed: Passed, weight: float) -> None:
        """Add a block's share [k, b, units, places], of all k gradients that it has."""
        layer, mask = passed.block.layer, self.plan.masks[number]
        old, new = self._ends(number, layer)
        if self.fixes:
            found = _with_exact_patterns(self.model, self.group, passed, new, self.plan.masks[number])
        else:
            each = contributions(self.group, old, new, passed.grads[self.kind(layer)])
            found = torch.einsum("kbpu,wbp->kbuw", each, mask.to(each.dtype))
        found = found.double() * weight
        self.sums[layer] = self.sums[layer] + found if layer in self.sums else found

    def table(self) -> Table:
        exists = self.plan.exists.T[:, None]
        sums = self._sizes() if self.method == DROP else self.sums
        return {
            name: {layer: torch.where(exists, total[at].cpu(), torch.nan) for layer, total in sorted(sums.items())}
            for at, name in enumerate(self.metrics)
        }

    def _sizes(self) -> dict[int, torch.Tensor]:
        """layer -> [k, b, units, places]: the mean over dropped blocks, with the sign of the way to the other run. A
        block below the site changes nothing for it, and one that holds the site has no estimate of it."""
        base, source = ends(self.direction)
        gaps = []
        for name, metric in self.metrics.items():
            both = [
                measure(name, metric, self.group.logits[run], self.group.end_answers(run)) for run in (source, base)
            ]
            gaps.append(both[0] - both[1])
        sign = torch.stack(gaps).sign()[:, :, None, None]
        n, found = self.model.n_layers, {}
        without = 0 if self.group.site.whole else 1
        for layer, total in self.sums.items():
            rows = total.unflatten(0, (-1, len(self.metrics))).abs()
            mean = (rows[1:].sum(0) + layer * rows[0]) / (n - without) if n > without else rows[0]
            found[layer] = sign.to(mean) * mean
        return found


def contributions(group: Group, old: torch.Tensor, new: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Change times gradient, [k, b, p, units], for k gradients [k, …] at the site."""
    site, grad = group.site, widened(grad)
    change = widened(new) - widened(old)
    if isinstance(site, Latents):
        n, d = len(site.chosen), grad.shape[-1]
        made, error = change[..., n : n + d], change[..., n + d :]
        forms = [(form * grad).sum(-1) for form in (made, error, made + error, -old[..., n + d :])]
        latents = (grad @ site.directions(site.chosen).T.to(grad)) * change[..., :n]
        return torch.cat([latents, torch.stack(forms, -1)], dim=-1)
    product = change * grad
    if site.name == "pattern":
        return product.sum(-1).transpose(2, 3)
    if site.name == "mlp_post":
        return product
    return product.sum(-1, keepdim=product.ndim == 4)


@dataclass(frozen=True)
class LatentScores:
    """Estimated effects of an SAE's latents; `latents.sum(1) + error` is that of the whole activation.

    Attributes:
        latents: [b, d_sae] float64.
        error: [b] what the latents do not explain, as a node of its own.
    """

    latents: torch.Tensor
    error: torch.Tensor


def latent_scores(
    model: Any,
    pairs: Sequence[EncodedPair],
    site: Latents,
    layer: int,
    metric: PatchMetric,
    direction: str = "denoising",
    *,
    method: str = "attribution",
    steps: int = 5,
) -> LatentScores:
    """Every latent's estimated effect, over all positions, and the error term's.

    The gradient is taken with respect to the latents by the decoder's own transpose, so that no latent needs a run or
    a row of its own.

    Args:
        model: the frozen model.
        pairs: b pairs of the same two lengths.
        site: the SAE at its hook point; which latents it has chosen does not matter.
        layer: the hook point's layer.
        metric: differentiable.
        direction, method, steps: as in `node_scores`; not `attribution-drop`.

    Raises:
        UsageError: the metric has no gradient, or the method no direction.
    """
    must_have_direction(method)
    group = prepare(model, pairs, Latents(site.sae, site.hook_point, special_ids=sorted(site.skips)), layers=[layer])
    must_be_differentiable({"": metric})
    work = _Nodes(model, group, {"": metric}, direction, method, plan_of(group, direction, "all"))
    latents = torch.zeros((), dtype=torch.float64)
    error = torch.zeros((), dtype=torch.float64)
    for point in path(method, steps):
        for tapes, _ in work.tapes(point):
            _, back = cotangents({"": metric}, group, [tape.logits for tape in tapes])
            for number, tape in enumerate(tapes):
                passed = deque(tape.back(tape.ending(back[number]), down_to=layer), maxlen=1).pop()
                grad = passed.grads[work.kind(layer)][0].float() * work.plan.masks[number][0, :, :, None]
                old, new = (_activation(group, value) for value in work._ends(number, layer))
                change = site.acts(new) - site.acts(old)
                latents = latents + point.weight * (change * site.pulled(grad)).sum(1).double().cpu()
                d = grad.shape[-1]
                errors = (work._ends(number, layer)[1] - work._ends(number, layer)[0])[..., d:]
                error = error + point.weight * (errors * grad).sum((1, 2)).double().cpu()
    return LatentScores(latents, error)


def must_have_direction(method: str) -> None:
    """Refuse sizes where signed estimates are summed or chosen by.

    Raises:
        UsageError: the method is `attribution-drop`.
    """
    if method == DROP:
        raise UsageError(
            f"--method {DROP} estimates nodes alone",
            why="it gives sizes without a direction, block by block",
            fix="use attribution or eap-ig",
        )


def between(model: Any, group: Group, direction: str, number: int, at: float) -> torch.Tensor:
    """The stream entering block 0 [b, p, d], so far on the way from the patched run to the other; positions without
    counterpart stay."""
    base, source = ends(direction)
    name, branch = "blocks.0.hook_resid_pre", group.branches[number]
    old, other = (model.capture(branch.tokens[run], [name])[name] for run in (base, source))
    match = group.match(direction, number)
    new = other[torch.arange(len(other), device=other.device)[:, None], match.clamp_min(0)]
    return torch.where((match >= 0)[:, :, None], old + at * (new - old), old)


def pattern_of(model: Any, layer: int, residual: torch.Tensor, edits: Sequence[Edit]) -> torch.Tensor:
    """The attention pattern [c, n_heads, p, p] of one block under edits of its queries or keys."""
    seen: list[torch.Tensor] = []

    def look(value: torch.Tensor) -> torch.Tensor:
        seen.append(value)
        raise _Seen

    with torch.no_grad(), suppress(_Seen):
        model.resume(layer, residual, [*edits, Edit(f"blocks.{layer}.{PATTERN}", look)])
    return seen[0]


class _Seen(Exception):
    """Ends a run once a pattern was seen."""


def _with_exact_patterns(
    model: Any, group: Group, passed: Passed, new: torch.Tensor, masks: torch.Tensor
) -> torch.Tensor:
    """[k, b, heads, places]: the exact change of the pattern under each patch, times the gradient at the pattern."""
    block, site = passed.block, group.site
    before, grad = block.values[PATTERN].detach(), widened(passed.grads[PATTERN])
    w, b, p = masks.shape
    heads = new.shape[2]
    found = grad.new_zeros(len(grad), b, heads, w)
    places, rows = masks.any(-1).nonzero(as_tuple=True)
    size = max(1, tokens_at_once(model.device) // p)
    for first in range(0, len(rows), size):
        place, row = places[first : first + size], rows[first : first + size]
        mask = masks[place, row]

        def write(value: torch.Tensor, row: torch.Tensor = row, mask: torch.Tensor = mask) -> torch.Tensor:
            return site.write(value, None, Donor(new, row), mask, None)

        after = pattern_of(model, block.layer, block.entering.detach()[row], [Edit(site.at(block.layer), write)])
        effect = (widened(after - before[row]) * grad[:, row]).sum((-1, -2))  # [k, c, query heads]
        found[:, row, :, place] = effect.unflatten(-1, (heads, -1)).sum(-1).transpose(0, 1)
    return found


def _activation(group: Group, kept: torch.Tensor) -> torch.Tensor:
    """The activation itself, from what a site keeps of it: latents keep their reconstruction and the error."""
    if not isinstance(group.site, Latents):
        return kept
    n = len(group.site.chosen)
    made, error = kept[..., n:].chunk(2, dim=-1)
    return made + error


def _must_fit(group: Group, method: str) -> None:
    if method == "eap-ig" and group.corruption != "counterpart":
        raise UsageError(
            f"--method eap-ig does not go with --corruption {group.corruption}",
            why="it moves one prompt's embedding to the other's, and an ablation has no other prompt",
            fix="use --method eap-ig-activations, which moves the site itself",
        )
