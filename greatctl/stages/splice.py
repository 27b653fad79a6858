"""What an SAE in the place of the residual stream costs the frozen model.

Every ordinary position of a hook point is replaced by an edit of itself (the SAE's reconstruction, zeros);
special tokens and padding stay as they are, since the SAE has never seen them. The loss counts every real
next token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..model.interface import FrozenModel, Intervention
from .context import Context
from .models import open_recorded

if TYPE_CHECKING:
    from ..corpus.windows import TokenStore
    from ..sae.evaluate import Edit

__all__ = ["spliced_loss"]

_BATCH = 4  # windows at once: a large vocabulary's logits are the largest tensor here


def spliced_loss(
    ctx: Context, meta: Mapping[str, Any], store: TokenStore, held_out: Tensor, windows: int
) -> Callable[[Edit | None], float] | None:
    """The frozen model's mean next-token loss (nats) on held-out windows, as a function of an edit at the
    site.

    The model is opened at the first call, after training.

    Args:
        meta: the activations' meta.json (model, model_revision, hook_point, special_ids).
        held_out: [n_windows] bool.
        windows: how many held-out windows to read, evenly spaced.

    Returns:
        A function for `greatctl.sae.evaluate.cross_entropy`; None where there is nothing to read.
    """
    chosen = held_out.nonzero().squeeze(1)
    if not windows or not chosen.numel():
        return None
    chosen = chosen[:: -(-chosen.numel() // windows)]
    special = torch.tensor(sorted(meta["special_ids"]))
    opened: list[FrozenModel] = []

    def mean_loss(edit: Edit | None) -> float:
        if not opened:
            opened.append(open_recorded(ctx, meta["model"], meta["model_revision"]))
        total, count = 0.0, 0
        for part in chosen.split(_BATCH):
            loss, n = _window_losses(opened[0], meta["hook_point"], store, part, special, edit)
            total, count = total + loss, count + n
        return total / max(count, 1)

    return mean_loss


def _window_losses(
    model: FrozenModel,
    hook_point: str,
    store: TokenStore,
    windows: Tensor,
    special: Tensor,
    edit: Edit | None,
) -> tuple[float, int]:
    """Sum of next-token losses (nats) over the real tokens of some windows, and their number."""
    tokens = store.input_ids[windows].long().to(model.device)
    real = torch.arange(tokens.shape[1], device=tokens.device) < store.length[windows].to(tokens.device)[:, None]
    ordinary = real & ~torch.isin(tokens, special.to(tokens.device))

    def splice(value: Tensor) -> Tensor:
        assert edit is not None
        changed = value.clone()
        rows = value[ordinary]
        changed[ordinary] = edit(rows.flatten(1)).view_as(rows)
        return changed

    with torch.no_grad():
        logits = model.run(tokens, [Intervention(hook_point, splice)] if edit else [])
        counted = real[:, 1:]
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1][counted].float(), tokens[:, 1:][counted], reduction="sum"
        )
    return float(losses), int(counted.sum())
