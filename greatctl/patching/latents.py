"""The latents of a sparse autoencoder as a place to patch.

An SAE explains an activation up to an error: x = decode(a) + e. A latent is patched by what its change does
to the decoded part alone, x + decode(a') - decode(a), so that the error stays where it is and changing
nothing changes no bit. Everything else is shown as a row of its own: all latents together, the error term,
both (which is the activation itself), and what happens when the reconstruction merely takes the place of the
activation, an effect that patching with decode(a') would have added to every row.

The SAE comes in through a small protocol; this room does not know who made it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import torch

from ..errors import StageError
from .sites import Donor, Label

__all__ = ["PARTS", "Latents", "SparseCode"]

PARTS = ("all latents", "error term", "latents and error", "reconstruction")
_ROWS = 4096  # activations encoded at once


class SparseCode(Protocol):
    """What is needed of an SAE: rows in, rows out, and a decoder that is affine in the latents."""

    @property
    def W_dec(self) -> torch.Tensor: ...
    def encode(self, x: torch.Tensor) -> torch.Tensor: ...
    def decode(self, latents: torch.Tensor) -> torch.Tensor: ...


class Latents:
    """A site whose units are the `chosen` latents, and after them `PARTS`.

    What it keeps of a run is [b, p, n + 2 d]: the chosen latents' activations, the reconstruction, the error.

    Args:
        sae: the autoencoder.
        hook_point: the TransformerLens name of the activation that it reads.
        chosen: the latents that are patched one by one.
        special_ids: tokens that the SAE has never seen; it is not used there.
    """

    name = "latents"
    unit = "latent"
    whole = False
    needs_old = True  # an edit adds a difference

    def __init__(
        self, sae: SparseCode, hook_point: str, chosen: Sequence[int] = (), *, special_ids: Sequence[int] = ()
    ) -> None:
        self.sae, self.hook_point, self.chosen = sae, hook_point, list(chosen)
        self.skips = frozenset(special_ids)
        self._offset = self._decode(torch.zeros(1, len(sae.W_dec), device=sae.W_dec.device))[0]
        self._directions = self.directions(self.chosen)

    @property
    def n_units(self) -> int:
        """Chosen latents and parts."""
        return len(self.chosen) + len(PARTS)

    def at(self, layer: int) -> str:
        """The hook point, which belongs to one layer."""
        if not self.hook_point.startswith(f"blocks.{layer}."):
            raise StageError(f"this SAE reads {self.hook_point}, not layer {layer}")
        return self.hook_point

    def label(self, layer: int, unit: int) -> Label:
        """A latent's number, or the name of a part."""
        if unit < 0:
            return Label()
        n = len(self.chosen)
        return Label(latent=self.chosen[unit]) if unit < n else Label(part=PARTS[unit - n])

    def directions(self, latents: Sequence[int]) -> torch.Tensor:
        """What one unit of each latent adds to the reconstruction [n, d], float32."""
        W_dec = self.sae.W_dec
        parts = [W_dec.new_zeros(0, W_dec.shape[1], dtype=torch.float32)]
        for begin in range(0, len(latents), 256):
            some = torch.tensor(latents[begin : begin + 256], device=W_dec.device)
            ones = torch.zeros(len(some), len(W_dec), device=W_dec.device).scatter_(1, some[:, None], 1.0)
            parts.append(self._decode(ones) - self._offset)
        return torch.cat(parts)

    def pulled(self, grad: torch.Tensor) -> torch.Tensor:
        """What a gradient at the reconstruction [b, p, d] is at each latent [b, p, d_sae]: the decoder's transpose."""
        return grad.float() @ self._everything.T

    @cached_property
    def _everything(self) -> torch.Tensor:
        """The directions of all latents [d_sae, d]: the rows of W_dec, unless the decoder does more than multiply."""
        W_dec = self.sae.W_dec.float()
        probe = torch.linspace(0.5, 1.5, len(W_dec), device=W_dec.device)[None]
        made, product = self._decode(probe) - self._offset, probe @ W_dec
        plain = float((made - product).abs().max()) <= 1e-4 * max(1.0, float(product.abs().max()))
        return W_dec.detach() if plain else self.directions(range(len(W_dec)))

    def acts(self, value: torch.Tensor) -> torch.Tensor:
        """Activations of all latents [b, p, d_sae] for [b, p, d]."""
        rows = value.flatten(0, -2).float()
        return torch.cat([self.sae.encode(part) for part in rows.split(_ROWS)]).unflatten(0, value.shape[:-1])

    def read(self, value: torch.Tensor) -> torch.Tensor:
        """[b, p, n + 2 d], float32."""
        x = value.float()
        acts = self.acts(x)
        made = torch.cat([self._decode(part) for part in acts.flatten(0, -2).split(_ROWS)]).view_as(x)
        return torch.cat([acts[..., self.chosen].float(), made, x - made], dim=-1)

    def zero(self, value: torch.Tensor) -> torch.Tensor:
        """All latents off, which decodes to the bias; no error."""
        nothing = value.new_zeros(value.shape)
        d, n = len(self._offset), len(self.chosen)
        nothing[..., n : n + d] = self._offset.to(value.dtype)
        return nothing

    def write(
        self, value: torch.Tensor, old: Donor | None, new: Donor, mask: torch.Tensor, unit: torch.Tensor | None
    ) -> torch.Tensor:
        """x plus the change of the unit; `unit` None is everything, latents and error. See `Plain.write`."""
        assert old is not None
        n, d = len(self.chosen), value.shape[-1]
        before, after = (donor.values[donor.rows, donor.start :] for donor in (old, new))
        change = after - before
        made, error = change[..., n : n + d], change[..., n + d :]
        delta = made + error
        if unit is not None:
            latent = unit.clamp_max(max(n - 1, 0))
            one = torch.zeros_like(made)
            if n:
                picked = change[torch.arange(len(unit), device=unit.device), :, latent]
                one = picked[..., None] * self._directions.to(made.dtype)[latent][:, None]
            forms = (made, error, delta, -before[..., n + d :])
            delta = one
            for number, form in enumerate(forms):
                delta = torch.where((unit == n + number)[:, None, None], form, delta)
        moved = (value.float() + delta).to(value.dtype)
        return torch.where(mask[:, :, None] & (delta != 0), moved, value)

    def check(self, value: torch.Tensor) -> None:
        """The decoder must be affine, or a latent's change would depend on the other latents.

        Raises:
            StageError: it is not; `code` is `self-check`.
        """
        x = value.flatten(0, -2)[:64].float()
        acts = self.sae.encode(x)
        halves = self._decode(acts / 2) - self._offset
        whole = self._decode(acts) - self._offset
        off, size = float((2 * halves - whole).abs().max()), float(whole.abs().max())
        if not off <= 1e-4 * max(size, 1.0):
            raise StageError(
                f"the self-check at {self.hook_point} failed",
                why=f"the SAE's decoder is not affine in its latents (off by {off:.1e})",
                fix="its latents cannot be patched one by one",
                code="self-check",
            )

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.sae.decode(latents).float()
