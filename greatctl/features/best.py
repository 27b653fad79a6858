"""The best passages of each latent, kept while a corpus streams by.

A list holds at most k passages a slot (a latent, or a decile of a latent) with different texts: of passages whose
tokens around the marked one agree, only the best is kept. Whatever the pieces in which passages are offered, the
same ones remain; of equals the earlier.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["AFTER", "BEFORE", "Best", "Fired", "Kept", "heat_around", "signatures"]

BEFORE, AFTER = 24, 12  # tokens shown around a passage's marked token
_ALIKE_BEFORE, _ALIKE_AFTER = 8, 4  # passages that agree on these tokens are the same text
_MIX = np.int64(-7046029254386353131)  # 0x9E3779B97F4A7C15, the usual odd multiplier

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Kept:
    """Passages by slot, best first.

    Attributes:
        value: what they were ranked by, float32 [n, k]; 0 where there is none.
        window, position: int64 [n, k] of the marked token, -1 where there is none.
        heat: float32 [n, k, BEFORE + 1 + AFTER], the latent around the marked token (0 beyond the window's ends).
    """

    value: Tensor
    window: Tensor
    position: Tensor
    heat: Tensor

    def found(self, slot: int) -> list[tuple[int, int, float, NDArray[np.float32]]]:
        """(window, position, value, heat) of a slot's passages."""
        windows, positions, values, heats = (
            table.numpy()[slot] for table in (self.window, self.position, self.value, self.heat)
        )
        found = zip(windows.tolist(), positions.tolist(), values.tolist(), heats, strict=True)
        return [passage for passage in found if passage[0] >= 0]


@dataclass(frozen=True)
class Fired:
    """Where latents are above 0 in some rows, in the order of rows and of latents within a row.

    Attributes:
        row, latent: int64 [m]; value: float32 [m].
        d_sae: latents there are.
    """

    row: Ints
    latent: Ints
    value: NDArray[np.float32]
    d_sae: int

    def at(self, row: Ints, latent: Ints) -> NDArray[np.float32]:
        """Activations at rows and latents of any (common) shape."""
        if not len(self.row):
            return np.zeros(np.broadcast_shapes(row.shape, latent.shape), dtype=np.float32)
        keys, wanted = self.row * self.d_sae + self.latent, row * self.d_sae + latent
        place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[place] == wanted, self.value[place], np.float32(0))


class Best:
    """Lists of the `k` best passages of `n` slots.

    Args:
        floor: a passage has to be better than that.
    """

    def __init__(self, n: int, k: int, *, floor: float = 0.0) -> None:
        self.floor = floor
        self.value = np.full((n, k), floor, dtype=np.float32)
        self.window = np.full((n, k), -1, dtype=np.int64)
        self.position = np.full((n, k), -1, dtype=np.int64)
        self.signature = np.zeros((n, k), dtype=np.int64)
        self.heat = np.zeros((n, k, BEFORE + 1 + AFTER), dtype=np.float32)
        self._bar = self.value[:, -1].copy()  # what the next one has to beat

    def wanted(self, slot: Ints, value: NDArray[np.float32]) -> Ints:
        """Places of the offers that could enter their slot's list."""
        return np.flatnonzero(value > self._bar[slot])

    def offer(
        self, slot: Ints, value: NDArray[np.float32], window: Ints, position: Ints, signature: Ints
    ) -> tuple[Ints, Ints, Ints]:
        """Merge passages (all [m]) into the lists; a slot may be offered several, of different windows.

        Returns:
            (slot, rank, offer) of the new ones that stayed, whose `heat` is still to be filled.
        """
        slots = np.unique(slot)
        old_slot, old_rank = np.nonzero(self.window[slots] >= 0)
        old_slot = slots[old_slot]
        old = (old_slot, old_rank)
        every = {
            "slot": np.concatenate([old_slot, slot]),
            "value": np.concatenate([self.value[old], value]),
            "window": np.concatenate([self.window[old], window]),
            "position": np.concatenate([self.position[old], position]),
            "signature": np.concatenate([self.signature[old], signature]),
        }
        stay, rank = _ranked(every, self.value.shape[1])
        at = (every["slot"][stay], rank)
        from_old = stay < len(old_slot)
        heat = np.zeros((len(stay), self.heat.shape[2]), dtype=np.float32)
        heat[from_old] = self.heat[old_slot[stay[from_old]], old_rank[stay[from_old]]]
        self.value[slots], self.window[slots], self.position[slots] = self.floor, -1, -1
        self.heat[slots] = 0.0
        for name in ("value", "window", "position", "signature"):
            getattr(self, name)[at] = every[name][stay]
        self.heat[at] = heat
        self._bar[slots] = self.value[slots, -1]
        new = ~from_old
        return at[0][new], rank[new], stay[new] - len(old_slot)

    def kept(self) -> Kept:
        """The lists as they are."""
        value = np.where(self.window >= 0, self.value, 0.0).astype(np.float32)
        return Kept(*map(torch.from_numpy, (value, self.window, self.position, self.heat)))

    def state(self) -> dict[str, Tensor]:
        """Everything, to go on later."""
        names = ("value", "window", "position", "signature", "heat")
        return {name: torch.from_numpy(getattr(self, name)) for name in names}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`."""
        for name, tensor in state.items():
            setattr(self, name, tensor.numpy().copy())
        self._bar = self.value[:, -1].copy()


def _ranked(every: Mapping[str, NDArray], k: int) -> tuple[Ints, Ints]:
    """Which passages stay (places), and each one's rank within its slot."""
    order = np.lexsort((every["window"], -every["value"], every["slot"]))
    slot, signature = every["slot"][order], every["signature"][order]
    alike = np.lexsort((np.arange(len(order)), signature, slot))
    again = np.zeros(len(order), dtype=bool)
    again[alike[1:]] = (np.diff(slot[alike]) == 0) & (np.diff(signature[alike]) == 0)
    order, slot = order[~again], slot[~again]
    first = np.searchsorted(slot, slot, side="left")
    rank = np.arange(len(slot)) - first
    return order[rank < k], rank[rank < k]


def signatures(token: NDArray, window: NDArray) -> Ints:
    """A number for the tokens around each row [n], int64; rows of another window count as none."""
    ids = token.astype(np.int64) + 1
    found = np.zeros(len(ids), dtype=np.int64)
    with np.errstate(over="ignore"):
        for shift in range(-_ALIKE_BEFORE, _ALIKE_AFTER + 1):
            at = np.arange(len(ids)) + shift
            inside = np.clip(at, 0, max(len(ids) - 1, 0))
            same = (at == inside) & (window[inside] == window)
            found = (found ^ np.where(same, ids[inside], 0)) * _MIX
            found ^= found >> 29
    return found


def heat_around(fired: Fired, window: NDArray, row: Ints, latent: Ints) -> NDArray[np.float32]:
    """Activations of `latent[j]` around `row[j]`, [m, BEFORE + 1 + AFTER]; 0 beyond the window's ends.

    Args:
        window: the window of each row [n].
    """
    rows = row[:, None] + np.arange(-BEFORE, AFTER + 1)[None, :]
    inside = np.clip(rows, 0, len(window) - 1)
    same = (rows == inside) & (window[inside] == window[row][:, None])
    return np.where(same, fired.at(inside, latent[:, None]), 0.0).astype(np.float32)
