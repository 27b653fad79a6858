"""Seconds of one training step of a peer, under its own trainer, on rows drawn at random.

    python step.py --peer sparsify --arch topk --d-model 4096 --d-sae 65536 --k 64 --batch-size 8192 --device cuda

A step is the time from one batch that the trainer asks for to the next, with the device's work done; the first ones do
not count. On a GPU each peer gets bf16 autocast and TF32. Prints one line of JSON: seconds a step, peak memory in bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext

import common
import torch
from torch import Tensor

WARM = 4


class Drawn:
    """What the peers' scripts ask of `common.Rows`: some batches' worth of rows, and the time whenever one is asked for."""

    def __init__(self, a: argparse.Namespace) -> None:
        generator = torch.Generator(a.device).manual_seed(0)
        latent = torch.randn(4 * a.batch_size, 64, generator=generator, device=a.device)
        mix = torch.randn(64, a.d_model, generator=generator, device=a.device)
        self.train = torch.randn(4 * a.batch_size, a.d_model, generator=generator, device=a.device)
        self.train.addmm_(latent, mix, alpha=1 / 8)
        self.d_in, self.device = a.d_model, a.device
        self.asked: list[float] = []

    def batches(self, size: int, seed: int) -> Iterator[Tensor]:
        while True:
            for part in self.train.split(size):
                self.asked.append(common.clock(self.device))
                yield part


class Order:
    """Row numbers of each step's batch, for a trainer that reads "token ids"."""

    def __init__(self, rows: Drawn, size: int, steps: int) -> None:
        self.rows, self.steps = rows, steps
        self.parts = torch.arange(len(rows.train)).split(size)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        self.rows.asked.append(common.clock(self.rows.device))
        return {"input_ids": self.parts[at % len(self.parts)]}


def sparsify(a: argparse.Namespace, rows: Drawn, steps: int) -> None:
    import sparsify_ as peer
    from sparsify.config import SparseCoderConfig, TrainConfig
    from sparsify.trainer import Trainer

    with tempfile.TemporaryDirectory() as place:
        cfg = TrainConfig(
            SparseCoderConfig(num_latents=a.d_sae, k=a.k),
            batch_size=1,
            hookpoints=["layer"],
            init_seeds=[17],
            lr_warmup_steps=1,
            save_every=10**9,
            log_to_wandb=False,
            save_dir=place,
            optimizer="adam",
            auxk_alpha=1 / 32,
        )
        trainer = Trainer(cfg, Order(rows, a.batch_size, steps), peer.Model(rows.train))  # type: ignore[arg-type]
        trainer.save = lambda *_, **__: None  # several GiB to the disk are no part of a step
        trainer.fit()


def saelens(a: argparse.Namespace, rows: Drawn, steps: int) -> None:
    import saelens as peer

    kind, _ = peer.CLASSES[a.arch]
    cfg = getattr(peer.sae_lens, kind + "Config")(
        d_in=a.d_model,
        d_sae=a.d_sae,
        k=a.k,
        device=a.device,
        normalize_activations="expected_average_only_in",
    )
    with torch.device(a.device):
        sae = getattr(peer.sae_lens, kind)(cfg)
    settings = peer.SAETrainerConfig(
        total_training_samples=steps * a.batch_size,
        train_batch_size_samples=a.batch_size,
        lr=3e-4,
        lr_end=3e-5,
        lr_warm_up_steps=1,
        lr_decay_steps=1,
        device=a.device,
        autocast=a.device != "cpu",
        dead_feature_window=10**6,
        n_batches_for_norm_estimate=2,
    )
    peer.SAETrainer(settings, sae, rows.batches(a.batch_size, 0)).fit()


def dictionary_learning(a: argparse.Namespace, rows: Drawn, steps: int) -> None:
    import dictionary_learning_ as peer

    with torch.device(a.device):
        trainer = peer.CLASSES[a.arch](
            steps=steps + 10,
            activation_dim=a.d_model,
            dict_size=a.d_sae,
            k=a.k,
            layer=0,
            lm_name="rows",
            warmup_steps=1,
            decay_start=steps + 5,
            seed=17,
            device=a.device,
        )
    scale = float(rows.train[: a.batch_size].square().sum(dim=1).mean().sqrt())
    context = nullcontext() if a.device == "cpu" else torch.autocast("cuda", torch.bfloat16)
    stream = rows.batches(a.batch_size, 0)
    with context:
        for step in range(steps):
            trainer.update(step, next(stream) / scale)


PEERS = {"sparsify": sparsify, "saelens": saelens, "dictionary_learning": dictionary_learning}


def main() -> None:
    """One line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", choices=PEERS, required=True)
    parser.add_argument("--arch", required=True)
    for name in ("d-model", "d-sae", "k", "batch-size"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=12)
    a = parser.parse_args()
    if a.device != "cpu":
        torch.set_float32_matmul_precision("high")
    rows = Drawn(a)
    PEERS[a.peer](a, rows, WARM + a.steps)
    times = [b - a for a, b in zip(rows.asked, rows.asked[1:], strict=False)][WARM:]
    peak = torch.cuda.max_memory_allocated() if a.device != "cpu" else 0
    print("STEP " + json.dumps({"seconds": statistics.median(times), "peak": peak}))


if __name__ == "__main__":
    main()
