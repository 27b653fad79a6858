"""BatchTopK: a batch of n tokens keeps its n k largest pre-activations (Bussmann et al. 2024, arXiv
2412.06410).

Tokens that need many latents get them from tokens that need few; L0 is k on average. As TopK otherwise. A
single token has no batch to compete in, so reading uses one global threshold theta:

    a_i = p_i where p_i > theta, else 0

theta follows the smallest kept activation in training, and is then set on held-out rows so that L0 = k.
On disk this is a JumpReLU with theta repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .coder import Coder, Inference
from .topk import TopK, TopKConfig
from .whole import Whole

__all__ = ["BatchTopK", "kth_largest", "lowest_kept", "threshold_for"]

_BETA = 0.999
_SAMPLE = 1 << 16
_CALIBRATION_VALUES = 1 << 27  # pre-activations looked at: 64k rows at 2048 latents, 4k rows at 32768


class BatchTopK(TopK):
    """The n k largest pre-activations of a batch; in evaluation mode, those above the threshold."""

    name: ClassVar[str] = "batchtopk"
    threshold: Tensor
    batches: Tensor

    def __init__(self, config: TopKConfig) -> None:
        super().__init__(config)
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self._lowest: Tensor | None = None  # of the last selection
        self._noted: Tensor | None = None  # of the batch that is being learnt from

    def select(self, pre_acts: Tensor, whole: Whole | None = None) -> Tensor:
        """Latents [n, d_sae] from pre-activations [n, d_sae]; `whole` where they are a part of a batch."""
        if not self.training:
            return torch.where(pre_acts > self.threshold, pre_acts, 0.0).relu()
        lowest = whole.lowest if whole is not None else None
        if lowest is None:
            lowest = kth_largest(pre_acts.detach(), pre_acts.shape[0] * self.config.k)
        self._lowest = lowest
        return torch.where(pre_acts >= lowest, pre_acts, 0.0)

    def terms(self, x: Tensor, target: Tensor, dead: Tensor, whole: Whole | None) -> dict[str, Tensor]:
        """As TopK; the smallest kept pre-activation is noted for `settle`."""
        found = super().terms(x, target, dead, whole)
        self._noted = self._lowest
        return found

    def prepare(self, parts: Sequence[Tensor], *, dead: Tensor, targets: Sequence[Tensor] | None = None) -> Whole:
        """The smallest pre-activation that the whole batch keeps, and the spread of the residual."""
        lowest = lowest_kept(lambda: map(self.pre_acts, parts), self.config.k)
        return self._with_spread(Whole(lowest), parts, targets or parts)

    def note_lowest(self, lowest: Tensor) -> None:
        """Remember the smallest pre-activation that the batch keeps, for `settle`."""
        self._noted = lowest

    def settle(self) -> None:
        """The threshold follows the batch's smallest kept activation."""
        if self._noted is not None:
            self._follow(self._noted)
            self._noted = None

    def calibrate(self, rows: Tensor) -> None:
        """Set the threshold so that `rows` (scaled as in training) have L0 = k."""
        self.threshold.fill_(threshold_for(self, rows, self.config.k))

    def fold(self, scale: float) -> None:
        """As TopK; the threshold is an activation and shrinks with them."""
        super().fold(scale)
        self.threshold /= scale

    def inference_state(self) -> Inference:
        """SAELens `jumprelu`, the threshold repeated for each latent."""
        tensors = self.tensors("W_enc", "b_enc", "W_dec", "b_dec")
        tensors["threshold"] = self.threshold.detach().cpu().float().expand(self.config.d_sae).contiguous()
        details = {
            **self._details(),
            "k": self.config.k,
            "rescale_acts_by_decoder_norm": False,
            "topk_threshold_lr": 1 - _BETA,
        }
        return Inference("jumprelu", tensors, details=details)

    def _follow(self, lowest: Tensor) -> None:
        """Exponential mean of the smallest kept activation; a plain mean over the first batches."""
        self.batches += 1
        weight = (1 / self.batches.float()).clamp_min(1 - _BETA)
        self.threshold += weight * (lowest - self.threshold)


def kth_largest(values: Tensor, count: int) -> Tensor:
    """The `count`-th largest positive entry, a scalar; the smallest positive one where fewer are positive.

    Exact, without sorting everything: a strided sample gives a bound that leaves few candidates.
    """
    flat = values.flatten()
    if not flat.numel():  # nothing was above a bound, say
        return values.new_full((), torch.finfo(values.dtype).tiny)
    sample = flat[:: max(1, flat.numel() // _SAMPLE) | 1]  # an odd stride visits every latent
    share = min(sample.numel(), int(1.25 * count / flat.numel() * sample.numel()) + 16)
    bound = sample.topk(share).values[-1].clamp_min(0.0)
    candidates = flat[flat > bound]
    if candidates.numel() < count:
        candidates = flat[flat > 0]
    if candidates.numel() == 0:
        return values.new_full((), torch.finfo(values.dtype).tiny)
    return candidates.topk(min(count, candidates.numel()), sorted=False).values.min()


def lowest_kept(parts: Callable[[], Iterable[Tensor]], k: int) -> Tensor:
    """`kth_largest` for k entries a row of all parts [n_i, d_sae] together, with one part in memory at a time.

    `parts` is gone through twice. Alone, a part has a threshold of its own; the lowest of those is a bound below the
    common one, which the second pass finds among what lies above the bound.
    """
    own = [(kth_largest(part, len(part) * k), len(part)) for part in parts()]
    bound = torch.stack([threshold for threshold, _ in own]).min()
    kept = torch.cat([part[part >= bound] for part in parts()])
    return kth_largest(kept, sum(rows for _, rows in own) * k)


@torch.no_grad()
def threshold_for(coder: Coder, rows: Tensor, k: int, *, chunk: int = 4096) -> float:
    """The threshold at which `rows` [n, d_in] (scaled as in training) have L0 = k, by bisection.

    Returns 0.0 where fewer than k pre-activations a row are positive. The rows are thinned evenly where n
    d_sae is large.
    """
    limit = max(1, _CALIBRATION_VALUES // coder.config.d_sae)
    rows = rows[:: -(-rows.shape[0] // limit)]
    kept = []
    for part in rows.split(chunk):
        pre_acts = coder.pre_acts(part)
        kept.append(pre_acts[pre_acts > 0])
    values = torch.cat(kept)
    wanted = k * rows.shape[0]
    if values.numel() <= wanted:
        return 0.0
    low, high = 0.0, float(values.max())
    for _ in range(60):
        middle = (low + high) / 2
        count = int((values > middle).sum())
        if abs(count - wanted) <= 0.001 * wanted:
            return middle
        low, high = (middle, high) if count > wanted else (low, middle)
    return (low + high) / 2
