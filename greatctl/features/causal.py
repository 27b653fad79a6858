"""Does a latent do what its concept says? Trials on prompt pairs, and what they weigh.

Three ways of changing a latent (`ablate` it, `clamp` it to its peak, `steer` along its row by so many mean norms
of the residual stream) are tried on both prompts of each pair, at several strengths. What counts is what the
latent's presence adds to the pair's logit difference, so a positive effect means "towards the concept" for all
three. A number alone says little, since a push in any direction moves logits: the same distances are gone along
random directions, and other latents that fire as often are treated likewise. The pair is the unit of every test,
and the price (how far the next-token distribution moves on unrelated text, and how much worse it predicts it) is
printed beside the effect.

All that asks whether the latent is enough to move the concept, or needed. A push may also work through a pathway that
sleeps in the model's own runs (Makelov et al. 2023, arXiv 2311.17030), so the `complement` is patched too: the corrupted
prompt's activation is taken as it is, all but the latent, which keeps what it has in the clean run. The share of the
pair's logit difference that then is still there is what the latent carries where nobody pushes it.

One strength, `REFERENCE`, is written down here before anybody looks: the tests are at that one, and the others
make the dose-response.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .. import stats
from .steering import unit

__all__ = ["KINDS", "REFERENCE", "STRENGTHS", "Outcomes", "Readings", "Trial", "equal_firing", "trials_of", "weigh"]

STRENGTHS = (0.125, 0.25, 0.5, 1.0)
REFERENCE = 0.5  # mean norms
PRICED = 8  # random directions whose damage is measured
KINDS = (
    "ablate", "clamp", "steer", "complement",
    "random", "random-ablate", "random-complement", "other-steer", "other-ablate",
)  # fmt: skip
_QUANTILE = 0.95
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Readings:
    """Latent activations [n, p, n_latents] float32 at places of some texts; `where` [n, p] is False where no SAE reads."""

    acts: Tensor
    where: Tensor


@dataclass(frozen=True)
class Trial:
    """One change of the residual stream.

    Attributes:
        kind: of `KINDS`, or the name of a baseline direction.
        latent: the latent, or the one that a random direction stands in for, or -1.
        strength: mean norms for steering, the value for a clamp, else 0.
        draw: number of the random direction, else 0.
        direction: [d] of norm 1.
        sign: 1 where the latent is added, -1 where it is taken away.
        pairs: amounts [n, p] on the prompts.
        windows: amounts [w, q] on unrelated text, None where the damage is not measured.
        prompts: of each pair that it is tried on; 1 is the corrupted one alone.
    """

    kind: str
    latent: int
    strength: float
    draw: int
    direction: Tensor
    sign: float
    pairs: Tensor
    windows: Tensor | None = None
    prompts: int = 2


@dataclass(frozen=True)
class Outcomes:
    """What the trials did.

    Attributes:
        effects: [n_trials, n_pairs] float64, what presence adds to the logit difference, the mean over the pair's
            prompts that were tried.
        gap: [n_pairs] float64, how far apart the untouched prompts are: clean minus corrupted logit difference.
        kl, ce: [n_trials] float64, nats a token on unrelated text, NaN where not measured: KL(before || after) and
            the rise of the cross-entropy.
        clusters: the cluster of each pair.
    """

    effects: Floats
    kl: Floats
    ce: Floats
    clusters: Sequence[str]
    gap: Floats


def equal_firing(density: Tensor, latents: Sequence[int], n: int) -> list[int]:
    """At least `n` other latents that fire, those whose density is nearest to each latent's in turn (ratio-wise).

    Args:
        density: share of tokens on which each latent fires, [d_sae].
    """
    free = {int(i) for i in density.nonzero().flatten()} - set(latents)
    levels, chosen = density.double().clamp_min(1e-12).log(), []
    order = [iter((levels - levels[i]).abs().argsort(stable=True).tolist()) for i in latents]
    while order and free and len(chosen) < n:
        for near in order:
            found = next((i for i in near if i in free), None)
            if found is not None:
                free.remove(found)
                chosen.append(found)
    return chosen


def trials_of(
    prompts: Readings,
    windows: Readings,
    rows: Tensor,
    latents: Sequence[int],
    others: Sequence[int],
    *,
    apart: Tensor,
    norm: float,
    peaks: Sequence[float],
    random: Tensor,
    baselines: Mapping[str, Tensor],
    strengths: Sequence[float] = STRENGTHS,
) -> list[Trial]:
    """All trials of a concept.

    Args:
        prompts, windows: activations of `latents` and then `others`.
        rows: what a unit of each adds, [n_latents + n_others, d].
        apart: how far each of `latents` at a place of a corrupted prompt is from the place of the clean one that
            corresponds, [n, p, n_latents]; 0 elsewhere.
        norm: mean norm of the residual stream.
        peaks: the value to clamp each of `latents` to.
        random: [n_random, d] of norm 1, shared by all latents.
        baselines: name -> a direction [d] to steer along for comparison.
    """
    lengths, units = rows.norm(dim=-1), unit(rows)
    on, at = prompts.where.float(), windows.where.float()

    def steer(kind: str, latent: int, strength: float, direction: Tensor, draw: int = 0, price: bool = True) -> Trial:
        step = strength * norm
        return Trial(kind, latent, strength, draw, direction, 1.0, step * on, step * at if price else None)

    def clamp(kind: str, latent: int, column: int, value: float, way: Tensor | None = None, draw: int = 0) -> Trial:
        on_pairs, on_windows = (
            (value - read.acts[..., column]) * read.where * lengths[column] for read in (prompts, windows)
        )
        sign, price = (1.0 if kind == "clamp" else -1.0), kind in ("ablate", "clamp")
        direction = units[column] if way is None else way
        return Trial(kind, latent, value, draw, direction, sign, on_pairs, on_windows if price else None)

    def keep(kind: str, latent: int, column: int, way: Tensor, draw: int = 0) -> Trial:
        return Trial(kind, latent, 0.0, draw, way, 1.0, apart[..., column] * lengths[column], prompts=1)

    trials: list[Trial] = []
    for column, latent in enumerate(latents):
        trials.append(clamp("ablate", latent, column, 0.0))
        trials.append(clamp("clamp", latent, column, peaks[column]))
        trials.append(keep("complement", latent, column, units[column]))
        trials += [steer("steer", latent, strength, units[column]) for strength in strengths]
        trials += [clamp("random-ablate", latent, column, 0.0, way, draw) for draw, way in enumerate(random)]
        trials += [keep("random-complement", latent, column, way, draw) for draw, way in enumerate(random)]
    for column, latent in enumerate(others, len(latents)):
        trials.append(clamp("other-ablate", latent, column, 0.0))
        trials.append(steer("other-steer", latent, REFERENCE, units[column], price=False))
    for draw, way in enumerate(random):
        trials += [steer("random", -1, s, way, draw, price=s == REFERENCE and draw < PRICED) for s in strengths]
    for name, direction in baselines.items():
        trials += [steer(name, -1, strength, unit(direction.float())) for strength in strengths]
    return trials


def weigh(
    trials: Sequence[Trial], outcomes: Outcomes, latents: Sequence[int], seed: int
) -> dict[int, dict[str, float]]:
    """What the trials say of each latent; NaN where there was nothing to measure.

    effect, low, high       mean over pairs of steering at `REFERENCE`, in logits, and its bootstrap interval
    p_value, p_max_t        sign flips over pairs (or clusters of pairs), alone and over all latents
    floor                   the smallest p that so many pairs can give
    placebo                 95th percentile of |effect| over the random directions
    placebo_p               share of random directions (and the latent) that move the pairs as far
    placebo_latents         95th percentile of |effect| over other latents of equal firing
    dose                    share of steps up in strength at which the mean effect grows in its own direction
    slope                   logits a mean norm, least squares through 0 over all strengths
    ablation, ablation_p, ablation_placebo    what ablating takes away, likewise; the placebo over both kinds
    clamp, clamp_p          what the clamp to the peak adds
    complement              share of the pairs' own logit difference (clean minus corrupted, `complement_gap` logits, the
                            mean over pairs) that is kept where all but the latent is the corrupted prompt's: the mean
                            of what is kept over the mean difference, since one pair with a tiny difference would rule a
                            mean of shares; 1 where the latent carries it all, 0 where none of it. NaN, as are the
                            next two, where the mean difference is not above 0: then there is none to keep
    complement_placebo      95th percentile of |share| over random directions that are gone along as far at each place
    complement_p            share of random directions (and the latent) whose |share| is as large
    damage_kl, damage_ce    price of steering at `REFERENCE` on unrelated text, nats a token
    placebo_kl              the same of the random directions, mean
    n_pairs, n_units        pairs, and what is independent among them
    """
    find = _Finder(trials, outcomes)
    tests = {
        kind: stats.sign_flip_max_t(find.columns(kind, latents, strength).T, seed=seed, clusters=outcomes.clusters)
        for kind, strength in (("steer", REFERENCE), ("ablate", None), ("clamp", None))
    }
    steered = find.columns("steer", latents, REFERENCE).T
    interval = stats.bootstrap_interval(steered, outcomes.clusters, seed=seed)
    random = np.abs(find.means("random", REFERENCE))
    others, other_ablated = np.abs(find.means("other-steer")), np.abs(find.means("other-ablate"))
    found = {}
    for j, latent in enumerate(latents):
        effect = float(steered[:, j].mean())
        ablated = np.abs(find.means("random-ablate", latent=latent))
        at = find.one("steer", latent, REFERENCE)
        found[latent] = {
            "effect": effect,
            "low": float(interval.low[j]),
            "high": float(interval.high[j]),
            "p_value": float(tests["steer"].p[j]),
            "p_max_t": float(tests["steer"].p_max_t[j]),
            "floor": tests["steer"].floor,
            "placebo": _high(random),
            "placebo_p": float(((random >= abs(effect)).sum() + 1) / (len(random) + 1)),
            "placebo_latents": _high(others),
            **_dose(find, latent, effect),
            "ablation": float(find.columns("ablate", [latent]).mean()),
            "ablation_p": float(tests["ablate"].p[j]),
            "ablation_placebo": max(_high(ablated), _high(other_ablated), key=lambda x: (x == x, x)),
            "clamp": float(find.columns("clamp", [latent]).mean()),
            "clamp_p": float(tests["clamp"].p[j]),
            **_complement(find, latent),
            "damage_kl": float(outcomes.kl[at]),
            "damage_ce": float(outcomes.ce[at]),
            "placebo_kl": _price(outcomes.kl[find.rows("random", REFERENCE)]),
            "n_pairs": float(outcomes.effects.shape[1]),
            "n_units": float(tests["steer"].n_units),
        }
    return found


def _dose(find: _Finder, latent: int, effect: float) -> dict[str, float]:
    """The dose-response of a latent."""
    rows = sorted(find.rows("steer", latent=latent), key=lambda i: find.trials[i].strength)
    strengths = np.array([find.trials[i].strength for i in rows])
    means = find.outcomes.effects[rows].mean(axis=1)
    steps = np.diff(means, prepend=0.0) * np.sign(effect)
    slope = float((strengths * means).sum() / (strengths**2).sum())
    return {"dose": float((steps > 0).mean()) if len(rows) else float("nan"), "slope": slope}


def _complement(find: _Finder, latent: int) -> dict[str, float]:
    """What the latent alone keeps of the pairs' own logit differences."""
    gap, unknown = float(find.outcomes.gap.mean()), float("nan")
    keys = ("complement", "complement_placebo", "complement_p")
    if not gap > 0:
        return {"complement_gap": gap, **dict.fromkeys(keys, unknown)}
    share = float(find.columns("complement", [latent]).mean()) / gap
    random = np.abs(find.means("random-complement", latent=latent)) / gap
    p = float(((random >= share).sum() + 1) / (len(random) + 1))
    return {"complement_gap": gap, **dict(zip(keys, (share, _high(random), p), strict=True))}


