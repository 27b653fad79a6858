"""dictionary_learning's trainers, driven as its `trainSAE` drives them (inputs of mean square norm 1), on the shared rows."""

from __future__ import annotations

import common
import torch
from torch import Tensor

common.stub("wandb", "nnsight", "zstandard", "datasets", "circuitsvis", "umap", "plotly", "pandas")

from dictionary_learning import trainers  # noqa: E402
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer  # noqa: E402

GROUPS = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32]
CLASSES = {
    "relu": trainers.StandardTrainer,
    "gated": trainers.GatedSAETrainer,
    "topk": trainers.TopKTrainer,
    "batchtopk": trainers.BatchTopKTrainer,
    "matryoshka": MatryoshkaBatchTopKTrainer,
    "jumprelu": trainers.JumpReluTrainer,
}


def weights(arch: str, ae, scale: float) -> tuple[str, dict[str, Tensor], dict[str, object]]:
    """Architecture, tensors and settings in SAELens layout, for inputs `scale` times as large as in training."""
    state = {name: value.detach() for name, value in ae.state_dict().items()}
    if arch == "gated":
        tensors = {
            "W_enc": state["encoder.weight"].T,
            "W_dec": state["decoder.weight"].T,
            "b_dec": state["decoder_bias"] * scale,
            "r_mag": state["r_mag"],
            "b_gate": state["gate_bias"] * scale,
            "b_mag": state["mag_bias"] * scale,
        }
        return "gated", tensors, {}
    if "encoder.weight" in state:
        bias = state["b_dec"] if "b_dec" in state else state["bias"]
        tensors = {"W_enc": state["encoder.weight"].T, "b_enc": state["encoder.bias"] * scale}
        tensors |= {"W_dec": state["decoder.weight"].T, "b_dec": bias * scale}
    else:
        tensors = {"W_enc": state["W_enc"], "b_enc": state["b_enc"] * scale}
        tensors |= {"W_dec": state["W_dec"], "b_dec": state["b_dec"] * scale}
    if arch == "topk":
        return "topk", tensors, {"k": int(state["k"])}
    if arch == "relu":
        return "standard", tensors, {}
    threshold = torch.as_tensor(state["threshold"]).clamp_min(0) * scale
    tensors["threshold"] = threshold.expand(tensors["b_enc"].shape).clone()
    return "jumprelu", tensors, {"apply_b_dec_to_input": arch != "jumprelu"}


def train(a, rows: common.Rows, variant: str, **options) -> float:
    """One training; returns L0 on the calibration rows."""
    kind = CLASSES[a.arch]
    torch.manual_seed(a.seed + 17)
    trainer = kind(
        steps=a.steps,
        activation_dim=rows.d_in,
        dict_size=a.d_sae,
        layer=0,
        lm_name="rows",
        warmup_steps=a.steps // 20,
        decay_start=a.steps - a.steps // 5,
        seed=a.seed + 17,
        device=a.device,
        **options,
    )
    if hasattr(trainer, "dead_feature_threshold"):
        trainer.dead_feature_threshold = max(a.tokens // 20, 8 * a.batch_size)
    if hasattr(trainer, "threshold_start_step"):
        trainer.threshold_start_step = a.steps // 2
    scale = float(rows.train[:: max(1, rows.train.shape[0] // 100_000)].square().sum(dim=1).mean().sqrt())
    stream = rows.batches(a.batch_size, a.seed)
    began = common.clock(a.device)
    for step in range(a.steps):
        trainer.update(step, next(stream) / scale)
    seconds = common.clock(a.device) - began
    architecture, tensors, settings = weights(a.arch, trainer.ae, scale)
    common.hand_back(a, "dictionary_learning", variant, architecture, tensors, seconds=seconds, **settings)
    with torch.no_grad():
        return float((trainer.ae.encode(rows.calibration() / scale) > 0).sum(dim=1).float().mean())


def main() -> None:
    """Its own rate and the other one; coefficients by search."""
    a = common.arguments()
    rows = common.Rows(a.data, a.device)
    rates: list[dict] = [{"lr": a.lr}, {}] if a.lr else [{}]
    if a.arch == "matryoshka":
        rates = [{**rate, "group_fractions": GROUPS} for rate in rates]
    if a.arch in ("topk", "batchtopk", "matryoshka"):
        rates = [{**rate, "k": a.k} for rate in rates]
    warm = {"sparsity_warmup_steps": a.steps // 10}
    for rate in rates:
        name = f"lr{rate['lr']:.1e}" if "lr" in rate else "default"
        if a.arch == "jumprelu":
            train(a, rows, name, target_l0=float(a.k), **warm, **rate)
        elif a.arch in ("relu", "gated"):
            common.coefficient_for(
                a.k,
                lambda c, rate=rate, name=name: train(a, rows, f"{name}-c{c:.3g}", l1_penalty=c, **warm, **rate),
                0.02,
                a.searches,
            )
        else:
            train(a, rows, name, **rate)


if __name__ == "__main__":
    main()
