"""What an SAE in the place of an activation costs the frozen model.

Every ordinary position of a hook point is replaced by an edit of itself (the SAE's reconstruction, zeros, the
mean); special tokens and padding stay as they are, since the SAE has never seen them. A transcoder's edit reads
one hook point and lands on another. The loss counts every real next token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import StageError
from ..model.interface import FrozenModel, Intervention
from .context import Context
from .models import open_recorded

if TYPE_CHECKING:
    from ..corpus.windows import TokenStore
    from ..sae.loss import Edit, Losses

__all__ = ["SplicedLoss", "spliced_loss", "window_labels"]

_BATCH = 4  # windows at once: a large vocabulary's logits are the largest tensor here
_GROUPINGS = {
    "split": ("split",),
    "character": ("character", "unit"),
    "author": ("author",),
    "work": ("work", "source_id"),
}


def window_labels(store: TokenStore) -> dict[str, list[str]]:
    """For each grouping (`split`, `character`, `author`, `work`) that the documents know, the label of every window.

    A control, which is no character, goes by its unit.
    """
    found = {}
    for name, columns in _GROUPINGS.items():
        labels = [next((str(d[c]) for c in columns if d.get(c)), "") for d in store.documents]
        if any(labels):
            found[name] = [labels[document] or "unknown" for document in store.windows["document"]]
    return found


def spliced_loss(
    ctx: Context,
    meta: Mapping[str, Any],
    store: TokenStore,
    held_out: Tensor,
    windows: int,
    *,
    target_hook_point: str | None = None,
) -> SplicedLoss | None:
    """The frozen model's loss on held-out windows, for `greatctl.sae.evaluate.cross_entropy`.

    The model is opened at the first call, after training.

    Args:
        meta: the activations' meta.json (model, model_revision, hook_point, special_ids).
        held_out: [n_windows] bool.
        windows: how many held-out windows to read, evenly spaced.
        target_hook_point: where the edit lands (a transcoder); None = where it reads.

    Returns:
        None where there is nothing to read.
    """
    chosen = held_out.nonzero().squeeze(1)
    if not windows or not chosen.numel():
        return None
    chosen = chosen[:: -(-chosen.numel() // windows)]
    return SplicedLoss(ctx, meta, store, chosen, target_hook_point or meta["hook_point"])


class SplicedLoss:
    """Mean next-token loss (nats) on chosen windows as a function of an edit; `measure` gives more in one pass."""

    def __init__(self, ctx: Context, meta: Mapping[str, Any], store: TokenStore, windows: Tensor, landing: str) -> None:
        self._ctx, self._meta, self._store, self._windows = ctx, meta, store, windows
        self._reading, self._landing = str(meta["hook_point"]), landing
        self._special = torch.tensor(sorted(meta["special_ids"]))
        self._opened: FrozenModel | None = None

    def __call__(self, edit: Edit | None) -> float:
        """Mean loss over the predicted tokens, with `edit` (None = untouched)."""
        total = count = 0.0
        for part in self._windows.split(_BATCH):
            tokens, ordinary, counted = self._batch(part)
            nats = _nats(self._logits(tokens, ordinary, edit), tokens, counted)
            total, count = total + float(nats.sum()), count + int(counted.sum())
        return total / max(count, 1)

    def measure(self, edits: Mapping[str, Edit]) -> Losses:
        """Loss and KL(clean || edited) of each edit, window by window."""
        from ..sae.loss import Losses

        tokens_read: list[Tensor] = []
        ce: dict[str, list[Tensor]] = {name: [] for name in ("clean", *edits)}
        kl: dict[str, list[Tensor]] = {name: [] for name in edits}
        for part in self._windows.split(_BATCH):
            tokens, ordinary, counted = self._batch(part)
            tokens_read.append(counted.sum(dim=1).cpu())
            clean = self._logits(tokens, ordinary, None)
            ce["clean"].append(_nats(clean, tokens, counted))
            for name, edit in edits.items():
                edited = self._logits(tokens, ordinary, edit)
                ce[name].append(_nats(edited, tokens, counted))
                kl[name].append(_divergence(clean, edited, counted))
            self._ctx.run.stop_here()
        labels = {name: [of[w] for w in self._windows.tolist()] for name, of in window_labels(self._store).items()}
        return Losses(
            torch.cat(tokens_read),
            {name: torch.cat(parts) for name, parts in ce.items()},
            {name: torch.cat(parts) for name, parts in kl.items()},
            labels,
        )

    def _batch(self, windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """tokens [b, p], ordinary positions [b, p] and predicted positions [b, p - 1] (bool) of some windows."""
        device = self._model().device
        tokens = self._store.input_ids[windows].long().to(device)
        real = torch.arange(tokens.shape[1], device=device) < self._store.length[windows].to(device)[:, None]
        return tokens, real & ~torch.isin(tokens, self._special.to(device)), real[:, 1:]

    def _model(self) -> FrozenModel:
        if self._opened is None:
            self._opened = open_recorded(self._ctx, self._meta["model"], self._meta["model_revision"])
        return self._opened

    @torch.no_grad()
    def _logits(self, tokens: Tensor, ordinary: Tensor, edit: Edit | None) -> Tensor:
        if edit is None:
            return self._model().run(tokens, [])
        return self._model().run(tokens, _interventions(self._reading, self._landing, ordinary, edit))


def _interventions(reading: str, landing: str, ordinary: Tensor, edit: Edit) -> list[Intervention]:
    """Put edit(rows at `reading`) into the ordinary positions of `landing`."""
    seen: list[Tensor] = []

    def look(value: Tensor) -> Tensor:
        seen.append(value[ordinary].flatten(1))
        return value

    def put(value: Tensor) -> Tensor:
        rows = value[ordinary]
        if reading != landing and not seen:
            raise StageError(
                f"{landing} comes before {reading}",
                why="the model computes the site that is to be replaced before the one that is read",
                fix="train a transcoder from an earlier hook point to a later one",
                code="site-order",
            )
        changed = value.clone()
        changed[ordinary] = edit(seen.pop() if seen else rows.flatten(1)).to(value.dtype).view_as(rows)
        return changed

    first = [Intervention(reading, look)] if reading != landing else []
    return [*first, Intervention(landing, put)]


def _nats(logits: Tensor, tokens: Tensor, counted: Tensor) -> Tensor:
    """Cross-entropy of each window's predicted tokens, summed; float64 [b] on the CPU."""
    sums = []
    for row, ids, real in zip(logits, tokens, counted, strict=True):  # one window at a time bounds the memory
        loss = torch.nn.functional.cross_entropy(row[:-1][real].float(), ids[1:][real], reduction="sum")
        sums.append(loss.double().cpu())
    return torch.stack(sums)


def _divergence(clean: Tensor, edited: Tensor, counted: Tensor) -> Tensor:
    """KL(clean || edited) of each window's predicted tokens, summed; float64 [b] on the CPU."""
    sums = []
    for before, after, real in zip(clean, edited, counted, strict=True):
        p = before[:-1][real].float().log_softmax(dim=-1)
        q = after[:-1][real].float().log_softmax(dim=-1)
        sums.append(torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True).double().cpu())
    return torch.stack(sums)
