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

    from .past import Past

    Streams = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # what queries, keys and values read

__all__ = [
    "BLOCK_SITES",
    "HEAD_SITES",
    "INPUT_SITES",
    "LEAN_SITES",
    "RESIDUAL_SITES",
    "FrozenModel",
    "Intervention",
    "Site",
    "Start",
    "site_names",
    "unknown_site",
]

# in the order in which a block computes them
RESIDUAL_SITES = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")
HEAD_SITES = ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_pattern", "attn.hook_z")
LEAN_SITES = (
    "hook_resid_pre",
    *HEAD_SITES,
    "hook_attn_out",
    "hook_resid_mid",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
)
# what a single projection reads, before the norm; made only where somebody asks, since the stream is copied per head
INPUT_SITES = ("hook_q_input", "hook_k_input", "hook_v_input", "hook_mlp_in")
# what TransformerLens calls the rest of a block, besides its parts (attn.…, mlp.…, ln1.…)
BLOCK_SITES = (*RESIDUAL_SITES, *INPUT_SITES, "hook_in", "hook_out", "hook_attn_in")
_SITE = re.compile(r"blocks\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Intervention:
    """Replace the tensor at `site` by `edit(tensor)`, of the same shape (see `FrozenModel` for the shapes)."""

    site: str
    edit: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Start:
    """Runs that begin in the middle: `residual` [b, q, d] entering block `layer`, edited by `interventions` of their own."""

    layer: int
    residual: torch.Tensor
    interventions: Sequence[Intervention] = ()


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
        """Whether it is a vector of the residual stream's width, one a position."""
        return self.kind in RESIDUAL_SITES

    @property
    def is_lean(self) -> bool:
        """Whether the lean engine knows this kind."""
        return self.kind in LEAN_SITES or self.kind in INPUT_SITES


def site_names(n_layers: int, kinds: Sequence[str] = LEAN_SITES) -> list[str]:
    """The sites of all blocks, in the order in which they are computed."""
    return [f"blocks.{layer}.{kind}" for layer in range(n_layers) for kind in kinds]


def unknown_site(name: str, known: Iterable[str]) -> UsageError:
    """The error for a site that a model does not have, with the nearest names."""
    return UsageError(f"unknown hook point {name!r}", why="this model has no such site", fix=did_you_mean(name, known))


class FrozenModel(Protocol):
    """A language model that is read and edited, never trained. Its parameters require no gradient.

    Tokens are right-padded without a mask: a causal model's values at real positions do not depend on what
    follows. Below, b is the batch, p the positions of the sequence and q those that are computed (q = p unless a
    run is resumed behind a prefix).

    | site | tensor |
    |---|---|
    | hook_resid_pre, hook_attn_out, hook_resid_mid, hook_mlp_out, hook_resid_post | [b, q, d_model] |
    | attn.hook_q (before RoPE), attn.hook_z | [b, q, n_heads, d_head] |
    | attn.hook_k (before RoPE), attn.hook_v | [b, q, n_kv_heads, d_head] |
    | attn.hook_pattern (the layer then leaves SDPA for an explicit softmax) | [b, n_heads, q, p] |
    | mlp.hook_post (what enters the down projection) | [b, q, d_mlp] |
    | hook_q_input (what each query reads of the stream, before the norm) | [b, q, n_heads, d_model] |
    | hook_k_input, hook_v_input (the same of keys and values) | [b, q, n_kv_heads, d_model] |
    | hook_mlp_in (what the MLP reads of the stream, before the norm) | [b, q, d_model] |

    All tensors are handed out, and handed to edits, on `device`, also where the blocks lie on several devices.

    Attributes:
        name: the name it was asked for by; `revision` pins its weights.
        n_layers: blocks of the whole model, also where fewer are loaded.
        n_kv_heads: key-value heads; each serves n_heads / n_kv_heads query heads.
        d_mlp: width of the MLP's inside.
        n_ctx: longest sequence.
        special_ids: token ids that are no text (BOS, EOS, reserved ones, padding), sorted.
        reuses_prefix: whether `past`, `capture_all`, `climb` and `resume(start=…)` work.
    """

    name: str
    revision: str
    engine: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    device: torch.device
    dtype: torch.dtype
    tokenizer: Any
    special_ids: list[int]
    reuses_prefix: bool

    def sites(self) -> list[str]:
        """Every site this engine can capture; lean knows besides what each projection reads (`INPUT_SITES`)."""
        ...

    def capture(self, tokens: torch.Tensor, sites: Sequence[str]) -> dict[str, torch.Tensor]:
        """Activations at `sites` for tokens [b, p] (long); stops after the deepest. No gradients.

        Raises:
            UsageError: a site is unknown (nearest names given).
        """
        ...

    def capture_all(self, tokens: torch.Tensor, sites: Sequence[str]) -> tuple[dict[str, torch.Tensor], Past]:
        """`capture(tokens, sites)` and `past(tokens)` in one pass over all blocks.

        Raises:
            UsageError: a site is unknown, or the engine keeps no past.
        """
        ...

    def past(self, tokens: torch.Tensor) -> Past:
        """Keys and values of every block for tokens [b, p], for `resume(start=…)`. No gradients."""
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
        start: int = 0,
        past: Past | None = None,
    ) -> torch.Tensor:
        """Like `run`, but from `residual` [b, q, d] entering block `layer` (its `hook_resid_pre`).

        With `start`, the residual holds the positions start .. start + q - 1 alone, and attention sees the keys and
        values of the positions before `start` in `past` (b rows, of a run whose prefix is unchanged). Edits then
        see q positions, logits are [b, q, V]; `positions` stay absolute.

        Raises:
            UsageError: no past, or one that is too short or has other rows; a position before `start`.
        """
        ...

    def climb(
        self,
        starts: Sequence[Start],
        *,
        positions: torch.Tensor | None = None,
        start: int = 0,
        past: Past | None = None,
    ) -> torch.Tensor:
        """Like `resume` for several runs at once that begin at different blocks: one walk, which each joins at its block.

        Args:
            starts: in the order of their layers; all residuals have the same q.
            positions, start, past: as in `resume`, for the rows of all starts one after the other.

        Returns:
            Logits of all rows, [n, q, V], or [n, V] with positions.
        """
        ...

    def head_outputs(self, layer: int, z: torch.Tensor, heads: Sequence[int] | None = None) -> torch.Tensor:
        """What each of n heads of a block (default all) adds to the stream, [..., n, d_model], for z [..., n, d_head].

        With the bias of the output projection, which belongs to no head, their sum is `hook_attn_out`. In the wider
        of the dtypes of z and of the weights.

        Raises:
            StageError: the weights are quantised, or moved in for each call.
            UsageError: the engine is not lean.
        """
        ...

    def head_values(
        self, layer: int, streams: Streams, heads: Sequence[int], *, start: int = 0, past: Past | None = None
    ) -> torch.Tensor:
        """z [b, q, n, d_head] of n heads of a block whose projections each read a stream of their own.

        Args:
            layer: which block.
            streams: what the queries of the heads [b, q, n, d_model], and the keys and the values of their key-value
                heads (each once, in order) [b, q, …, d_model] read, before the norm, of the positions from `start` on.
            heads: the n heads, in order.
            start, past: as in `resume`.

        Raises:
            StageError: the weights are quantised, or moved in for each call.
            UsageError: the engine is not lean.
        """
        ...

    def mlp_values(self, layer: int, stream: torch.Tensor) -> torch.Tensor:
        """What the MLP of a block adds to the stream [b, q, d_model] where it reads `stream`, before the norm.

        Raises:
            UsageError: the engine is not lean.
        """
        ...

    def check(self, tokens: torch.Tensor, sites: Sequence[str]) -> dict[str, float]:
        """Hold `capture` against the unmodified Hugging Face forward on tokens [b, p].

        Returns site -> largest difference relative to the largest value there.

        Raises:
            StageError: a site disagrees beyond the tolerance of the dtype; names the site.
        """
        ...

    def accelerate(self, tokens: torch.Tensor, sites: Sequence[str], *, compiled: bool = False) -> str | None:
        """Make later passes faster where blocks are not looked into: fused products, blocks compiled for the shape
        of tokens [b, p]. Compares both ways at `sites` first; results then differ by the rounding of the dtype.

        Returns:
            None, or the reason why everything stays as it was.
        """
        ...
