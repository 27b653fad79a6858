"""SAELens's training SAEs under its own `SAETrainer`, on the shared rows."""

from __future__ import annotations

import tempfile
from pathlib import Path

import common
import torch
from safetensors.torch import load_file

common.stub(
    "wandb", "plotly", "plotly_express", "datasets", "pandas", "requests", "dotenv", "nltk", "babe", "sentencepiece"
)

import sae_lens  # noqa: E402
from sae_lens.config import SAETrainerConfig  # noqa: E402
from sae_lens.training.sae_trainer import SAETrainer  # noqa: E402

DEFAULT_LR = 3e-4
PREFIXES = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1)
CLASSES = {
    "relu": ("StandardTrainingSAE", {"l1_warm_up_steps": None}),
    "gated": ("GatedTrainingSAE", {"l1_warm_up_steps": None}),
    "topk": ("TopKTrainingSAE", {}),
    "batchtopk": ("BatchTopKTrainingSAE", {}),
    "matryoshka": ("MatryoshkaBatchTopKTrainingSAE", {}),
    "jumprelu": ("JumpReLUTrainingSAE", {"jumprelu_sparsity_loss_mode": "quadratic", "l0_warm_up_steps": None}),
}


def train(a, rows: common.Rows, lr: float, options: dict, variant: str) -> float:
    """One training; returns L0 on the calibration rows."""
    kind, fixed = CLASSES[a.arch]
    options = {**fixed, **options}
    options = {key: a.steps // 20 if value is None else value for key, value in options.items()}
    torch.manual_seed(a.seed + 17)
    cfg = getattr(sae_lens, kind + "Config")(
        d_in=rows.d_in,
        d_sae=a.d_sae,
        device=a.device,
        normalize_activations="expected_average_only_in",
        **options,
    )
    sae = getattr(sae_lens, kind)(cfg)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=a.steps * a.batch_size,
            train_batch_size_samples=a.batch_size,
            lr=lr,
            lr_end=lr / 10,
            lr_warm_up_steps=a.steps // 20,
            lr_decay_steps=a.steps // 5,
            device=a.device,
            dead_feature_window=max(8, a.steps // 20),
            n_batches_for_norm_estimate=20,
        ),
        sae,
        rows.batches(a.batch_size, a.seed),
    )
    began = common.clock(a.device)
    trainer.fit()
    seconds = common.clock(a.device) - began
    with tempfile.TemporaryDirectory() as place:
        sae.save_inference_model(place)
        tensors = load_file(Path(place) / "sae_weights.safetensors")
        inference = sae_lens.SAE.load_from_disk(place, device=a.device)
        described = sae.cfg.get_inference_sae_cfg_dict()
    described = {
        key: described[key] for key in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm", "k") if key in described
    }
    architecture = inference.cfg.architecture()
    common.hand_back(a, "saelens", variant, architecture, tensors, seconds=seconds, **described)
    with torch.no_grad():
        return float((inference.encode(rows.calibration()) > 0).sum(dim=1).float().mean())


def main() -> None:
    """Every rate, and every coefficient that the search asks for."""
    a = common.arguments()
    rows = common.Rows(a.data, a.device)
    rates = list(dict.fromkeys([a.lr or DEFAULT_LR, DEFAULT_LR]))
    if a.arch in ("relu", "gated"):
        for lr in rates:
            common.coefficient_for(
                a.k,
                lambda c, lr=lr: train(a, rows, lr, {"l1_coefficient": c}, f"lr{lr:.1e}-c{c:.3g}"),
                2.0,
                a.searches,
            )
        return
    for lr in rates:
        if a.arch == "jumprelu":
            for weight in (1.0, 10.0):
                options = {"target_l0": float(a.k), "l0_coefficient": weight}
                train(a, rows, lr, options, f"lr{lr:.1e}-c{weight:g}")
            continue
        options = {"k": a.k}
        if a.arch == "matryoshka":
            options["matryoshka_widths"] = [round(p * a.d_sae) for p in PREFIXES]
        train(a, rows, lr, options, f"lr{lr:.1e}")


if __name__ == "__main__":
    main()
