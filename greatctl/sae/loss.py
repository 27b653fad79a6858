"""What an SAE costs the language model when its reconstruction takes the place of the activation.

The loss is held against two floors, named apart: zeros in that place, and the mean activation. The first is
the one that is usually published, and the more flattering; the second asks how much the SAE says beyond what
never changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = ["Edit", "Losses", "Measures", "cross_entropy"]

Edit = Callable[[Tensor], Tensor]
_KEYS = (
    "ce_clean",
    "ce_spliced",
    "ce_zero",
    "ce_mean",
    "ce_loss_recovered",
    "ce_loss_recovered_mean",
    "kl",
    "kl_zero",
    "kl_mean",
)


@dataclass(frozen=True)
class Losses:
    """Sums over the predicted tokens of each window.

    Attributes:
        tokens: predicted tokens, int64 [w].
        ce: name of an edit (`clean` = none) -> cross-entropy in nats, float64 [w].
        kl: name of an edit -> KL(clean || edited) of the next-token distribution in nats, float64 [w].
        labels: name of a grouping -> the label of each window.
    """

    tokens: Tensor
    ce: Mapping[str, Tensor]
    kl: Mapping[str, Tensor]
    labels: Mapping[str, Sequence[str]]


@runtime_checkable
class Measures(Protocol):
    """A loss that can be measured window by window for several edits at once."""

    def measure(self, edits: Mapping[str, Edit]) -> Losses:
        """The clean model and each edit on the same windows."""
        ...


def cross_entropy(
    ce: Callable[[Edit | None], float] | None, sae: Any, *, mean: Tensor | None = None
) -> dict[str, object]:
    """What the splice costs the language model.

    Args:
        ce: mean next-token cross-entropy (nats) of the model with an edit [n, d_in] -> [n, d_out] applied at
            the SAE's site to every ordinary position; None = untouched. One that also `Measures` gives KL and
            numbers for each group. None: nothing can be measured.
        sae: reads that site (`encode` and `decode`, or `reconstruct`).
        mean: [d_out], what mean ablation puts there.

    Returns:
        `ce_clean`, `ce_spliced`, `ce_zero`, `ce_mean`, `ce_loss_recovered` = (ce_zero - ce_spliced) / (ce_zero -
        ce_clean), `ce_loss_recovered_mean` (the same with ce_mean), `kl`, `kl_zero`, `kl_mean` (clean to edited),
        `ce_per_<grouping>` tables, and `ce_undefined`: why a key is None.
    """
    if ce is None:
        return {**dict.fromkeys(_KEYS), "ce_undefined": dict.fromkeys(_KEYS, "no window was read")}
    edits = _edits(sae, mean)
    if isinstance(ce, Measures):
        losses = ce.measure(edits)
        found: dict[str, object] = {**_quotients(losses, slice(None))}
        for name, labels in losses.labels.items():
            found[f"ce_per_{name}"] = _by_label(losses, labels)
    else:
        values = {"clean": ce(None), **{name: ce(edit) for name, edit in edits.items()}}
        found = {**_recovered(values), **{key: None for key in _KEYS if key.startswith("kl")}}
    return {**found, "ce_undefined": _reasons(found, mean)}


def _edits(sae: Any, mean: Tensor | None) -> dict[str, Edit]:
    whole = getattr(sae, "reconstruct", None)
    width = getattr(sae, "d_out", None)

    def spliced(x: Tensor) -> Tensor:
        rows = x.float()
        return (whole(rows) if whole else sae.decode(sae.encode(rows))).to(x.dtype)

    def zero(x: Tensor) -> Tensor:
        return torch.zeros_like(x) if width is None else x.new_zeros(x.shape[0], width)

    edits: dict[str, Edit] = {"spliced": spliced, "zero": zero}
    if mean is not None:
        edits["mean"] = lambda x: mean.to(x.device, x.dtype).expand(x.shape[0], -1)
    return edits


def _quotients(losses: Losses, chosen: slice | Tensor) -> dict[str, float | None]:
    """The numbers of some windows."""
    n = int(losses.tokens[chosen].sum())
    means = {name: float(sums[chosen].sum()) / n for name, sums in losses.ce.items()} if n else {}
    found = _recovered(means)
    for name, key in (("spliced", "kl"), ("zero", "kl_zero"), ("mean", "kl_mean")):
        found[key] = float(losses.kl[name][chosen].sum()) / n if n and name in losses.kl else None
    return found


def _recovered(ce: Mapping[str, float]) -> dict[str, float | None]:
    found: dict[str, float | None] = {f"ce_{name}": ce.get(name) for name in ("clean", "spliced", "zero", "mean")}
    for floor, key in (("zero", "ce_loss_recovered"), ("mean", "ce_loss_recovered_mean")):
        gap = ce[floor] - ce["clean"] if floor in ce else 0.0
        found[key] = (ce[floor] - ce["spliced"]) / gap if gap > 1e-9 else None
    return found


def _by_label(losses: Losses, labels: Sequence[str]) -> list[dict[str, object]]:
    rows = []
    for label in sorted(set(labels)):
        chosen = torch.tensor([at for at, other in enumerate(labels) if other == label])
        counts = {"windows": chosen.numel(), "predicted": int(losses.tokens[chosen].sum())}
        rows.append({"label": label, **counts, **_quotients(losses, chosen)})
    return rows


def _reasons(found: Mapping[str, object], mean: Tensor | None) -> dict[str, str]:
    reasons = {}
    for key in _KEYS:
        if found.get(key) is not None:
            continue
        if key.endswith("_mean") and mean is None:
            reasons[key] = "no mean was given"
        elif key.startswith("ce_loss_recovered"):
            reasons[key] = "the ablation costs the model nothing"
        else:
            reasons[key] = "the loss gives no distribution" if key.startswith("kl") else "no token was predicted"
    return reasons
