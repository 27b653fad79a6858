"""Rows made by the model while an SAE is being trained on them (`train --stream`).

Several hook points may be streamed at once: the model then reads each window once, and what it gave the other hook
points is kept until they ask for the same windows, which they do a moment later.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError
from ..model.interface import Site
from ..model.reading import BatchSize, auto_batch, read
from ..sae.stream import Harvested
from .context import Context
from .models import open_model

if TYPE_CHECKING:
    from ..corpus.windows import TokenStore
    from ..model.interface import FrozenModel
    from .sae_rows import Inputs

__all__ = ["harvesters"]

_KEPT = 2  # harvests that somebody has yet to ask for

Found = Mapping[str, Mapping[str, Tensor]]


def harvesters(
    ctx: Context, inputs: Sequence[Inputs], store: TokenStore, special: Tensor
) -> list[Callable[[Tensor], Harvested]]:
    """For each of the inputs, a function from window numbers to their rows; the same windows give the same bits.

    The model is opened at the first call.
    """
    reading = _Reading(ctx, inputs, store)

    def one(number: int) -> Callable[[Tensor], Harvested]:
        meta, target = inputs[number].meta, inputs[number].target_meta

        def harvest(windows: Tensor) -> Harvested:
            found = reading(number, windows)
            first = found[meta["hook_point"]]
            return Harvested(
                first["acts"],
                None if target is None else found[target["hook_point"]]["acts"],
                windows[first["window"].long()],
                ~torch.isin(first["token"], special),
            )

        return harvest

    return [one(number) for number in range(len(inputs))]


class _Reading:
    """The model, read for all users at once. Users may be threads."""

    def __init__(self, ctx: Context, inputs: Sequence[Inputs], store: TokenStore) -> None:
        self._ctx, self._inputs, self._store = ctx, inputs, store
        metas = [meta for one in inputs for meta in (one.meta, one.target_meta) if meta is not None]
        self._sites = list(dict.fromkeys(str(meta["hook_point"]) for meta in metas))
        self._model: FrozenModel | None = None
        self._batch = BatchSize(1, lambda words: ctx.run.notice(f"train: {words}"))
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, tuple[Found, set[int]]] = OrderedDict()

    def __call__(self, user: int, windows: Tensor) -> Found:
        """What the model has at all sites on these windows."""
        key = windows.numpy().tobytes()
        with self._lock:
            found, waiting = self._kept.pop(key, None) or (self._read(windows), set(range(len(self._inputs))))
            waiting = waiting - {user}
            if waiting:
                self._kept[key] = found, waiting
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return found

    def _read(self, windows: Tensor) -> dict[str, Any]:
        frozen, store, run = self._opened(), self._store, self._ctx.run
        total = int(store.length[windows].sum())

        def said(rows: int) -> None:
            run.progress("harvesting", rows, total, "tokens")
            run.stop_here()

        ids, length, span = store.input_ids[windows], store.length[windows], range(windows.numel())
        dtype = self._inputs[0].meta["dtype"]
        return read(frozen, ids, length, span, self._sites, dtype=dtype, batch_size=self._batch, said=said)

    def _opened(self) -> FrozenModel:
        if self._model is None:
            one, store = self._inputs[0], self._store
            deepest = 1 + max(Site.parse(site).layer for site in self._sites)
            frozen = open_model(self._ctx, one.meta["model"], engine=one.engine, upto=deepest)
            if frozen.revision != one.meta["model_revision"]:
                raise InputError(
                    f"{one.meta['model']} changed while it was being read", fix="run the same command again"
                )
            frozen.check(store.input_ids[:2, :64].long(), self._sites)
            self._batch.windows = auto_batch(frozen.device, store.window)
            self._model = frozen
        return self._model
