"""What the rest of greatctl may ask of a frozen model.

Sites carry TransformerLens names: `blocks.L.hook_resid_pre` is the residual stream that enters block L. An
intervention is a function applied to the tensor at a site; whatever is computed after it sees the edited
tensor, the skip connection included. This module needs no torch at run time, so that a stage can check names
before anything heavy is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import UsageError, did_you_mean

if TYPE_CHECKING:
    import torch

__all__ = [
    "BLOCK_SITES",
    "RESIDUAL_SITES",
    "FrozenModel",
    "Intervention",
    "Site",
    "site_names",
    "unknown_site",
]

# in the order in which a block computes them
RESIDUAL_SITES = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")
# what TransformerLens calls the rest of a block, besides its parts (attn.…, mlp.…, ln1.…)
BLOCK_SITES = (*RESIDUAL_SITES, "hook_in", "hook_out", "hook_attn_in", "hook_mlp_in")
_SITE = re.compile(r"blocks\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Intervention:
    """Replace the tensor at `site` by `edit(tensor)`, of the same shape [batch, position, …]."""

    site: str
    edit: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Site:
    """A site's name taken apart: `blocks.3.hook_resid_mid` is layer 3, kind `hook_resid_mid`."""

    layer: int
    kind: str

    @classmethod
    def parse(cls, name: str) -> Site:
        """Take a name apart.

        Raises:
            UsageError: it is not of the form `blocks.L.KIND`.
        """
        match = _SITE.fullmatch(name)
        if match is None:
            example = "blocks.4.hook_resid_post"
            raise UsageError(
                f"unknown hook point {name!r}", why=f"a hook point looks like {example}", fix=f"use {example}"
            )
        return cls(int(match[1]), match[2])

    @property
    def is_plausible(self) -> bool:
        """False for a misspelt kind, as far as that can be told before a model is loaded."""
        return "." in self.kind or self.kind in BLOCK_SITES

    @property
    def is_residual(self) -> bool:
        """Whether the lean engine knows this kind."""
        return self.kind in RESIDUAL_SITES


def site_names(n_layers: int) -> list[str]:
    """The residual sites of all blocks, in the order in which they are computed."""
    return [f"blocks.{layer}.{kind}" for layer in range(n_layers) for kind in RESIDUAL_SITES]


def unknown_site(name: str, known: Iterable[str]) -> UsageError:
    """The error for a site that a model does not have, with the nearest names."""
    return UsageError(f"unknown hook point {name!r}", why="this model has no such site", fix=did_you_mean(name, known))


class FrozenModel(Protocol):
    """A language model that is read and edited, never trained. Its parameters require no gradient.

    Tokens are right-padded without a mask: a causal model's values at real positions do not depend on what
    follows.

    Attributes:
        name: the name it was asked for by; `revision` pins its weights.
        n_layers: blocks of the whole model, also where fewer are loaded.
        n_ctx: longest sequence.
        special_ids: token ids that are no text (BOS, EOS, reserved ones, padding), sorted.
    """

    name: str
    revision: str
    engine: str
    n_layers: int
    d_model: int
    d_vocab: int
    n_ctx: int
    device: torch.device
    dtype: torch.dtype
    tokenizer: Any
    special_ids: list[int]

    def sites(self) -> list[str]:
        """Every site this engine can capture."""
        ...

    def capture(self, tokens: torch.Tensor, sites: Sequence[str]) -> dict[str, torch.Tensor]:
        """Activations [b, p, d] at `sites` for tokens [b, p] (long); stops after the deepest. No gradients.

        Raises:
            UsageError: a site is unknown (nearest names given).
        """
        ...

    def run(
        self,
        tokens: torch.Tensor,
        interventions: Sequence[Intervention] = (),
        *,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [b, p, V] for tokens [b, p], or [b, V] at `positions` [b], the only ones unembedded.

        Gradients flow where an edit brings them in.

        Raises:
            UsageError: an intervention's site is unknown.
            StageError: an intervention's site was not reached, or an edit changed the shape.
        """
        ...

    def resume(
        self,
        layer: int,
        residual: torch.Tensor,
        interventions: Sequence[Intervention] = (),
        *,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Like `run`, but from `residual` [b, p, d] entering block `layer` (its `hook_resid_pre`)."""
        ...

    def check(self, tokens: torch.Tensor, sites: Sequence[str]) -> dict[str, float]:
        """Hold `capture` against the unmodified Hugging Face forward on tokens [b, p].

        Returns site -> largest difference relative to the largest value there.

        Raises:
            StageError: a site disagrees beyond the tolerance of the dtype; names the site.
        """
        ...
