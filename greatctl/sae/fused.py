"""The step of a sparse code on a GPU: gradients are summed, applied and forgotten, a latent at a time.

The formulas are those of `fast`, the work is done by `kernels`. Master weights and Adam's moments are float32 and lie
as [d_sae, d]; W_enc of the coder is a view of such rows. Products read bf16 copies. So a step moves weights and moments
through memory once, and writes no gradient of them.

The clip needs the norm of a gradient that is never there as a whole. A latent's part of it is bounded by the lengths
of the vectors that are summed there, and the parts add up as squares do. Only where that bound is above 1 (in the first
steps of a run, if at all) the kernels sum everything once more, for the norm alone; `norm` is the bound otherwise. The
device decides that by itself: nothing in a step waits for it, and how many latents are dead is known from two steps ago.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..events import Run
from . import kernels, kernels_rows
from .batchtopk import BatchTopK
from .fast import Look, Revived, levels_of, look, revive
from .kernels_rows import Extra
from .micro import out_of_memory
from .step import CLIP, PlainStep, Taken
from .topk import TopK

__all__ = ["FusedStep"]

_SPARE = 128  # slots for dead latents come in multiples of it
_LAG = 2  # steps
_EPS = 1e-6  # as torch's clip has it


@dataclass(frozen=True)
class _Half:
    """What `gradients` leaves for `update`."""

    inputs: Tensor
    seen: Look
    by_enc: Extra
    by_dec: Extra
    clip: Tensor


class FusedStep(PlainStep):
    """See the head of the file. A batch that does not fit the memory falls back to the plain step's parts, for good.

    Args:
        dtype: of the products; float32 is for comparisons.
    """

    name = "fused"
    coder: TopK

    def __init__(self, coder: TopK, lr: float, run: Run, *, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(coder, lr, run)
        self._level, self._levels = levels_of(coder)
        self._dtype, self._taken = dtype, 0
        self._n_dead = _Lagging()
        self._not_finite = torch.zeros((), dtype=torch.int64, device=coder.b_dec.device)
        self._half: _Half | None = None
        self._by_rows(True)
        self._copy()

    @torch.no_grad()
    def gradients(self, x: Tensor, target: Tensor | None, *, dead: Tensor, step: int, seed: int) -> Taken:
        """As the plain step's, to the rounding of the products; nothing dense is written."""
        if self.parts.count == 1 and self._copies:
            try:
                return self._examine(x, x if target is None else target, dead)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
        if self._copies:
            self._half = None
            self._copies.clear()
            self._by_rows(False)
            torch.cuda.empty_cache()
        with torch.enable_grad():
            return super().gradients(x, target, dead=dead, step=step, seed=seed)

    def update(self, lr: float) -> None:
        """Adam on every row, unit decoder rows, new copies for the products; then what the architecture adds."""
        half, self._half = self._half, None
        if half is None:
            super().update(lr)
            return
        self._taken += 1
        coder, codes = self.coder, half.seen.codes
        more = {"clip": half.clip, "lr": lr, "step": self._taken}
        kernels_rows.update(
            codes, half.seen.slope, half.inputs, *self._row("W_enc"), scale=1.0, unit=False, extra=half.by_enc, **more
        )
        level = {"level": self._level, "extra": half.by_dec}
        kernels_rows.update(
            codes, codes.values, half.seen.left, *self._row("W_dec"), scale=-half.seen.c, unit=True, **level, **more
        )
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.step()  # b_enc and b_dec, the only ones with a gradient
        for name in ("W_enc", "W_dec"):
            self._adam.state[self._trained[name]]["step"] += 1
        coder.settle()

    def state(self) -> dict[str, Tensor]:
        """As the plain step's."""
        self.coder.counts["auxk_not_finite"] += int(self._not_finite)
        self._not_finite.zero_()
        return {name: tensor.contiguous() for name, tensor in super().state().items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from the `state` of any step."""
        super().restore(tensors)
        self._taken = int(self._adam.state[self._trained["W_dec"]]["step"])
        self._copy()

    def _examine(self, x: Tensor, y: Tensor, dead: Tensor) -> Taken:
        coder = self.coder
        inputs = (x if coder.reads_target else x - coder.b_dec).to(self._dtype)
        pre = torch.addmm(coder.b_enc.to(self._dtype), inputs, self._copies["W_enc"].T)
        seen = look(kernels, coder, pre, y, self._copies["W_dec"], self._level, self._levels)
        terms, by_bias = {"mse": seen.loss}, seen.codes.sums(seen.slope)
        by_enc = by_dec = None
        found = self._revive(pre, inputs, seen, dead)
        if coder.config.aux_coefficient > 0:
            terms["auxk"] = torch.zeros_like(seen.loss) if found is None else found.loss
        if found is not None:
            by_bias.index_add_(0, found.index, found.bias)
            slot = torch.full((coder.config.d_sae,), -1, dtype=torch.int32, device=x.device)
            slot[found.index] = torch.arange(len(found.index), dtype=torch.int32, device=x.device)
            by_enc, by_dec = (slot, found.encoder.contiguous()), (slot, found.decoder.contiguous())
        del pre
        by_out = seen.left[0].sum(dim=0, dtype=torch.float32) * -seen.c
        if not coder.reads_target:
            by_out -= by_bias.to(self._dtype) @ self._copies["W_enc"]
        norm = self._norm(inputs, seen, found, by_enc, by_dec, by_bias, by_out)
        clip = (CLIP / (norm + _EPS)).clamp(max=1.0)
        coder.b_enc.grad, coder.b_dec.grad = by_bias * clip, by_out * clip
        if isinstance(coder, BatchTopK) and seen.lowest is not None:
            coder.note_lowest(seen.lowest)
        self._half = _Half(inputs, seen, by_enc, by_dec, clip)
        return Taken(terms, norm, seen.codes.fired)

    def _revive(self, pre: Tensor, inputs: Tensor, seen: Look, dead: Tensor) -> Revived | None:
        """AuxK; the dead latents come first in a list that is a little longer than they are many."""
        coder = self.coder
        alpha = coder.config.aux_coefficient
        known = self._n_dead(dead.sum()) if alpha > 0 else 0
        if not known:
            return None
        length = min(len(dead), -(-(known + known // 4 + 1) // _SPARE) * _SPARE)
        index = torch.sort(dead.to(torch.uint8), descending=True, stable=True).indices[:length]
        rows = self._copies["W_dec"].index_select(0, index)
        found = revive(alpha, pre.index_select(1, index), inputs, seen.left[-1].float(), rows, index, dead[index])
        self._not_finite += ~found.finite
        return found

    def _norm(
        self,
        inputs: Tensor,
        seen: Look,
        found: Revived | None,
        by_enc: Extra,
        by_dec: Extra,
        by_bias: Tensor,
        by_out: Tensor,
    ) -> Tensor:
        """The norm of the gradient, or a bound above it that is at most 1."""
        codes, small = seen.codes, by_bias.square().sum() + by_out.square().sum()
        lengths = torch.linalg.vector_norm(inputs, dim=1, dtype=torch.float32)
        left = torch.linalg.vector_norm(seen.left, dim=2, dtype=torch.float32)
        token = codes.token.long()
        level = 0 if self._level is None else self._level[codes.index.long()].long()
        enc = codes.sums(seen.slope.abs() * lengths[token])
        dec = codes.sums(codes.values * left[level, token]) * seen.c
        if found is not None:
            enc.index_add_(0, found.index, torch.linalg.vector_norm(found.encoder, dim=1, dtype=torch.float32))
            dec.index_add_(0, found.index, torch.linalg.vector_norm(found.decoder, dim=1, dtype=torch.float32))
        bound = (enc.square().sum() + dec.square().sum() + small).sqrt()
        unclear = (~(bound <= CLIP)).int()  # NaN is unclear, too
        weights = self._row("W_enc")[0], self._row("W_dec")[0]
        squares = kernels_rows.square_norms(
            unclear, codes, seen.slope, inputs, weights[0], scale=1.0, unit=False, extra=by_enc
        ).sum()
        more = {"level": self._level, "extra": by_dec}
        squares += kernels_rows.square_norms(
            unclear, codes, codes.values, seen.left, weights[1], scale=-seen.c, unit=True, **more
        ).sum()
        return torch.where(unclear > 0, (squares + small).sqrt(), bound)

    def _row(self, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Master, both moments and the products' copy of a matrix, a latent a row."""
        parameter = self._trained[name]
        state = self._adam.state[parameter]
        three = (parameter.data, state["exp_avg"], state["exp_avg_sq"])
        rows = tuple(t.T for t in three) if name == "W_enc" else three
        return (*rows, self._copies[name])  # type: ignore[return-value]

    def _copy(self) -> None:
        """Bring the copies for the products up to date."""
        rows = {"W_enc": self.coder.W_enc.detach().T, "W_dec": self.coder.W_dec.detach()}
        self._copies = {name: row.to(self._dtype, copy=True) for name, row in rows.items()}

    def _by_rows(self, wanted: bool) -> None:
        """Lay W_enc and its moments out with a latent a row, or back."""

        def laid(tensor: Tensor) -> Tensor:
            return tensor.T.contiguous().T if wanted else tensor.contiguous()

        parameter = self._trained["W_enc"]
        state = self._adam.state[parameter]
        with torch.no_grad():
            parameter.data = laid(parameter.data)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = laid(state[name])


class _Lagging:
    """A count on the device, known here some steps later; the first ones are waited for."""

    def __init__(self) -> None:
        self._under_way: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def __call__(self, count: Tensor) -> int:
        """The count of some steps ago."""
        if count.device.type != "cuda":
            return int(count)
        here = torch.empty(count.shape, dtype=count.dtype, pin_memory=True)
        here.copy_(count, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._under_way.append((here, event))
        if len(self._under_way) <= _LAG:
            event.synchronize()
            return int(here)
        old, done = self._under_way.popleft()
        done.synchronize()
        return int(old)
