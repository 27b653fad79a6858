"""sparsify's SparseCoder under its own `Trainer`, on the shared rows; a model of one layer hands them in."""

from __future__ import annotations

import tempfile
from types import SimpleNamespace

import common
import torch
from torch import Tensor, nn

common.stub("wandb", "datasets", "accelerate")

from sparsify.config import SparseCoderConfig, TrainConfig  # noqa: E402
from sparsify.trainer import Trainer  # noqa: E402


class Model(nn.Module):
    """What the trainer hangs its hook on: "token ids" are row numbers, the layer's output are the rows."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows, self.layer = rows, nn.Identity()
        self.config = SimpleNamespace(num_hidden_layers=1)
        self.dummy_inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.long, device=rows.device)}

    @property
    def base_model(self) -> nn.Module:
        return self

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.layer(self.rows[input_ids])


class Order:
    """One item a step: the row numbers of its batch, in the order that every trainer gets."""

    def __init__(self, n: int, size: int, steps: int, seed: int) -> None:
        self.items: list[Tensor] = []
        epoch = 0
        while len(self.items) < steps:
            order = torch.randperm(n, generator=torch.Generator().manual_seed(1000 * seed + epoch))
            self.items += [part for part in order.split(size) if part.numel() == size]
            epoch += 1
        del self.items[steps:]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        return {"input_ids": self.items[at]}


def train(a, rows: common.Rows, variant: str, **options) -> None:
    """One training."""
    with tempfile.TemporaryDirectory() as place:
        cfg = TrainConfig(
            SparseCoderConfig(num_latents=a.d_sae, k=a.k),
            batch_size=1,  # sequences; one of them is a batch of rows
            hookpoints=["layer"],
            init_seeds=[a.seed + 17],
            lr_warmup_steps=a.steps // 20,
            save_every=10**9,
            log_to_wandb=False,
            save_dir=place,
            dead_feature_threshold=max(a.tokens // 20, 8 * a.batch_size),
            **options,
        )
        trainer = Trainer(cfg, Order(rows.train.shape[0], a.batch_size, a.steps, a.seed), Model(rows.train))  # type: ignore[arg-type]
        began = common.clock(a.device)
        trainer.fit()
        seconds = common.clock(a.device) - began
        sae = trainer.saes["layer"]
    if variant.startswith("signum"):
        for optimizer in trainer.optimizers:
            optimizer.eval()  # schedule-free: the averaged weights are the result
    tensors = {"W_enc": sae.encoder.weight.T, "b_enc": sae.encoder.bias, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    common.hand_back(a, "sparsify", variant, "topk", tensors, seconds=seconds, k=a.k)


def main() -> None:
    """Its own optimiser and rate, and Adam with two rates."""
    a = common.arguments()
    rows = common.Rows(a.data, a.device)
    train(a, rows, "signum")
    train(a, rows, "adam", optimizer="adam", auxk_alpha=1 / 32)
    if a.lr:
        train(a, rows, f"adam-lr{a.lr:.1e}", optimizer="adam", lr=a.lr, auxk_alpha=1 / 32)


if __name__ == "__main__":
    main()
