"""Both runs of a group of pairs, kept as the sweep needs them: logits, entering residuals, values at the
site.

Pairs of one length go together, since a batch is a rectangle and nothing is padded. The clean and the
corrupted run are computed with the same shapes, so whatever their common prefix fixes comes out alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from ..extend.contracts import Answers
from .pairs import EncodedPair

__all__ = ["CLEAN", "CORRUPTED", "Edit", "Group", "Patchable", "ends", "prepare", "rows_of", "widened"]

CLEAN, CORRUPTED = 0, 1


class Edit(NamedTuple):
    """A site and what to do to its tensor; the shape of `greatctl.model.Intervention`."""

    site: str
    edit: Callable[[torch.Tensor], torch.Tensor]


class Patchable(Protocol):
    """What the sweep needs of `greatctl.model.FrozenModel`."""

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


@dataclass(frozen=True)
class Group:
    """Pairs of one length, with both runs at hand. Index 0 of a two-tuple is the clean run, 1 the corrupted
    one.

    Attributes:
        pairs: b pairs of p tokens.
        site: which activation is patched.
        logits: ([b, V], [b, V]) at the answer position (the last one), at least float32.
        residuals: per layer ([b, p, d], [b, p, d]), entering the block.
        values: per layer ([b, p, d], [b, p, d]) at the site.
        answers: what metrics may look at, b rows.
    """

    pairs: Sequence[EncodedPair]
    site: str
    logits: tuple[torch.Tensor, torch.Tensor]
    residuals: Sequence[tuple[torch.Tensor, torch.Tensor]]
    values: Sequence[tuple[torch.Tensor, torch.Tensor]]
    answers: Answers

    def select(self, rows: Sequence[int]) -> Group:
        """The same group with some of its pairs."""
        index = torch.tensor(rows, dtype=torch.long, device=self.logits[0].device)

        def of(both: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            return both[0][index], both[1][index]

        return Group(
            [self.pairs[i] for i in rows],
            self.site,
            of(self.logits),
            [of(r) for r in self.residuals],
            [of(v) for v in self.values],
            rows_of(self.answers, index),
        )


@torch.no_grad()
def prepare(model: Patchable, pairs: Sequence[EncodedPair], site: str) -> Group:
    """Run both prompts of pairs of one length and keep what the sweep resumes from and patches in."""
    names = [f"blocks.{layer}.hook_{kind}" for layer in range(model.n_layers) for kind in ("resid_pre", site)]
    last = torch.full((len(pairs),), pairs[0].length - 1, device=model.device)
    logits, found = [], []
    for ids in ([p.clean_ids for p in pairs], [p.corrupted_ids for p in pairs]):
        tokens = torch.tensor(ids, dtype=torch.long, device=model.device)
        logits.append(widened(model.run(tokens, positions=last)))
        found.append(model.capture(tokens, list(dict.fromkeys(names))))

    def both(layer: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        name = f"blocks.{layer}.hook_{kind}"
        return found[CLEAN][name], found[CORRUPTED][name]

    answers = Answers(
        torch.tensor([p.answer_id for p in pairs], device=model.device),
        torch.tensor([p.wrong_answer_id for p in pairs], device=model.device),
        logits[CLEAN],
        logits[CORRUPTED],
    )
    layers = range(model.n_layers)
    return Group(
        pairs,
        site,
        (logits[CLEAN], logits[CORRUPTED]),
        [both(layer, "resid_pre") for layer in layers],
        [both(layer, site) for layer in layers],
        answers,
    )


def ends(direction: str) -> tuple[int, int]:
    """(run that is patched, run that the values come from)."""
    return (CORRUPTED, CLEAN) if direction == "denoising" else (CLEAN, CORRUPTED)


def rows_of(answers: Answers, index: torch.Tensor) -> Answers:
    """Answers of some rows, repeated or reordered as `index` says."""
    return Answers(
        answers.answer[index],
        answers.wrong_answer[index],
        answers.clean_logits[index],
        answers.corrupted_logits[index],
    )


def widened(logits: torch.Tensor) -> torch.Tensor:
    """Logits in float32 at least: metrics take differences of large numbers."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
