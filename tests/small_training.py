"""Small training runs: settings, a trainer that has run to its end, and every architecture in a tiny form."""

from __future__ import annotations

from pathlib import Path

import torch
from planted import rows_of
from torch import Tensor

from greatctl.events import Run
from greatctl.sae.batchtopk import BatchTopK
from greatctl.sae.checkpoints import Checkpoints
from greatctl.sae.coder import Coder, CoderConfig
from greatctl.sae.gated import Gated
from greatctl.sae.jumprelu import JumpRelu
from greatctl.sae.matryoshka import Matryoshka
from greatctl.sae.relu import Relu
from greatctl.sae.schedule import Settings
from greatctl.sae.setup import build
from greatctl.sae.skip_transcoder import SkipTranscoder
from greatctl.sae.topk import TopK
from greatctl.sae.trainer import Trainer
from greatctl.sae.transcoder import Transcoder

AUTOENCODERS: dict[str, tuple[type[Coder], dict]] = {
    "relu": (Relu, {"l1_coefficient": 0.1}),
    "gated": (Gated, {"l1_coefficient": 0.1}),
    "topk": (TopK, {"k": 4}),
    "batchtopk": (BatchTopK, {"k": 4}),
    "jumprelu": (JumpRelu, {"k": 4}),
    "matryoshka": (Matryoshka, {"k": 4}),
}
TRANSCODERS: dict[str, tuple[type[Coder], dict]] = {
    "transcoder": (Transcoder, {"k": 4}),
    "skip-transcoder": (SkipTranscoder, {"k": 4}),
}


class Soft(Coder):
    """A plugin's architecture: softplus latents above a margin, one buffer of its own, random masking."""

    name = "soft"
    Config = CoderConfig

    def __init__(self, config: CoderConfig) -> None:
        super().__init__(config)
        self.register_buffer("margin", torch.tensor(0.25))

    def encode(self, x: Tensor) -> Tensor:
        return (torch.nn.functional.softplus(self.pre_acts(x)) - self.margin).relu()

    def losses(self, x: Tensor, *, dead: Tensor, step: int) -> dict[str, Tensor]:
        latents = self.encode(x)
        mask = torch.rand_like(x) < 0.9
        return {"mse": ((x - self.decode(latents)) * mask).square().mean(), "sparse": 1e-3 * latents.mean()}


def settings(**changes) -> Settings:
    """Short and quick unless told."""
    values = {
        "steps": 60,
        "batch_size": 256,
        "lr": 1e-3,
        "warmup_steps": 5,
        "dead_window": 2000,
        "checkpoint_every": 10_000,
        "log_every": 10,
        "seed": 0,
    }
    return Settings(**{**values, **changes})


def trained(tmp_path: Path, cls: type[Coder], acts: Tensor, *, d_sae: int, options: dict, **changes) -> Trainer:
    """A trainer that has run to its end."""
    rows = rows_of(tmp_path / "shards", acts)
    coder = build(cls, cls.Config(d_in=acts.shape[1], d_sae=d_sae, **options), changes.get("seed", 0))
    trainer = Trainer(coder, rows, settings(**changes), Checkpoints(tmp_path / "checkpoints"), Run("train"))
    trainer.fit()
    return trainer
