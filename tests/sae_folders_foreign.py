"""Folders as other programs write them, made by hand, each with the formula of its latents and outputs in float64."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D, F, K = 12, 40, 4
Outcome = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Written:
    """A folder; what it computes of x [n, D] in float64 (latents, outputs); what it is called, and where it reads."""

    folder: Path
    formula: Callable[[Tensor], Outcome]
    arch: str
    hook_point: str | None = None
    target: str | None = None
    model: str | None = None


def drawn(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Random tensors in which nothing is zero or tied."""
    g = torch.Generator().manual_seed(11)
    return {name: 0.4 * torch.randn(shape, generator=g) for name, shape in shapes.items()}


def kept(p: Tensor, k: int) -> Tensor:
    """The k largest of each row where they are positive, by sorting."""
    lowest = p.sort(dim=1, descending=True).values[:, k - 1 : k]
    return torch.where(p >= lowest, p, 0).clamp_min(0)


def jumped(p: Tensor, threshold: Tensor | float) -> Tensor:
    return torch.where(p > threshold, p, 0).clamp_min(0)


def sparsify(
    root: Path, hookpoint: str = "layers.3", *, d: int = D, n: int = F, run: Mapping | None = None, **more: object
) -> Written:
    """`more`: keys of cfg.json."""
    folder = root / hookpoint
    folder.mkdir(parents=True)
    cfg = {"activation": "topk", "expansion_factor": 3, "normalize_decoder": True, "num_latents": n, "k": K}
    cfg |= {"multi_topk": False, "skip_connection": False, "transcode": False, "d_in": d, **more}
    n = int(cfg["num_latents"]) or 3 * d
    found = drawn(**{"encoder.weight": (n, d), "encoder.bias": (n,), "W_dec": (n, d), "b_dec": (d,)})
    found |= drawn(W_skip=(d, d)) if cfg["skip_connection"] else {}
    save_file(found, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg))
    if run is not None:
        (root / "config.json").write_text(json.dumps(run))
    t = {name: tensor.double() for name, tensor in found.items()}

    def formula(x: Tensor) -> Outcome:
        given = x if cfg["transcode"] else x - t["b_dec"]
        a = kept((given @ t["encoder.weight"].T + t["encoder.bias"]).clamp_min(0), int(cfg["k"]))
        y = a @ t["W_dec"] + t["b_dec"]
        return a, y + x @ t["W_skip"].T if "W_skip" in t else y

    arch = "topk" + "_skip" * bool(cfg["skip_connection"]) + "_transcoder" * bool(cfg["transcode"])
    return Written(folder, formula, arch)


