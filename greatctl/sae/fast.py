"""The step that computes only what is not zero, for the architectures whose codes are sparse by construction.

A token of `topk`, `batchtopk`, `matryoshka` or `transcoder` has k active latents of d_sae, yet the plain formula
multiplies by all of them four times. Here the encoder's product is the only dense one:

    p      = (x - b_dec) W_enc + b_enc
    codes  = the k largest p of a token, or the n k largest of the batch
    r      = x - x^                           from the decoder rows w_i of the codes alone
    dL/da  = -c w_i . r                       for the codes alone; c = 2 / (n d)
    dL/dW_enc_i = sum over the tokens of i of dL/da (x - b_dec),   dL/dw_i = -c sum of a r

With nested reconstructions (`matryoshka`), r is the sum of the residuals from latent i's level on, and c is divided by
the number of levels. AuxK touches the dead latents alone.

On a CPU (`SparseStep`) the gradients go to the Adam of the plain step; on a GPU see `fused`. Both keep their state
under the names of the plain step, so that the checkpoint of one can be read by the other.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from types import ModuleType
from typing import TypeGuard

import torch
from torch import Tensor

from ..events import Run
from . import sparse
from .auxk import revival
from .batchtopk import BatchTopK
from .coder import Coder
from .codes import Codes
from .matryoshka import Matryoshka
from .micro import out_of_memory
from .step import CLIP, PlainStep, Taken
from .topk import TopK
from .transcoder import Transcoder

__all__ = ["Look", "Revived", "SparseStep", "choose", "fits", "levels_of", "look", "revive"]

_SPARSE = (TopK, BatchTopK, Matryoshka, Transcoder)
_DENSE_FROM = 4  # d_sae / k below which there is nothing to save
_AMPERE = 8


def fits(coder: Coder) -> TypeGuard[TopK]:
    """Whether the formulas above are those of this coder; a subclass may mean something else."""
    if not isinstance(coder, TopK) or type(coder) not in _SPARSE or coder.frozen_decoder:
        return False
    return coder.config.d_sae >= _DENSE_FROM * coder.config.k


def choose(coder: Coder, lr: float, run: Run, device: torch.device) -> PlainStep:
    """The fastest step that is right for `coder` on `device`."""
    if not fits(coder):
        return PlainStep(coder, lr, run)
    if device.type == "cpu":
        return SparseStep(coder, lr, run)
    usable = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= _AMPERE
    if not usable or importlib.util.find_spec("triton") is None:
        return PlainStep(coder, lr, run)
    from .fused import FusedStep

    run.notice("train: fused steps (Triton; products in bf16, weights in float32)")
    return FusedStep(coder, lr, run)


@dataclass(frozen=True)
class Look:
    """What a batch's codes are and leave over.

    Attributes:
        codes: the active latents.
        lowest: of a batch-wide selection, the smallest pre-activation that is kept.
        left: [levels, n, d_out], residuals summed from each level on; the last is the residual.
        slope: [m] derivative of the loss by each value.
        loss: the reconstruction loss, a scalar.
        c: factor of the decoder's gradient.
    """

    codes: Codes
    lowest: Tensor | None
    left: Tensor
    slope: Tensor
    loss: Tensor
    c: float


def levels_of(coder: Coder) -> tuple[Tensor | None, int]:
    """[d_sae] int32, the first nested reconstruction that a latent is in (None where there is but one); how many."""
    if not isinstance(coder, Matryoshka) or len(coder.widths) == 1:
        return None, 1
    widths = torch.tensor(coder.widths)
    level = torch.searchsorted(widths, torch.arange(coder.config.d_sae), right=True, out_int32=True)
    return level.to(coder.b_dec.device), len(widths)


def look(
    kernels: ModuleType, coder: TopK, pre: Tensor, target: Tensor, W_dec: Tensor, level: Tensor | None, levels: int
) -> Look:
    """Choose codes from pre-activations [n, d_sae], and find what they leave of `target` [n, d_out].

    Args:
        kernels: `sparse` or `kernels`.
        W_dec: [d_sae, d_out], in the dtype of the products.
    """
    lowest = None
    if isinstance(coder, BatchTopK):
        codes, lowest = kernels.choose_batch(pre, coder.config.k)
    else:
        codes = kernels.choose_rows(pre, coder.config.k)
    left, slope, loss = kernels.residuals(target, codes, W_dec, coder.b_dec, level, levels)
    return Look(codes, lowest, left, slope, loss, 2.0 / (levels * target.numel()))


@dataclass(frozen=True)
class Revived:
    """AuxK's part of a step, for c latents that may be dead.

    Attributes:
        loss: weighted; 0 where it was not finite.
        finite: whether it was.
        index: [c] the latents.
        encoder, decoder: gradients of their rows, [c, d_in] and [c, d_out].
        bias: gradient of their b_enc, [c].
    """

    loss: Tensor
    finite: Tensor
    index: Tensor
    encoder: Tensor
    decoder: Tensor
    bias: Tensor


def revive(
    alpha: float, pre: Tensor, inputs: Tensor, residual: Tensor, rows: Tensor, index: Tensor, dead: Tensor | None
) -> Revived:
    """AuxK of the latents `index` [c], whose pre-activations are `pre` [n, c] and whose decoder rows are `rows`.

    Args:
        inputs: what W_enc is multiplied with, [n, d_in].
        dead: [c] bool where some only fill the shape.
    """
    with torch.enable_grad():
        candidates, W_dec = pre.detach().requires_grad_(), rows.detach().requires_grad_()
        loss = alpha * revival(candidates, residual, W_dec, dead=dead)
        by_pre, by_rows = torch.autograd.grad(loss, (candidates, W_dec))
    finite = torch.isfinite(loss.detach())
    by_pre, by_rows, loss = (torch.where(finite, t, 0.0) for t in (by_pre, by_rows, loss.detach()))
    return Revived(loss.float(), finite, index, by_pre.T @ inputs, by_rows, by_pre.float().sum(dim=0))


class SparseStep(PlainStep):
    """The step of a sparse code on a CPU. A batch that does not fit the memory falls back to the plain step's parts."""

    name = "sparse"
    coder: TopK

    def __init__(self, coder: TopK, lr: float, run: Run) -> None:
        super().__init__(coder, lr, run)
        self._level, self._levels = levels_of(coder)

    @torch.no_grad()
    def gradients(self, x: Tensor, target: Tensor | None, *, dead: Tensor, step: int, seed: int) -> Taken:
        """As the plain step's, to rounding."""
        if self.parts.count == 1:
            try:
                return self._sparse(x, x if target is None else target, dead)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
        with torch.enable_grad():
            return super().gradients(x, target, dead=dead, step=step, seed=seed)

    def _sparse(self, x: Tensor, y: Tensor, dead: Tensor) -> Taken:
        coder = self.coder
        inputs = x if coder.reads_target else x - coder.b_dec
        pre = torch.addmm(coder.b_enc, inputs, coder.W_enc)
        seen = look(sparse, coder, pre, y, coder.W_dec, self._level, self._levels)
        by_enc = sparse.row_gradients(seen.codes, seen.slope, inputs)
        by_dec = sparse.row_gradients(seen.codes, seen.codes.values * -seen.c, seen.left, self._level)
        by_bias = seen.codes.sums(seen.slope)
        terms = {"mse": seen.loss}
        if coder.config.aux_coefficient > 0:
            terms["auxk"] = torch.zeros(())
            index = dead.nonzero().squeeze(1)
            if index.numel():
                found = self._revive(pre, inputs, seen, index)
                terms["auxk"] = found.loss
                by_enc.index_add_(0, index, found.encoder)
                by_dec.index_add_(0, index, found.decoder)
                by_bias.index_add_(0, index, found.bias)
        by_out = seen.left[0].sum(dim=0) * -seen.c
        if not coder.reads_target:
            by_out -= coder.W_enc @ by_bias
        coder.W_enc.grad = by_enc.T.contiguous()
        coder.W_dec.grad, coder.b_enc.grad, coder.b_dec.grad = by_dec, by_bias, by_out
        coder.project_gradients()
        if isinstance(coder, BatchTopK) and seen.lowest is not None:
            coder.note_lowest(seen.lowest)
        norm = torch.nn.utils.clip_grad_norm_(list(self._trained.values()), CLIP)
        return Taken(terms, norm, seen.codes.fired)

    def _revive(self, pre: Tensor, inputs: Tensor, seen: Look, index: Tensor) -> Revived:
        coder = self.coder
        rows, alpha = coder.W_dec.index_select(0, index), coder.config.aux_coefficient
        found = revive(alpha, pre.index_select(1, index), inputs, seen.left[-1], rows, index, None)
        if not bool(found.finite):
            coder.counts["auxk_not_finite"] += 1
        return found
