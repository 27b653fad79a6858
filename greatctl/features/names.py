"""What a latent is called where nobody named it: the tokens it fires on and the tokens it raises.

That is less than a label and claims less: it is read off the tables, and nobody has to believe it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from .inert import inert

__all__ = ["fallback_name", "fallback_names"]

_FIRES, _RAISES, _TOKEN = 3, 2, 16


def fallback_name(top_tokens: Sequence[str], top_logit_tokens: Sequence[str]) -> str:
    """`fires on 'remain', 'remained'; raises 'ing', 'der'`, as far as there are any."""
    fires, raises = _listed(top_tokens, _FIRES), _listed(top_logit_tokens, _RAISES)
    if not fires:
        return "never fires"
    return f"fires on {fires}" + (f"; raises {raises}" if raises else "")


def fallback_names(folder: Path, latents: Sequence[int] | None = None) -> dict[int, str]:
    """The fallback of each latent (default: of all) of the feature tables in `folder`."""
    table = pq.read_table(
        folder / "latents.parquet",
        columns=["latent", "top_tokens", "top_logit_tokens"],
        filters=None if latents is None else pc.field("latent").isin(list(latents)),
    )
    return {r["latent"]: fallback_name(r["top_tokens"], r["top_logit_tokens"]) for r in table.to_pylist()}


def _listed(tokens: Sequence[str], most: int) -> str:
    words = dict.fromkeys(inert(token, _TOKEN) or repr(token) for token in tokens)
    return ", ".join(f"'{word}'" for word in list(words)[:most])
