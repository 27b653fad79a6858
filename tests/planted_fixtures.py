"""Two planted dictionaries, and how well a trained coder finds them again.

    E   128 features in 64 dimensions, each active with probability 0.03
    H   512 features, the i-th with probability min(0.2, 0.25 / i^0.9): few are common and most are rare

Features are random unit vectors, active independently with magnitudes uniform in [1, 2]; 4 latents a row are allowed.
A transcoder reads mixtures of one dictionary and writes the same mixtures of another. Truth and mixtures come from
generators whose seeds no training uses; a decoder that is frozen as it was drawn shows what chance gives.

An L1 penalty buys separation with the size of the activations: `relu` and `gated` are steered to 8 latents a row, since
at 4, where the truth has 3.84, they shrink everything.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize

from greatctl.events import Run
from greatctl.sae.checkpoints import Checkpoints
from greatctl.sae.coder import Coder
from greatctl.sae.rows import Batch, Counts, Cursor
from greatctl.sae.schedule import Settings
from greatctl.sae.setup import build
from greatctl.sae.trainer import Trainer

D, K, BATCH = 64, 4, 1024
_SEED = 24_681_357
_HELD_OUT = 8192


@dataclass(frozen=True)
class Found:
    """What a coder found.

    Attributes:
        mmcs: mean over the true features of the largest |cosine| to a decoder row.
        over_09: the share of features with such a cosine above 0.9.
        matched: mean |cosine| of the best one-to-one matching.
        f1: mean over the features of the F1 with which the best row's latent tells where the feature is active.
        fvu, l0: on held-out rows.
        silent: the share of latents that fire on none of them.
    """

    mmcs: float
    over_09: float
    matched: float
    f1: float
    fvu: float
    l0: float
    silent: float


class Planted:
    """Endless fresh mixtures of a dictionary (a `greatctl.sae.rows.Rows`).

    Args:
        fixture: "E" or "H".
        targets: give targets in a second dictionary.
    """

    def __init__(self, fixture: str, *, targets: bool = False) -> None:
        count = {"E": 128, "H": 512}[fixture]
        rank = torch.arange(1, count + 1)
        self.p = torch.full((count,), 0.03) if fixture == "E" else (0.25 / rank**0.9).clamp_max(0.2)
        self.read = self._dictionary(1)
        self.write = self._dictionary(2) if targets else self.read
        self.targets = targets
        self.codes = self.mixtures(_HELD_OUT, 3)
        x, y = self.codes @ self.read, self.codes @ self.write
        self.mean, self.mean_norm = x.double().mean(dim=0), float(x.norm(dim=1).mean())
        self.target_mean = y.double().mean(dim=0) if targets else None
        self.target_mean_norm = float(y.norm(dim=1).mean()) if targets else None
        self.counts = Counts(10**9, 0, 0, _HELD_OUT, 10**9 - _HELD_OUT)
        self.median_norm, self.gamma, self.d_in, self.d_out = self.mean_norm, 0.0, D, D

    def _dictionary(self, number: int) -> Tensor:
        g = torch.Generator().manual_seed(_SEED + number)
        return normalize(torch.randn(len(self.p), D, generator=g), dim=1)

    def mixtures(self, rows: int, number: int) -> Tensor:
        """Codes [rows, features]."""
        g = torch.Generator().manual_seed(_SEED + 10 * number)
        active = torch.rand(rows, len(self.p), generator=g) < self.p
        return active * (1 + torch.rand(rows, len(self.p), generator=g))

    def stream(self, seed: int, batch_size: int, start: Cursor) -> Iterator[Batch]:
        """Batches that come once each."""
        batch = start.batch
        while True:
            codes = self.mixtures(batch_size, 1000 + batch)
            batch += 1
            yield Cursor(0, 0, batch), codes @ self.read, codes @ self.write if self.targets else None

    def state(self) -> dict[str, object]:
        """Nothing besides the cursor."""
        return {}

    def restore(self, state: dict) -> None:
        """Nothing to do."""


def trained(
    rows: Planted,
    cls: type[Coder],
    *,
    d_sae: int,
    steps: int,
    lr: float = 1e-3,
    seed: int = 0,
    frozen: bool = False,
    **options: object,
) -> tuple[Coder, float, float]:
    """A coder after `steps` steps of the ordinary trainer, with its input and target scale."""
    penalty = {name: steps // 20 for name in cls.Config.model_fields if name.endswith("_warmup_steps")}
    wanted = 2 * K if "l1_coefficient" in cls.Config.model_fields else K
    coder = build(cls, cls.Config(d_in=D, d_sae=d_sae, **{"k": wanted, **penalty, **options}), seed)
    coder.frozen_decoder = frozen
    settings = Settings(
        steps=steps,
        batch_size=BATCH,
        lr=lr,
        warmup_steps=steps // 20,
        dead_window=steps * BATCH // 20,
        checkpoint_every=10**9,
        log_every=10**9,
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        given: Any = rows
        trainer = Trainer(coder, given, settings, Checkpoints(Path(folder)), Run("train"))
        trainer.fit()
    coder.calibrate(rows.codes @ rows.read * trainer.scale)
    return coder.eval(), trainer.scale, trainer.target_scale


@torch.no_grad()
def measured(rows: Planted, coder: Coder, scale: float, target_scale: float) -> Found:
    """See `Found`."""
    cosines = (rows.write @ normalize(coder.W_dec, dim=1).T).abs()
    best, latent = cosines.max(dim=1)
    x, y = rows.codes @ rows.read * scale, rows.codes @ rows.write * (target_scale if rows.targets else scale)
    latents = coder.encode(x)
    residual = (y - coder.reconstruct(x)).square().sum() / (y - y.mean(dim=0)).square().sum()
    truth, fired = rows.codes > 0, (latents > 0)[:, latent]
    both = (truth & fired).sum(dim=0)
    f1 = 2 * both / (truth.sum(dim=0) + fired.sum(dim=0)).clamp_min(1)
    return Found(
        mmcs=float(best.mean()),
        over_09=float((best > 0.9).float().mean()),
        matched=float(cosines.numpy()[linear_sum_assignment(-cosines.numpy())].mean()),
        f1=float(f1.mean()),
        fvu=float(residual),
        l0=float((latents > 0).sum() / len(x)),
        silent=float((~(latents > 0).any(dim=0)).float().mean()),
    )


def chance(rows: Planted, d_sae: int) -> float:
    """MMCS of d_sae random directions, averaged over the directions' known distribution by drawing ten sets."""
    g = torch.Generator().manual_seed(_SEED - 1)
    sets = [normalize(torch.randn(d_sae, D, generator=g), dim=1) for _ in range(10)]
    return math.fsum(float((rows.write @ s.T).abs().max(dim=1).values.mean()) for s in sets) / len(sets)
