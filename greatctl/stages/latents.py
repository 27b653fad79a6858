"""The one latent that a command was asked for: a number that its SAE has, and one number alone."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator

from ..errors import ManifestError
from .saes import Sae

__all__ = ["OneLatent", "check_latent"]


def _one(value: object) -> object:
    """The only entry of a list: --latent twice would else quietly mean the last."""
    if not isinstance(value, list):
        return value
    if len(value) != 1:
        raise ValueError("it must be one latent; run the command once for each")
    return value[0]


OneLatent = Annotated[int | None, BeforeValidator(_one)]


def check_latent(sae: Sae, latent: int) -> None:
    """Refuse a latent that the SAE does not have.

    Raises:
        ManifestError: it is out of range; `code` is `out-of-range`.
    """
    if not 0 <= latent < sae.d_sae:
        raise ManifestError(
            f"latent {latent} is out of range",
            why=f"{sae.path.name} has {sae.d_sae:,} latents, 0 to {sae.d_sae - 1}",
            fix=f"use --latent with a number from 0 to {sae.d_sae - 1}",
            code="out-of-range",
        )