def dictionary(folder: Path, dict_class: str, /, **trainer: object) -> Written:
    """One of dictionary_learning's classes; `trainer`: keys of its config."""
    folder.mkdir(parents=True)
    names = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,)}
    t = drawn(**names, r_mag=(F,), b_gate=(F,), b_mag=(F,), threshold=(F,))
    t["threshold"] = t["threshold"].abs()
    one = torch.tensor(0.3)
    linear = {"encoder.weight": t["W_enc"].T.contiguous(), "decoder.weight": t["W_dec"].T.contiguous()}
    batch = {**linear, "encoder.bias": t["b_enc"], "b_dec": t["b_dec"], "k": torch.tensor(K, dtype=torch.int32)}
    gates = {"decoder_bias": t["b_dec"], "r_mag": t["r_mag"], "gate_bias": t["b_gate"], "mag_bias": t["b_mag"]}
    four = {name: t[name] for name in names}
    state = {
        "AutoEncoder": {**linear, "encoder.bias": t["b_enc"], "bias": t["b_dec"]},
        "AutoEncoderNew": {**linear, "encoder.bias": t["b_enc"], "decoder.bias": t["b_dec"]},
        "AutoEncoderTopK": {**batch, "threshold": torch.tensor(-1.0)},
        "BatchTopKSAE": {**batch, "threshold": one},
        "MatryoshkaBatchTopKSAE": {**four, "k": batch["k"], "threshold": one, "group_sizes": torch.tensor([10, 30])},
        "JumpReluAutoEncoder": {**four, "threshold": t["threshold"]},
        "GatedAutoEncoder": {**linear, **gates},
    }[dict_class]
    torch.save(state, folder / "ae.pt")
    said = {
        "dict_class": dict_class,
        "activation_dim": D,
        "dict_size": F,
        "layer": 3,
        "lm_name": "EleutherAI/pythia-70m",
    }
    said |= {"k": K} if "TopK" in dict_class else {}
    said |= {"submodule_name": "resid_post_layer_3", **trainer}
    (folder / "config.json").write_text(json.dumps({"trainer": said, "buffer": {"io": "out", "ctx_len": 128}}))
    w = {name: tensor.double() for name, tensor in t.items()}

    def formula(x: Tensor) -> Outcome:
        raw = dict_class in ("AutoEncoderNew", "JumpReluAutoEncoder")
        h = (x if raw else x - w["b_dec"]) @ w["W_enc"]
        p, norms = h + w["b_enc"], w["W_dec"].norm(dim=1)
        a = {
            "AutoEncoder": lambda: p.clamp_min(0) * norms,  # their loader brings the decoder to norm 1
            "AutoEncoderNew": lambda: p.clamp_min(0),
            "AutoEncoderTopK": lambda: kept(p, K),
            "JumpReluAutoEncoder": lambda: jumped(p, w["threshold"]),
            "GatedAutoEncoder": lambda: (h + w["b_gate"] > 0) * (h * w["r_mag"].exp() + w["b_mag"]).clamp_min(0),
        }.get(dict_class, lambda: jumped(p, one.double()))()
        return a, (a / norms if dict_class == "AutoEncoder" else a) @ w["W_dec"] + w["b_dec"]

    archs = {"AutoEncoderTopK": "topk", "BatchTopKSAE": "batchtopk", "MatryoshkaBatchTopKSAE": "matryoshka"}
    archs |= {"JumpReluAutoEncoder": "jumprelu", "GatedAutoEncoder": "gated"}
    place = "blocks.3.hook_resid_post"
    return Written(folder, formula, archs.get(dict_class, "standard"), place, model="EleutherAI/pythia-70m")


def llama_scope(
    folder: Path, *, d: int = D, n: int = F, hook: str = "blocks.3.hook_resid_post", **more: object
) -> Written:
    """Llama Scope's first layout, bf16 with unit decoder columns; `more`: keys of hyperparams.json."""
    said = {"hook_point_in": hook, "hook_point_out": hook, "d_model": d, "d_sae": n, "act_fn": "jumprelu"}
    said |= {"jump_relu_threshold": 0.05, "apply_decoder_bias_to_pre_encoder": False, "norm_activation": "dataset-wise"}
    said |= {"dataset_average_activation_norm": {"in": 8.81, "out": 3.3}, "top_k": 50, **more}
    if said["hook_point_in"] == said["hook_point_out"]:
        said["dataset_average_activation_norm"] = {"in": 8.81, "out": 8.81}
    t = drawn(**{"encoder.weight": (n, d), "encoder.bias": (n,), "decoder.weight": (d, n), "decoder.bias": (d,)})
    t["decoder.weight"] /= t["decoder.weight"].norm(dim=0)
    t = {name: tensor.bfloat16() for name, tensor in t.items()}
    (folder / "checkpoints").mkdir(parents=True)
    save_file(t, folder / "checkpoints" / "final.safetensors")
    (folder / "hyperparams.json").write_text(json.dumps(said))
    w = {name: tensor.double() for name, tensor in t.items()}
    norms = said["dataset_average_activation_norm"]

    def formula(x: Tensor) -> Outcome:
        scaled = x * d**0.5 / norms["in"]
        p = scaled @ w["encoder.weight"].T + w["encoder.bias"]
        a = jumped(p, said["jump_relu_threshold"] * d**0.5 / norms["in"])
        return a, (a @ w["decoder.weight"].T + w["decoder.bias"]) * norms["out"] / d**0.5

    target = said["hook_point_out"] if said["hook_point_out"] != said["hook_point_in"] else None
    return Written(folder, formula, "jumprelu" + "_transcoder" * bool(target), str(said["hook_point_in"]), target)


