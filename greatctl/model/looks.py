"""Those who look at a model while it runs: one keeps what it sees, one changes it.

A walk asks its `Look` at every site for the tensor to go on with; so capturing, stopping and editing are no business of
the walk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from ..errors import StageError
from .interface import Intervention, Site

__all__ = ["Edit", "Enough", "Keep", "Look", "in_rows"]


class Enough(Exception):
    """Ends a walk once the last site that anybody wanted was seen."""


class Look:
    """Somebody who looks at the sites `names` on the way. All tensors are seen on `device`."""

    def __init__(self, names: Iterable[str], device: torch.device) -> None:
        self.names, self.device = frozenset(names), device
        found = [Site.parse(name) for name in self.names]
        self.inside = {s.layer for s in found if s.kind not in ("hook_resid_pre", "hook_resid_post")}

    def touches(self, layer: int, kind: str) -> bool:
        """Whether this site is of interest."""
        return f"blocks.{layer}.{kind}" in self.names

    def ends_with_attention(self, layer: int) -> bool:
        """Whether nothing of a block is of interest behind its attention."""
        kinds = ("hook_mlp_in", "hook_mlp_out", "mlp.hook_post", "hook_resid_post")
        return not any(self.touches(layer, kind) for kind in kinds)

    def at(self, layer: int, kind: str, value: torch.Tensor) -> torch.Tensor:
        """The tensor to go on with."""
        name = f"blocks.{layer}.{kind}"
        return self.seen(name, value) if name in self.names else value

    def seen(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """What happens at a site of interest."""
        raise NotImplementedError


class Keep(Look):
    """Keeps what it sees in `found`, and with `stops` ends the walk at the last."""

    def __init__(self, names: Iterable[str], device: torch.device, *, stops: bool) -> None:
        super().__init__(names, device)
        self.found: dict[str, torch.Tensor] = {}
        self._stops = stops

    def seen(self, name: str, value: torch.Tensor) -> torch.Tensor:
        self.found[name] = value.to(self.device)
        if self._stops and len(self.found) == len(self.names):
            raise Enough
        return value


class Edit(Look):
    """Applies interventions; `pending` are the sites not reached yet."""

    def __init__(self, interventions: Sequence[Intervention], device: torch.device) -> None:
        super().__init__((i.site for i in interventions), device)
        self._interventions = interventions
        self.pending = set(self.names)

    def seen(self, name: str, value: torch.Tensor) -> torch.Tensor:
        self.pending.discard(name)
        here = value.to(self.device)
        for intervention in self._interventions:
            if intervention.site == name:
                here = _edited(intervention, here)
        return here.to(value.device)


def _edited(intervention: Intervention, value: torch.Tensor) -> torch.Tensor:
    edited = intervention.edit(value)
    if edited.shape != value.shape:
        raise StageError(
            f"the edit at {intervention.site} changed the shape",
            why=f"{list(value.shape)} became {list(edited.shape)}",
        )
    return edited.to(value.dtype)


def in_rows(edit: Callable[[torch.Tensor], torch.Tensor], first: int, end: int, value: torch.Tensor) -> torch.Tensor:
    """`value` with the rows `first` to `end` edited."""
    edited = edit(value[first:end])
    if edited.shape != value[first:end].shape:
        return edited  # of another shape than all rows have, which is refused
    return torch.cat([value[:first], edited.to(value.dtype), value[end:]])
