"""Both runs of a group of pairs, kept as the sweep needs them: logits, entering residuals, keys and values, and
what stands at the site.

Pairs of the same two lengths go together, since a batch is a rectangle and nothing is padded. The clean and
the corrupted run of equally long prompts are computed with the same shapes, so whatever their common prefix
fixes comes out alike. Answers of several tokens need their first tokens behind the prompt, so such a group
has a *branch* for each alternative of each side; all others have one branch, the prompt itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from ..extend.contracts import Answers, SequenceScores
from .answers import answers_of, either, sequence_scores
from .pairs import EncodedPair
from .sites import Donor, Label, Plain

if TYPE_CHECKING:
    from .sources import Source

__all__ = [
    "CLEAN",
    "CORRUPTED",
    "Branch",
    "Edit",
    "Group",
    "PatchSite",
    "Patchable",
    "Start",
    "ends",
    "prepare",
    "score",
    "widened",
]

CLEAN, CORRUPTED = 0, 1
Both = tuple[torch.Tensor, torch.Tensor]


class Edit(NamedTuple):
    """A site and what to do to its tensor; the shape of `greatctl.model.Intervention`."""

    site: str
    edit: Callable[[torch.Tensor], torch.Tensor]


class Start(NamedTuple):
    """Runs that begin in the middle; the shape of `greatctl.model.interface.Start`."""

    layer: int
    residual: torch.Tensor
    interventions: Sequence[Edit]


class Patchable(Protocol):
    """What the sweep needs of `greatctl.model.FrozenModel`; `capture_all`, `climb` and `start` only where
    it `reuses_prefix`."""

    n_layers: int
    device: torch.device

    def capture(self, tokens: torch.Tensor, sites: Sequence[str]) -> dict[str, torch.Tensor]: ...

    def run(
        self, tokens: torch.Tensor, interventions: Any = (), *, positions: torch.Tensor | None = None
    ) -> torch.Tensor: ...

    def resume(
        self,
        layer: int,
        residual: torch.Tensor,
        interventions: Any = (),
        *,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor: ...

    def climb(self, starts: Any, *, positions: torch.Tensor | None = None) -> torch.Tensor: ...


class PatchSite(Protocol):
    """What a site is to the sweep; `Plain` for the model's own, `Latents` for those of an SAE."""

    @property
    def name(self) -> str: ...
    @property
    def whole(self) -> bool: ...
    @property
    def needs_old(self) -> bool: ...
    @property
    def skips(self) -> frozenset[int]: ...
    def at(self, layer: int) -> str: ...
    def label(self, layer: int, unit: int) -> Label: ...
    def read(self, value: torch.Tensor) -> torch.Tensor: ...
    def zero(self, value: torch.Tensor) -> torch.Tensor: ...
    def write(
        self, value: torch.Tensor, old: Donor | None, new: Donor, mask: torch.Tensor, unit: torch.Tensor | None
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class Branch:
    """One rectangle of runs: the prompts, with the same number of answer tokens behind each. Index 0 of a
    two-tuple is the clean run, 1 the corrupted one.

    Attributes:
        tokens: ([b, p], [b, p']), continuation included.
        m: logits that count: the answer position's and one for each token behind it.
        side: `right` or `wrong` where the branch scores an alternative of several tokens, else "".
        targets: [b, m] tokens that those logits should predict (with a side).
        logits: ([b, m, V], [b, m, V]), at least float32.
        residuals: layer -> ([b, p, d], [b, p', d]) entering the block; of the needed layers.
        values: layer -> what the site's `read` keeps of both runs.
        pasts: keys and values of both runs; None where the model does not reuse a prefix.
        ablated: layer -> values [b, p, …] that replace the other run's, and [b, p] whether there is one.
        more: hook point -> both runs there, of those that were asked for besides.
    """

    tokens: Both
    m: int
    side: str
    targets: torch.Tensor | None
    logits: Both
    residuals: dict[int, Both]
    values: dict[int, Both]
    pasts: tuple[Any, Any] | None
    ablated: tuple[dict[int, torch.Tensor], torch.Tensor] | None = None
    more: dict[str, Both] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Pairs of the same two lengths, with both runs at hand.

    Attributes:
        pairs: b pairs.
        site: what is patched.
        branches: one, or one an alternative where answers have several tokens.
        answers: what metrics may look at, b rows; without the scores of sequences, which are a run's own.
        scores: those of the (clean, corrupted) run, where answers have several tokens.
        corruption: `counterpart`, or what takes the place of the other run's values.
    """

    pairs: Sequence[EncodedPair]
    site: PatchSite
    branches: Sequence[Branch]
    answers: Answers
    scores: tuple[SequenceScores | None, SequenceScores | None] = (None, None)
    corruption: str = "counterpart"
    _matches: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict, compare=False)

    @property
    def logits(self) -> Both:
        """([b, V], [b, V]) at the answer position."""
        first = self.branches[0].logits
        return first[CLEAN][:, 0], first[CORRUPTED][:, 0]

    @property
    def residuals(self) -> dict[int, Both]:
        """Of the first branch."""
        return self.branches[0].residuals

    @property
    def values(self) -> dict[int, Both]:
        """Of the first branch."""
        return self.branches[0].values

    @property
    def aligned(self) -> bool:
        """Whether position i of either prompt is the same place."""
        return all(pair.equally_long for pair in self.pairs)

    def lengths(self, direction: str) -> tuple[int, int]:
        """Prompt tokens of (the run that is patched, the run that the values come from)."""
        both = len(self.pairs[0].clean_ids), len(self.pairs[0].corrupted_ids)
        base, source = ends(direction)
        return both[base], both[source]

    def end_answers(self, run: int) -> Answers:
        """The answers as a metric sees them on an unpatched run."""
        return with_scores(self.answers, self.scores[run])

    def match(self, direction: str, branch: int) -> torch.Tensor:
        """[b, p] the position of the source run that corresponds to each of the patched run's, -1: none."""
        base, source = ends(direction)
        key = (base, branch)
        if key not in self._matches:
            length, own = (self.branches[branch].tokens[run].shape[1] for run in (base, source))
            found = torch.full((len(self.pairs), length), -1, dtype=torch.long)
            for row, pair in enumerate(self.pairs):
                for places in pair.alignment:
                    found[row, places[base]] = places[source]
            behind = self.branches[branch].m - 1
            if behind and self.corruption == "counterpart":  # the same answer tokens stand behind both prompts
                found[:, length - behind :] = torch.arange(own - behind, own)
            self._matches[key] = found.to(self.branches[branch].tokens[base].device)
        return self._matches[key]

    def there(self, direction: str, branch: int) -> torch.Tensor:
        """[b, p] bool: whether a position of the patched run has a value to take."""
        ablated = self.branches[branch].ablated
        return self.match(direction, branch) >= 0 if ablated is None else ablated[1]

    def donor(self, direction: str, layer: int, branch: int) -> torch.Tensor:
        """The values to write, in the positions of the patched run."""
        here = self.branches[branch]
        if here.ablated is not None:
            return here.ablated[0][layer]
        values = here.values[layer][ends(direction)[1]]
        if self.aligned:
            return values
        index = self.match(direction, branch).clamp_min(0)
        return values[torch.arange(len(values), device=values.device)[:, None], index]


@torch.no_grad()
def prepare(
    model: Patchable,
    pairs: Sequence[EncodedPair],
    site: str | PatchSite,
    *,
    layers: Sequence[int] | None = None,
    source: Source | None = None,
    more: Sequence[str] = (),
) -> Group:
    """Run both prompts of pairs of the same two lengths and keep what the sweep resumes from and patches in.

    Args:
        model: the frozen model.
        pairs: b pairs; their answers' alternatives have equally many tokens.
        site: a name of `SITES`, or an SAE's latents.
        layers: the layers that will be patched; default all.
        source: what replaces the corrupted prompt's values; default nothing does.
        more: hook points that are kept besides.
    """
    site = Plain(site) if isinstance(site, str) else site
    layers = range(model.n_layers) if layers is None else layers
    branches, scores = [], []
    for side, number in _alternatives(pairs):
        branches.append(_branch(model, pairs, site, layers, side, number, source, more))
    first = branches[0].logits
    answers = answers_of(pairs, first[CLEAN][:, 0], first[CORRUPTED][:, 0])
    for run in (CLEAN, CORRUPTED):
        scores.append(score(branches, [branch.logits[run] for branch in branches], None))
    kind = source.kind if source else "counterpart"
    return Group(pairs, site, branches, answers, (scores[0], scores[1]), kind)


def score(
    branches: Sequence[Branch], logits: Sequence[torch.Tensor], rows: torch.Tensor | None
) -> SequenceScores | None:
    """What the alternatives of both sides score in runs with these logits [c, m, V]; None for plain branches."""
    if not branches[0].side:
        return None
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {"right": [], "wrong": []}
    for branch, values in zip(branches, logits, strict=True):
        assert branch.targets is not None
        found[branch.side].append(sequence_scores(values, branch.targets if rows is None else branch.targets[rows]))
    return SequenceScores(
        *(either([scores[which] for scores in found[side]]) for which in (0, 1) for side in ("right", "wrong"))
    )


def with_scores(answers: Answers, scores: SequenceScores | None) -> Answers:
    """Answers with the scores of one run."""
    values = {name: value for name, value in vars(answers).items() if name != "sequence"}
    return answers if scores is None else Answers(**values, sequence=scores)


def ends(direction: str) -> tuple[int, int]:
    """(run that is patched, run that the values come from)."""
    return (CORRUPTED, CLEAN) if direction == "denoising" else (CLEAN, CORRUPTED)


def widened(logits: torch.Tensor) -> torch.Tensor:
    """Logits in float32 at least: metrics take differences of large numbers."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def reuses_prefix(model: Patchable) -> bool:
    """Whether a run can be resumed behind a prefix whose keys and values are known."""
    return bool(getattr(model, "reuses_prefix", False))


def _alternatives(pairs: Sequence[EncodedPair]) -> list[tuple[str, int]]:
    """(side, number) of each alternative that needs its own run; one nameless branch where all are one token."""
    first = pairs[0]
    if all(len(a) == 1 for pair in pairs for a in (*pair.answers, *pair.wrong_answers)):
        return [("", 0)]
    sides = (("right", first.answers), ("wrong", first.wrong_answers))
    return [(side, number) for side, alternatives in sides for number in range(len(alternatives))]


def _branch(
    model: Patchable,
    pairs: Sequence[EncodedPair],
    site: PatchSite,
    layers: Sequence[int],
    side: str,
    number: int,
    source: Source | None,
    more: Sequence[str],
) -> Branch:
    chosen = [(p.answers if side != "wrong" else p.wrong_answers)[number] if side else () for p in pairs]
    behind = [ids[:-1] for ids in chosen]
    m = len(behind[0]) + 1
    entering = {at: f"blocks.{at}.hook_resid_pre" for at in layers}
    names = list(dict.fromkeys([*(name for at in layers for name in (entering[at], site.at(at))), *more]))
    tokens, logits, found, pasts = [], [], [], []
    for prompts in ([p.clean_ids for p in pairs], [p.corrupted_ids for p in pairs]):
        ids = torch.tensor([a + b for a, b in zip(prompts, behind, strict=True)], device=model.device)
        values, past, heads = _both(model, ids, names, m)
        tokens.append(ids)
        logits.append(heads)
        found.append(values)
        pasts.append(past)

    def both(name: str) -> Both:
        return found[CLEAN][name], found[CORRUPTED][name]

    def kept(layer: int) -> Both:
        clean, corrupted = both(site.at(layer))
        return site.read(clean), site.read(corrupted)

    values = {layer: kept(layer) for layer in layers}
    return Branch(
        (tokens[CLEAN], tokens[CORRUPTED]),
        m,
        side,
        torch.tensor(chosen, device=model.device) if side else None,
        (logits[CLEAN], logits[CORRUPTED]),
        {layer: both(name) for layer, name in entering.items()},
        values,
        None if pasts[CLEAN] is None else (pasts[CLEAN], pasts[CORRUPTED]),
        None if source is None else source.values(model, pairs, site, values),
        {name: both(name) for name in more},
    )


def _both(
    model: Any, tokens: torch.Tensor, names: Sequence[str], m: int
) -> tuple[dict[str, torch.Tensor], Any, torch.Tensor]:
    """Activations, past and the last m positions' logits [b, m, V] of a run; in one pass where that works."""
    last = torch.full((len(tokens),), tokens.shape[1] - 1, device=tokens.device)
    if not reuses_prefix(model):
        logits = model.run(tokens, positions=last)[:, None] if m == 1 else model.run(tokens)[:, -m:]
        return model.capture(tokens, names), None, widened(logits)
    end = f"blocks.{model.n_layers - 1}.hook_resid_post"
    values, past = model.capture_all(tokens, list(dict.fromkeys([*names, end])))
    where = last if m == 1 else None
    logits = model.resume(model.n_layers, values[end], positions=where)
    return values, past, widened(logits[:, None] if m == 1 else logits[:, -m:])
