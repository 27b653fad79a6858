"""From activations to verdicts, by written rules.

A sparse autoencoder always offers a latent that "is about greatness". This module is the sceptic: it says
`supported` only where authors differ by role more than chance allows after every latent that was looked at
has been paid for, where authors that were held out agree, and where neither one author nor era, genre or
topic explains the difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import comb, isfinite

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..stats import auroc, benjamini_hochberg, label_permutation, smallest_detectable_effect
from .adjust import Adjusted, adjust, icc, outlying_author
from .agreement import HALF, LEVEL, Agreement, agreement
from .exposure import on_equal_text
from .units import Cells, Documents, gather

__all__ = ["LEVEL", "VERDICTS", "Judgement", "judge", "moves_as_predicted", "weigh", "with_causal"]

VERDICTS = (
    "supported",
    "not-supported",
    "not-separable-author",
    "not-separable-era",
    "not-separable-genre",
    "not-separable-topic",
    "no-causal-effect",
    "unstable",
    "underpowered",
)
CLEAR = 0.01  # false discovery rate at which something other than role is named
_DRAWS = 10_000
_NAMED_AS = {"translated": "genre"}  # a translation's language is a way of writing, as a genre is
_LOOKS = ("heldout_effect", "heldout_auroc", "works_auroc", "matched_share", "hard_share")

Floats = NDArray[np.float64]
Causal = Mapping[int, Mapping[str, float]]


def judge(
    activations: NDArray, documents: Documents, *, causal: Causal | None = None, seed: int = 0
) -> list[dict[str, object]]:
    """Does a latent follow role (characters against controls) across authors? One verdict a latent.

    Rules, in the order in which they decide:

    1. The author is the unit. Windows are averaged into works, works (equally weighted) into authors. Authors
       who appear under both roles are left out, since they cannot separate the roles.
    2. `underpowered`: the author labels can be arranged in so few ways that no p-value of .05 or less can
       come out.
    3. The test: author labels are permuted, over all authors. p_value is two-sided for the latent alone;
       q_value is paid for all latents given (max-T, family-wise, so it bounds the false discovery rate too). Both are
       the larger of two: for the difference of means as it is, and in its own standard error (Welch's t), since
       latents are sparse and the roles may differ in works an author, and so in spread. Where that leaves anything
       at .05 and authors of one role have more text than those of the other, both must also hold on equal amounts: each
       author is cut down to the works and windows of one of the other role, at random, eight times, and the mean p over
       these counts if it is the largest (`exposure` says why).
       Choosing latents first, by whatever authors, is therefore paid for when all latents that could have
       been chosen are given.
    4. If q_value is above .05 the latent is not supported. Where something simpler clearly explains it (false
       discovery rate .01 over latents and explanations), that is named: `not-separable-author` when one
       author stands out from the others of the same role, `not-separable-era`, `-genre` or `-topic` when the
       levels of that factor differ with role and author held in the model. Else `not-supported`.
    5. If q_value is .05 or less, role must survive:
       a. the loss of any one author: the difference keeps its sign, half its size and p <= .05, else
          `not-separable-author`;
       b. era, genre, topic and translation, one at a time, as random effects beside a random author effect: the
          difference keeps half its size and p <= .05, else `not-separable-…` (translation counts as genre); the
          factor with the strongest claim is named. A factor that says exactly what role says can never be
          separated from it;
       c. the hard controls (`hard`), who share the subject of praise and not the role: against them alone half of
          the difference is left, else `not-separable-topic`;
       d. matched controls (`matches`; at least three): between a control and the works that it was matched to,
          half of the difference is left on average, else `unstable`;
       e. the held-out authors (`split` = `heldout-author`): the difference has the same sign as among the
          others, and where at least 50 arrangements of their labels exist, its one-sided permutation p is .05
          or less; and the kept-apart works (`heldout-work`) of the others lie on their author's side: AUROC
          above .5 against controls. Else `unstable`;
       f. where `causal` has the latent: what it adds to the concept's logit difference on held-out pairs has the
          sign that role predicts and lies beyond what equally large random directions do, p is .05 or less, and
          it grows at more than half of the steps up in strength (each where it is given), else
          `no-causal-effect`.
    6. What is left is `supported`. Its sign may be negative: the reason says so.

    `greatctl interpret`, which also has the texts and the control autoencoders, adds one rule to these: a supported
    latent that the style of the texts (character n-grams) or an autoencoder that had nothing to learn (frozen
    decoder, random model) or random directions equal on the held-out authors becomes `not-supported`.

    Args:
        activations: [n_windows, n_latents] float; mean activation of each latent in each window.
        documents: one row a window (rows, columns, or a pyarrow or pandas table): author, work, role (`character`,
            `seed` or `control`), era, genre, topic, split, and if there are any translated, matches, hard. A
            missing factor is not adjusted for, and the reason says so.
        causal: latent (column) -> {"effect": what it adds to the concept's logit difference, "placebo": what 95 %
            of random directions stay below in size (or "placebo_low" and "placebo_high"), "p_value" and "p_max_t"
            (over all that were tried; the larger counts), "dose": share of steps up in strength at which the effect
            grows}; all but effect may be missing.
        seed: seed of the permutations.

    Returns:
        Rows in the order of the latents: latent (column number), effect (standard deviations between authors,
        positive when characters are higher), auroc (over authors), p_value, q_value, verdict, reason.

    Raises:
        UsageError: shapes do not fit, a number is not finite, a document has no author or an unknown role, or `causal`
            has no effect for a latent.
    """
    wrong = [latent for latent, row in (causal or {}).items() if not isinstance(row, Mapping) or "effect" not in row]
    if wrong:
        why = 'each latent needs a mapping with at least "effect"'
        raise UsageError(f"what is causal of latent {wrong[0]} cannot be read", why=why)
    found = weigh(gather(activations, documents), causal=causal, seed=seed)
    names = ("latent", "effect", "auroc", "p_value", "q_value", "verdict", "reason")
    return [{name: row[name] for name in names} for row in found.rows]


@dataclass(frozen=True)
class Judgement:
    """What `weigh` found: rows with `judge`'s keys, icc and what `Agreement` measured; `power` says what could have
    been found."""

    rows: list[dict[str, object]]
    power: str
    smallest_effect: float
    n_characters: int
    n_controls: int


def weigh(cells: Cells, *, causal: Causal | None = None, seed: int = 0) -> Judgement:
    """Apply the rules of `judge` to cells; see there.

    Each row also has icc (the clustering by author), heldout_effect, heldout_auroc, works_auroc, matched_share and
    hard_share (see `Agreement`; NaN where there is nothing to look at).
    """
    role = cells.author_role
    n_latents, n1, n0 = cells.means.shape[1], int(role.sum()), int((~role).sum())
    # of two-sided label arrangements the mirrored one ties when the groups are equal
    floor = (2 if n1 == n0 else 1) / comb(n1 + n0, n1) if n1 and n0 else 1.0
    smallest = smallest_detectable_effect(n1, n0, LEVEL / max(n_latents, 1)) if n1 and n0 else float("inf")
    power = _power(cells, n1, n0, smallest, floor)
    if not n1 or not n0 or not n_latents:
        rows = [_row(i, 0.0, 0.5, 1.0, 1.0, "underpowered", power) for i in range(n_latents)]
        return Judgement(rows, power, smallest, n1, n0)
    test = label_permutation(cells.author_means, role, draws=_DRAWS, seed=seed)
    own = label_permutation(cells.author_means, role, draws=_DRAWS, seed=seed, statistic="studentised")
    p_value, all_text = np.maximum(test.p, own.p), np.maximum(test.p_max_t, own.p_max_t)
    equal = on_equal_text(cells, seed=seed) if (all_text <= LEVEL).any() else None
    q_value = all_text if equal is None else np.maximum(all_text, equal.p_max_t)
    p_value = p_value if equal is None else np.maximum(p_value, equal.p)
    area = auroc(cells.author_means, role)
    looks = agreement(cells)
    if floor > LEVEL:
        verdicts = [("underpowered", power)] * n_latents
    else:
        verdicts = _Rules(cells, looks, test.effect, q_value, all_text, power).decide()
    more = {"icc": icc(cells.means, cells.author), **{name: getattr(looks, name) for name in _LOOKS}}
    columns = zip(test.effect, area, p_value, q_value, verdicts, strict=True)
    rows = [
        _row(i, float(e), float(a), float(p), float(q), *verdict) | {k: float(v[i]) for k, v in more.items()}
        for i, (e, a, p, q, verdict) in enumerate(columns)
    ]
    rows = [with_causal(row, (causal or {}).get(i)) for i, row in enumerate(rows)]
    return Judgement(rows, power, smallest, n1, n0)


def with_causal(row: Mapping[str, object], causal: Mapping[str, float] | None) -> dict[str, object]:
    """A row once rule 5f has been applied: only a supported latent has anything to lose."""
    if row["verdict"] != "supported" or causal is None:
        return dict(row)
    moves, how = moves_as_predicted(causal, float(row["effect"]))  # type: ignore[arg-type]
    verdict = "supported" if moves else "no-causal-effect"
    return {**row, "verdict": verdict, "reason": f"{row['reason']}; {how}"}


class _Rules:
    """The rules 4 to 6 of `judge` over all latents of one corpus."""

    def __init__(self, cells: Cells, looks: Agreement, effect: Floats, q: Floats, all_text: Floats, power: str) -> None:
        self.cells, self.looks, self.effect, self.power = cells, looks, effect, power
        self.q, self.all_text = q, all_text  # the second before authors were cut down to equal amounts
        self.adjusted: dict[str, Adjusted] = {name: adjust(cells, name) for name in cells.factors}
        self.author_p, self.author = outlying_author(cells)
        self.explained = self._explanations()

    def decide(self) -> list[tuple[str, str]]:
        """(verdict, reason) of each latent."""
        return [self._significant(i) if q <= LEVEL else self._silent(i) for i, q in enumerate(self.q)]

    def _explanations(self) -> list[tuple[str, float] | None]:
        """The strongest explanation other than role of each latent, where it is clear: (name, p)."""
        names = ["author", *self.adjusted]
        p = np.stack([self.author_p, *(a.factor_p for a in self.adjusted.values())])
        clear = benjamini_hochberg(p.ravel()).reshape(p.shape) <= CLEAR
        best = p.argmin(axis=0)
        return [(names[b], float(p[b, i])) if clear[b, i] else None for i, b in enumerate(best)]

    def _silent(self, i: int) -> tuple[str, str]:
        said = f"role over all {self.cells.unit}s: q {self.q[i]:.2g} (effect {self.effect[i]:+.2f} sd)"
        if self.all_text[i] <= LEVEL:
            said += f" on equal amounts of text, {self.all_text[i]:.2g} on all of it"
        explanation = self.explained[i]
        if explanation is None:
            return "not-supported", f"{said}. {self.power}"
        name, p = explanation
        who = f"{self.cells.authors[self.author[i]]} alone" if name == "author" else _word(name)
        return f"not-separable-{_NAMED_AS.get(name, name)}", f"{said}; it follows {who} (p {p:.1e})"

    def _significant(self, i: int) -> tuple[str, str]:
        way = "higher" if self.effect[i] > 0 else "lower"
        said = f"{way} in characters by {abs(self.effect[i]):.2f} sd, q {self.q[i]:.2g} over all latents given"
        if not self.looks.without_one[i]:
            who = self.cells.authors[self.looks.worst[i]]
            return "not-separable-author", f"{said}; without {who} it does not hold"
        failing = [name for name, a in self.adjusted.items() if not _survives(a, i)]
        if failing:
            name = min(failing, key=lambda n: (not self.adjusted[n].aliased, self.adjusted[n].factor_p[i]))
            named = f"not-separable-{_NAMED_AS.get(name, name)}"
            return named, f"{said}; {_adjustment(_word(name), self.adjusted[name], i)}"
        if self.looks.hard_share[i] < HALF:
            return "not-separable-topic", f"{said}; {self._hard(i)}"
        if self.looks.matched_share[i] < HALF:
            return "unstable", f"{said}; {self._matched(i)}"
        agrees, heldout = self.looks.heldout(i)
        if not agrees:
            return "unstable", f"{said}; {heldout}"
        if self.looks.works_auroc[i] <= 0.5:
            return "unstable", f"{said}; works kept apart: AUROC {self.looks.works_auroc[i]:.2f}"
        return "supported", f"{said}; {self._context(i)}; {heldout}"

    def _hard(self, i: int) -> str:
        return f"{self.looks.hard_share[i]:.0%} of it is left against the hard controls"

    def _matched(self, i: int) -> str:
        share, p = self.looks.matched_share[i], self.looks.matched_p[i]
        return f"{share:.0%} of it is left in {self.looks.n_matched} matched pairs (p {p:.2g})"

    def _context(self, i: int) -> str:
        missing = [name for name in ("era", "genre", "topic") if name not in self.adjusted]
        kept = f"holds without any one {self.cells.unit}" + "".join(f", within {_word(n)}" for n in self.adjusted)
        kept += f"; {self._hard(i)}" if isfinite(self.looks.hard_share[i]) else ""
        kept += f"; {self._matched(i)}" if isfinite(self.looks.matched_share[i]) else ""
        return kept + (f"; not adjusted for {', '.join(missing)} (not given)" if missing else "")


def _word(factor: str) -> str:
    return "translation" if factor == "translated" else factor


def moves_as_predicted(causal: Mapping[str, float], way: float) -> tuple[bool, str]:
    """Whether an intervention on the latent moves the concept as its role (`way`: +1 or -1) predicts, and how."""
    effect = causal["effect"]
    high = causal.get("placebo_high", causal.get("placebo", 0.0))
    low = causal.get("placebo_low", -high)
    beyond = effect > high if way > 0 else effect < low
    said = f"effect {effect:.3g} {'beyond' if beyond else 'not beyond'} the placebo band [{low:.3g}, {high:.3g}]"
    p = max(causal.get("p_value", 0.0), causal.get("p_max_t", 0.0))  # p_max_t is paid for all that were tried
    dose = causal.get("dose", 1.0)
    said += f", p {p:.2g}" if "p_value" in causal or "p_max_t" in causal else ""
    said += "" if dose > HALF else ", and it does not grow with the dose"
    return beyond and p <= LEVEL and dose > HALF, said


def _survives(adjusted: Adjusted, i: int) -> bool:
    return not adjusted.aliased and bool(adjusted.share[i] >= HALF and adjusted.p[i] <= LEVEL)


def _adjustment(name: str, adjusted: Adjusted, i: int) -> str:
    if adjusted.aliased:
        return f"{name} and role say the same in this corpus"
    return f"{adjusted.share[i]:.0%} of it is left beside {name} (p {adjusted.p[i]:.2g})"


def _power(cells: Cells, n1: int, n0: int, smallest: float, floor: float) -> str:
    left_out = f" ({len(cells.ambiguous)} under both roles left out)" if cells.ambiguous else ""
    who = f"{n1} {cells.unit}s of characters against {n0} of controls{left_out}"
    if floor > LEVEL:
        return f"{who}: the smallest p that can come out is {floor:.2g}, so nothing can be told"
    n_latents, alone = cells.means.shape[1], smallest_detectable_effect(n1, n0)
    looks = f"with {n_latents:,} latents looked at; {alone:.1f} for one latent written down before"
    return f"{who}: effects below {smallest:.1f} sd between {cells.unit} means may be missed (power .8, {looks})"


def _row(latent: int, effect: float, area: float, p: float, q: float, verdict: str, reason: str) -> dict[str, object]:
    return {
        "latent": latent,
        "effect": effect,
        "auroc": area,
        "p_value": p,
        "q_value": q,
        "verdict": verdict,
        "reason": reason,
        **dict.fromkeys(("icc", *_LOOKS), float("nan")),
    }
