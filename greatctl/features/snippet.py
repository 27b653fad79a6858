"""A snippet, token by token: which latents fire, and how strongly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Snippet", "read_snippet"]


@dataclass(frozen=True)
class Snippet:
    """What a text makes the latents do.

    Attributes:
        tokens: the tokens' texts, BOS left out.
        top: rows {token, position, latent, activation}: the strongest latents of each token, tokens in order,
            strongest first; position counts `tokens` from 0. A latent that does not fire is not listed.
        strength: the strongest activation at each token.
    """

    tokens: list[str]
    top: list[dict[str, object]]
    strength: list[float]


def read_snippet(latents: Tensor, pieces: Sequence[str], top_k: int) -> Snippet:
    """Collect the strongest latents of each token.

    Args:
        latents: [n_tokens, d_sae] >= 0, one row a piece.
        pieces: the tokens' texts.
        top_k: latents a token.
    """
    values, which = (part[:, :top_k] for part in latents.float().cpu().sort(dim=1, descending=True, stable=True))
    top: list[dict[str, object]] = [
        {"token": token, "position": position, "latent": latent, "activation": value}
        for position, token in enumerate(pieces)
        for latent, value in zip(which[position].tolist(), values[position].tolist(), strict=True)
        if value > 0
    ]
    return Snippet(list(pieces), top, values[:, 0].tolist())
