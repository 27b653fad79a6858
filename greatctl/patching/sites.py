"""The places of a block that can be patched: what they are called, and which part of their tensor a cell is.

A site of the stream is one vector a position. A site inside of a block has units besides: query heads, the
key-value heads that serve them (a grouped-query model has fewer, and its tables have as many rows as there
are), or neurons. `Plain` knows how to overwrite some positions of one unit, or of all; SAE latents, which
are no part of the model, keep the same two methods in `latents`. Names need no torch, so that the command
line can check them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import torch

__all__ = [
    "CORRUPTIONS",
    "DIRECTIONS",
    "HEAD_SITES",
    "POSITIONS",
    "SITES",
    "STREAM_SITES",
    "WHOLE_STREAM",
    "Donor",
    "Label",
    "Plain",
    "default_positions",
    "place_of",
]

STREAM_SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
HEAD_SITES = ("z", "q", "k", "v", "pattern")
SITES = (*STREAM_SITES, *HEAD_SITES, "mlp_post")
WHOLE_STREAM = ("resid_pre", "resid_mid", "resid_post")  # what carries everything that later layers see
DIRECTIONS = ("denoising", "noising")
POSITIONS = ("each", "spans", "all")
CORRUPTIONS = ("counterpart", "zero", "mean", "resample")

_INSIDE = {**{site: f"attn.hook_{site}" for site in HEAD_SITES}, "mlp_post": "mlp.hook_post"}


class Label(NamedTuple):
    """Which unit a cell patches; at most one is not None."""

    head: int | None = None
    neuron: int | None = None
    latent: int | None = None
    part: str | None = None
    edge: str | None = None


class Donor(NamedTuple):
    """Where new values come from: `values` [b, p, …] (a pattern: [b, unit, p, p]), of which a batch takes `rows`
    [c] from position `start` on."""

    values: torch.Tensor
    rows: torch.Tensor
    start: int = 0


@dataclass(frozen=True)
class Plain:
    """A site of the model itself.

    Attributes:
        name: one of `SITES`.
    """

    name: str
    needs_old = False  # an edit overwrites; it does not look at what was there
    skips: frozenset[int] = frozenset()  # token ids at which it is never patched

    @property
    def whole(self) -> bool:
        """Whether patching all of it gives the other run."""
        return self.name in WHOLE_STREAM

    @property
    def unit(self) -> Literal["", "head", "neuron"]:
        """What its cells are besides positions."""
        return "" if self.name in STREAM_SITES else "neuron" if self.name == "mlp_post" else "head"

    @property
    def of_keys(self) -> bool:
        """Whether its heads are key-value heads."""
        return self.name in ("k", "v")

    def at(self, layer: int) -> str:
        """Its TransformerLens name in a block."""
        return f"blocks.{layer}.{_INSIDE.get(self.name, 'hook_' + self.name)}"

    def label(self, layer: int, unit: int) -> Label:
        """What unit `unit` is called in a table."""
        if unit < 0 or not self.unit:
            return Label()
        return Label(head=unit) if self.unit == "head" else Label(neuron=unit)

    def read(self, value: torch.Tensor) -> torch.Tensor:
        """What is kept of a run: the tensor itself."""
        return value

    def zero(self, value: torch.Tensor) -> torch.Tensor:
        """What zero ablation writes."""
        return value.new_zeros(value.shape)

    def write(
        self, value: torch.Tensor, old: Donor | None, new: Donor, mask: torch.Tensor, unit: torch.Tensor | None
    ) -> torch.Tensor:
        """The tensor with new values where `mask` says.

        Args:
            value: the site's tensor for c rows of q positions.
            old: not used here.
            new: the values to write.
            mask: [c, q] bool.
            unit: the unit of each row [c], or None for all units.
        """
        import torch

        turned = self.name == "pattern"  # [c, head, query, key]: its units stand before its positions
        v, d = (value.transpose(1, 2), new.values.transpose(1, 2)) if turned else (value, new.values)
        if unit is None:
            edited = torch.where(_wide(mask, v), d[new.rows, new.start :].to(v.dtype), v)
        else:
            each = torch.arange(len(v), device=v.device)
            before = v[each, :, unit]
            after = d[new.rows, new.start :, unit].to(v.dtype)
            edited = v.clone()
            edited[each, :, unit] = torch.where(_wide(mask, before), after, before)
        return edited.transpose(1, 2) if turned else edited


def default_positions(site: str) -> str:
    """`each` for the stream, `all` for what has units besides (their product is a large table)."""
    return "each" if site in STREAM_SITES else "all"


def place_of(row: Mapping[str, object]) -> str:
    """A cell in words: "layer 3, head 5, all positions"."""
    words = [f"layers {row['layers']}" if row.get("layers") else f"layer {row['layer']}"]
    words = [] if row.get("edge") else words  # an edge's name says where it is
    words += [f"{name} {row[name]}" for name in ("head", "neuron", "latent") if row.get(name) is not None]
    words += [str(row[name]) for name in ("part", "edge") if row.get(name)]
    span, at = row.get("span"), row.get("position")
    if span:
        words.append("all positions" if span == "all" else f"span {span}")
    else:
        words.append(f"position {row.get('position_from_end') if at is None else at}")
    return ", ".join(words)


def _wide(mask: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """mask [c, q] with as many axes as value [c, q, …]."""
    return mask.reshape(*mask.shape, *([1] * (value.ndim - 2)))
