"""Text from a frozen model, token by token, also while somebody changes it as it runs.

The keys and values of what stands already are kept, so each new token costs one position. They are those of the
changed run itself: an intervention is applied to the prompt once and then to each single token, as it would be if the
whole text ran again. An engine that keeps none (transformer-lens) runs the whole text for every token instead, which
gives the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .interface import FrozenModel, Intervention
from .lean import LeanModel
from .past import Past

__all__ = ["Growing", "Steer", "generate"]

Steer = Callable[[torch.Tensor], Sequence[Intervention]]
"""The interventions of a pass over these tokens [b, q]: all of the prompt, then one at a time."""


class Growing:
    """A text that a model reads piece by piece.

    Args:
        model: the frozen model.
        steer: what changes it on the way; None: nothing.
        cached: keep keys and values; default wherever the engine can.
    """

    def __init__(self, model: FrozenModel, steer: Steer | None = None, *, cached: bool = True) -> None:
        self._model, self._steer = model, steer
        self._lean = model if cached and isinstance(model, LeanModel) else None
        self._past: Past | None = None
        self._tokens: torch.Tensor | None = None

    @torch.no_grad()
    def feed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Read the next tokens [b, q]; returns the logits [b, V] of what follows them, on the model's device.

        Raises:
            UsageError: the text would be longer than the model's context.
        """
        tokens = tokens.to(self._model.device)
        start = 0 if self._tokens is None else self._tokens.shape[1]
        everything = tokens if self._tokens is None else torch.cat([self._tokens, tokens], dim=1)
        self._tokens = everything
        if self._lean is not None:
            return self._on(self._lean, everything, start)
        last = torch.full((len(tokens),), everything.shape[1] - 1, device=tokens.device)
        return self._model.run(everything, self._changes(everything), positions=last)

    def _on(self, model: LeanModel, everything: torch.Tensor, start: int) -> torch.Tensor:
        """The positions from `start` on alone, behind the keys and values of this very run."""
        edit = model._editing(self._changes(everything[:, start:]))
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        hidden = model._embed(everything)[:, start:]
        hidden = model._walk(hidden, 0, edit, start=start, past=self._past, kept=kept)
        self._past = Past([key for key, _ in kept], [value for _, value in kept])
        last = torch.full((len(hidden),), hidden.shape[1] - 1, device=hidden.device)
        return model._unembed(hidden, edit, last, 0)

    def _changes(self, tokens: torch.Tensor) -> Sequence[Intervention]:
        return self._steer(tokens) if self._steer else ()


def generate(
    model: FrozenModel,
    prompt: Sequence[int],
    n: int,
    *,
    steer: Steer | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    cached: bool = True,
    stop: Callable[[], None] = lambda: None,
) -> list[int]:
    """Up to `n` token ids that continue `prompt` (ids, BOS first); fewer where the model ends the text.

    Special tokens are no text: none is drawn but the one that ends it.

    Args:
        steer: what changes the model on the way.
        temperature: 0 takes the likeliest token; else tokens are drawn from softmax(logits / temperature).
        seed: of the draws, the same whatever the device.
        cached: keep keys and values.
        stop: called before each token; it may raise to stop.

    Raises:
        UsageError: prompt and continuation do not fit into the model's context.
    """
    end = model.tokenizer.eos_token_id
    never = torch.tensor([i for i in model.special_ids if i != end and i < model.d_vocab], dtype=torch.long)
    dice = torch.Generator().manual_seed(seed)
    growing, found = Growing(model, steer, cached=cached), []
    logits = growing.feed(torch.tensor([list(prompt)])) if n else None
    while logits is not None and len(found) < n:
        stop()
        row = logits[0].float().cpu().index_fill(0, never, -torch.inf)
        token = int(
            row.argmax() if not temperature else torch.multinomial(_shares(row, temperature), 1, generator=dice)
        )
        if token == end:
            break
        found.append(token)
        logits = growing.feed(torch.tensor([[token]])) if len(found) < n else None
    return found


def _shares(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Probabilities [V], in float64 so that a low temperature loses nothing."""
    return (logits.double() / temperature).softmax(-1)