def llamascopium(folder: Path, **more: object) -> Written:
    """Llama Scope's second layout; `more`: keys of config.json."""
    hook = "blocks.3.hook_resid_post"
    said = {"sae_type": "sae", "hook_point_in": hook, "hook_point_out": hook, "d_model": D, "expansion_factor": F / D}
    said |= {"act_fn": "jumprelu", "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True, "top_k": K}
    said |= {"use_decoder_bias": True, "use_glu_encoder": False, **more}
    hooks = [str(said["hook_point_in"]), str(said["hook_point_out"])]
    norms = {hooks[1]: torch.tensor(5.5), hooks[0]: torch.tensor(2.1)}
    t = drawn(W_E=(D, F), b_E=(F,), W_D=(F, D))
    t |= drawn(b_D=(D,)) if said["use_decoder_bias"] else {}
    t |= drawn(W_E_glu=(D, F), b_E_glu=(F,)) if said["use_glu_encoder"] else {}
    if said["act_fn"] == "jumprelu":
        t["activation_function.log_jumprelu_threshold"] = drawn(t=(F,))["t"] - 1
    folder.mkdir(parents=True)
    named = {f"dataset_average_activation_norm.{hook}": norm for hook, norm in norms.items()}
    save_file({**t, **named}, folder / "sae_weights.safetensors")
    (folder / "config.json").write_text(json.dumps(said))
    w = {name: tensor.double() for name, tensor in t.items()}
    whole = said["norm_activation"] == "inference"

    def formula(x: Tensor) -> Outcome:
        s, out = (1.0, 1.0) if whole else (D**0.5 / float(norms[hooks[0]]), D**0.5 / float(norms[hooks[1]]))
        h = s * x @ w["W_E"] + w["b_E"]
        if "W_E_glu" in w:
            h = h * (s * x @ w["W_E_glu"] + w["b_E_glu"]).sigmoid()
        n = w["W_D"].norm(dim=1) if said["sparsity_include_decoder_norm"] else torch.ones(F).double()
        g = {
            "relu": lambda: (h * n).clamp_min(0),
            "topk": lambda: kept(h * n, K),
            "jumprelu": lambda: jumped(h * n, w["activation_function.log_jumprelu_threshold"].exp()),
        }[str(said["act_fn"])]()
        y = ((g / n) @ w["W_D"] + w.get("b_D", torch.zeros(D).double())) / out
        return g / out if said["act_fn"] == "topk" else g / n, y  # top-k: in the norm of what is written

    apart = hooks[0] != hooks[1]
    arch = {"relu": "transcoder" if apart else "standard"}.get(
        str(said["act_fn"]), said["act_fn"] + "_transcoder" * apart
    )
    return Written(folder, formula, str(arch), hooks[0], hooks[1] if apart else None)


def gemma_scope(folder: Path, *, factor: float | None = None) -> Written:
    """Gemma Scope's first layout: params.npz."""
    t, arrays = _gemma()
    folder.mkdir(parents=True)
    arrays = {name: tensor.numpy() for name, tensor in arrays.items()}
    np.savez(folder / "params.npz", **arrays, **({"scaling_factor": np.full(F, factor)} if factor else {}))
    return Written(folder, t, "jumprelu")


def gemma_scope_2(folder: Path, **more: object) -> Written:
    """Gemma Scope's second layout; `more`: keys of config.json."""
    said = {
        "architecture": "jump_relu",
        "model_name": "gemma-3-1b-pt",
        "hf_hook_point_in": "model.layers.3.output",
        **more,
    }
    skip = drawn(skip=(D, D))["skip"]
    t, tensors = _gemma(skip if said.get("affine_connection") else None)
    folder.mkdir(parents=True)
    save_file(
        tensors | ({"affine_skip_connection": skip} if said.get("affine_connection") else {}),
        folder / "params.safetensors",
    )
    (folder / "config.json").write_text(json.dumps(said))
    apart = "_transcoder" * ("hf_hook_point_out" in said)
    return Written(folder, t, "jumprelu" + "_skip" * bool(said.get("affine_connection")) + apart)


def _gemma(skip: Tensor | None = None) -> tuple[Callable[[Tensor], Outcome], dict[str, Tensor]]:
    t = drawn(w_enc=(D, F), w_dec=(F, D), b_enc=(F,), b_dec=(D,), threshold=(F,))
    t["threshold"] = t["threshold"].abs()
    w = {name: tensor.double() for name, tensor in t.items()}

    def formula(x: Tensor) -> Outcome:
        a = jumped(x @ w["w_enc"] + w["b_enc"], w["threshold"])
        y = a @ w["w_dec"] + w["b_dec"]
        return a, y if skip is None else y + x @ skip.double()

    return formula, t