def _price(nats: Floats) -> float:
    """The mean of what was measured, NaN of nothing."""
    known = nats[~np.isnan(nats)]
    return float(known.mean()) if len(known) else float("nan")


def _high(values: Floats) -> float:
    """The 95th percentile, NaN of nothing."""
    return float(np.quantile(values, _QUANTILE)) if len(values) else float("nan")


class _Finder:
    """Trials by what they are."""

    def __init__(self, trials: Sequence[Trial], outcomes: Outcomes) -> None:
        self.trials, self.outcomes = trials, outcomes
        self._by_kind: dict[str, list[int]] = {}
        for i, trial in enumerate(trials):
            self._by_kind.setdefault(trial.kind, []).append(i)

    def rows(self, kind: str, strength: float | None = None, latent: int | None = None) -> list[int]:
        """Numbers of the trials of a kind, at a strength, of a latent (None: any)."""
        return [
            i
            for i in self._by_kind.get(kind, [])
            if strength in (None, self.trials[i].strength) and latent in (None, self.trials[i].latent)
        ]

    def one(self, kind: str, latent: int, strength: float | None = None) -> int:
        """The number of the only such trial."""
        (found,) = self.rows(kind, strength, latent)
        return found

    def columns(self, kind: str, latents: Sequence[int], strength: float | None = None) -> Floats:
        """Effects [n_latents, n_pairs] of the one such trial of each latent."""
        return self.outcomes.effects[[self.one(kind, latent, strength) for latent in latents]]

    def means(self, kind: str, strength: float | None = None, latent: int | None = None) -> Floats:
        """Mean effect over pairs of each such trial."""
        return self.outcomes.effects[self.rows(kind, strength, latent)].mean(axis=1)
