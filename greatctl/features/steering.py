"""Changing a latent where the model runs: the delta clamp, and other directions under the same rule.

An SAE explains an activation up to an error, x = decode(a) + e. A latent is changed by what its change does to
the decoded part alone,

    x' = x + decode(a') - decode(a),

so that the error stays where it is, and a change of nothing is no change: where nothing moves, x itself is handed
back, to the bit. The decoder is affine, so the difference is (a' - a) times the latent's row, and every form of
steering is an amount along a unit direction: minus the activation to ablate, the distance to a value to clamp, a
constant to steer. What a latent is held against (the difference in means, a random direction) goes the same
distances along another direction, and so differs from it in nothing else.

Nothing here knows positions by number: a model that generates with a cache shows its prompt once and then single
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import StageError

__all__ = [
    "SparseCode",
    "Steering",
    "difference_in_means",
    "moved",
    "random_directions",
    "rows_of",
    "to_value",
    "unit",
]

_ROWS = 4096  # activations encoded at once
_AFFINE = 1e-4  # relative


class SparseCode(Protocol):
    """What is needed of an SAE: rows in, rows out."""

    @property
    def W_dec(self) -> Tensor: ...
    def encode(self, x: Tensor) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Steering:
    """Moves activations by `amount` along `direction`.

    Attributes:
        direction: [d] float32 of norm 1.
        amount: the distance, in the activation's own unit; or what gives it, [n] for rows [n, d] float32.
    """

    direction: Tensor
    amount: float | Callable[[Tensor], Tensor]

    def __call__(self, value: Tensor, where: Tensor) -> Tensor:
        """`value` moved at the places `where`; `value` itself where nothing moves.

        Args:
            value: [b, q, …] whose last dimensions hold d numbers, of any float type.
            where: bool [b, q]; special tokens, which no SAE has seen, are left out.
        """
        rows = value.flatten(2)
        if callable(self.amount):
            amounts = torch.zeros(rows.shape[:2], device=value.device)
            chosen = rows[where].float()
            if len(chosen):
                amounts[where] = torch.cat([self.amount(part) for part in chosen.split(_ROWS)])
        else:
            amounts = where.to(torch.float32) * self.amount
        if not bool(amounts.any()):
            return value
        return moved(rows, amounts, self.direction).view_as(value)

    def mean(self, rows: Tensor) -> float:
        """The distance on rows [n, d], signed where it is one for all, else the mean of its size."""
        if not callable(self.amount):
            return self.amount
        return float(torch.cat([self.amount(part.float()).abs() for part in rows.split(_ROWS)]).mean())


def moved(x: Tensor, amounts: Tensor, direction: Tensor) -> Tensor:
    """x [..., d] plus amounts [...] times direction [d] or [..., d], added in float32; untouched rows keep their bits."""
    delta = amounts[..., None] * direction.to(x.device)
    return torch.where(amounts[..., None] != 0, (x.float() + delta).to(x.dtype), x)


def to_value(sae: SparseCode, latent: int, value: float) -> Callable[[Tensor], Tensor]:
    """Amounts that clamp a latent to `value` (0 ablates it), along its row's direction."""
    length = float(rows_of(sae, [latent]).norm())

    def amount(x: Tensor) -> Tensor:
        return (value - sae.encode(x)[:, latent].float()) * length

    return amount


def rows_of(sae: SparseCode, latents: Sequence[int]) -> Tensor:
    """What one unit of each latent adds to the reconstruction, [n, d] float32.

    Raises:
        StageError: the decoder is not affine, so that a latent has no row of its own; `code` is `self-check`.
    """
    W_dec = sae.W_dec
    nothing = W_dec.new_zeros(1, len(W_dec), dtype=torch.float32)
    offset, parts = sae.decode(nothing).float(), [W_dec.new_zeros(0, W_dec.shape[1], dtype=torch.float32)]
    for begin in range(0, len(latents), 256):
        some = torch.tensor(latents[begin : begin + 256], device=W_dec.device)
        ones = nothing.repeat(len(some), 1).scatter_(1, some[:, None], 1.0)
        once, twice = (sae.decode(factor * ones).float() - offset for factor in (1.0, 2.0))
        off, size = float((twice - 2 * once).abs().max()), float(twice.abs().max())
        if not off <= _AFFINE * max(size, 1e-6):
            raise StageError(
                "the SAE's latents cannot be changed one by one",
                why=f"its decoder is not affine in its latents (off by {off:.1e})",
                fix="name another SAE with --sae",
                code="self-check",
            )
        parts.append(once)
    return torch.cat(parts)


def unit(rows: Tensor) -> Tensor:
    """Rows [..., d] at norm 1; a row of zeros stays one."""
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)


def random_directions(n: int, d: int, seed: int) -> Tensor:
    """n directions of norm 1, evenly over the sphere, [n, d] float32 on the CPU; the first ones do not depend on n."""
    generator = torch.Generator().manual_seed(seed)
    return unit(torch.stack([torch.randn(d, generator=generator) for _ in range(n)]) if n else torch.zeros(0, d))


def difference_in_means(
    totals: Tensor, counts: Tensor, roles: Sequence[str], units: Sequence[str], splits: Sequence[str]
) -> Tensor | None:
    """Mean activation of the characters' texts minus that of the controls', [d] float64; None where one side is missing.

    Documents weigh equally within a unit (an author), and units within a role. Where both sides have documents of the
    split `train`, these alone count, so that what is held out stays unseen.

    Args:
        totals: sums of activations, float64 [n_documents, d]; counts: tokens [n_documents].
        roles, units, splits: labels of each document; the role is `character` or another word.
    """
    read = [i for i in range(len(roles)) if int(counts[i])]
    train = [i for i in read if splits[i] == "train"]
    if len({roles[i] == "character" for i in train}) == 2:
        read = train
    sides: list[Tensor] = []
    for side in (True, False):
        by_unit: dict[str, list[Tensor]] = {}
        for i in read:
            if (roles[i] == "character") == side:
                by_unit.setdefault(units[i], []).append(totals[i].double() / int(counts[i]))
        if not by_unit:
            return None
        sides.append(torch.stack([torch.stack(means).mean(0) for means in by_unit.values()]).mean(0))
    return sides[0] - sides[1]
