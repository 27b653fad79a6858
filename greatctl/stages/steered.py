"""Texts written while the model is steered, and what the steering did to it.

For each way of steering a prompt: the text; how far the next-token distribution moved, measured along the text that
the model writes by itself, so that all ways are compared on the same words; and the perplexity of unrelated text, which
is what the steering costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..features.steering import Steering
from ..model.generate import generate
from ..model.interface import FrozenModel, Intervention
from ..model.tokenizer import encode
from .branches import Branch, Price

__all__ = ["Steered", "Way"]

_LARGEST = 700.0  # nats; the exponential of more is no number


@dataclass(frozen=True)
class Way:
    """One way of steering.

    Attributes:
        kind: `none`, `latent`, `diff-means`, `random` or `prompt`.
        steering: what it does at the hook point; None: nothing.
        norms: how far, in mean norms of the residual stream; None where that is not what it does.
        plain: it puts the plain words before the text.
    """

    kind: str
    steering: Steering | None = None
    norms: float | None = None
    plain: bool = False


class Steered:
    """A model that is steered at one hook point.

    Args:
        plain: ids of the words that a plain prompt puts before the text.
    """

    def __init__(self, model: FrozenModel, hook_point: str, plain: Sequence[int]) -> None:
        self._model, self._hook_point, self._plain = model, hook_point, list(plain)
        self._special = torch.tensor(list(model.special_ids), device=model.device)

    def read(self, prompt: str, n: int) -> list[int]:
        """Token ids of a prompt that `n` more shall follow.

        Raises:
            UsageError: they do not fit into the model's context, with the plain words before them.
        """
        ids = encode(self._model.tokenizer, prompt)
        if len(ids) + len(self._plain) + n > self._model.n_ctx:
            raise UsageError(
                f"a prompt of {len(ids) - 1:,} tokens leaves no room for {n:,} more",
                why=f"{self._model.name} reads at most {self._model.n_ctx:,}; the prompt begins {prompt[:40]!r}",
                fix="give a shorter --prompt, or fewer --tokens",
            )
        return ids

    def texts(
        self,
        prompt: Sequence[int],
        ways: Sequence[Way],
        n: int,
        temperature: float,
        seed: int,
        stop: Callable[[], None] = lambda: None,
    ) -> list[dict[str, object]]:
        """One row a way: kind, text, norms and kl; the first way is the model as it is.

        A model that was pushed so far that it gives no numbers writes nothing.

        `kl` is KL(as it is || steered) of the next token, nats, the mean over the places from the end of the prompt on in
        the text that the model writes by itself.
        """
        rows: list[dict[str, object]] = []
        own: list[int] = []
        for way in ways:
            start = self._before(prompt, way)
            steer = self._steer(way.steering) if way.steering else None
            kl = self._moved([*prompt, *own], len(prompt) - 1, way) if rows else 0.0
            n_here = n if kl is not None else 0
            found = generate(self._model, start, n_here, steer=steer, temperature=temperature, seed=seed, stop=stop)
            own = own if rows else found
            rows.append({"kind": way.kind, "text": self._decoded(start, found), "norms": way.norms, "kl": kl})
        return rows

    @torch.no_grad()
    def price(self, ways: Sequence[Way], neutral: Branch) -> dict[str, float | None]:
        """Kind -> perplexity of the neutral text; None where it is no number."""
        price, found = Price(neutral), {}
        everyone = torch.arange(len(neutral.tokens), device=neutral.value.device)
        for way in ways:
            if way.plain:
                found[way.kind] = _perplexity(self._behind_words(neutral.tokens))
            elif way.steering is None:
                found[way.kind] = _perplexity(price.nats)
            else:
                changed = way.steering(neutral.value, neutral.where)
                rises = [price.of(some, changed[some])[1] for some in everyone.split(price.together)]
                found[way.kind] = _perplexity(price.nats + float(torch.cat(rises).mean()))
        return found

    def _before(self, prompt: Sequence[int], way: Way) -> list[int]:
        return [prompt[0], *self._plain, *prompt[1:]] if way.plain else list(prompt)

    def _steer(self, steering: Steering) -> Callable[[Tensor], Sequence[Intervention]]:
        """What the generating run asks for before each pass; it sees tokens, never positions."""

        def steer(tokens: Tensor) -> Sequence[Intervention]:
            where = ~torch.isin(tokens, self._special)
            return [Intervention(self._hook_point, lambda value: steering(value, where))]

        return steer

    @torch.no_grad()
    def _moved(self, ids: Sequence[int], first: int, way: Way) -> float | None:
        """Mean KL over the places from `first` on; None where it is no number."""
        tokens = torch.tensor([list(ids)], device=self._model.device)
        before = self._model.run(tokens)[0, first:]
        if way.plain:
            after = self._model.run(torch.tensor([self._before(ids, way)], device=self._model.device))
            after = after[0, first + len(self._plain) :]
        else:
            assert way.steering is not None
            after = self._model.run(tokens, self._steer(way.steering)(tokens))[0, first:]
        p, q = before.float().log_softmax(-1), after.float().log_softmax(-1)
        kl = float((p.exp() * (p - q)).sum(-1).mean())
        return kl if math.isfinite(kl) else None

    @torch.no_grad()
    def _behind_words(self, windows: Tensor) -> float:
        """Cross-entropy of windows behind the plain words, nats a token."""
        words = torch.tensor(self._plain, device=windows.device).expand(len(windows), -1)
        room = self._model.n_ctx - len(self._plain)
        tokens = torch.cat([windows[:, :1], words, windows[:, 1:room]], dim=1)
        nats = []
        for row in tokens:
            logits = self._model.run(row[None])[0, len(self._plain) : -1].float()
            nats.append(torch.nn.functional.cross_entropy(logits, row[len(self._plain) + 1 :]))
        return float(torch.stack(nats).mean())

    def _decoded(self, start: Sequence[int], found: Sequence[int]) -> str:
        """The text behind `start`, with the space that a tokenizer drops at the beginning of a text."""
        tokenizer: Any = self._model.tokenizer
        head, whole = (tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (start, [*start, *found]))
        return whole[len(head) :] if whole.startswith(head) else tokenizer.decode(found)


def _perplexity(nats: float) -> float | None:
    return math.exp(nats) if nats < _LARGEST else None
