"""Llama Scope's two layouts, read.

It trains on inputs of norm sqrt(d): x' = s x with s = sqrt(d) / (the mean norm of x). Here s goes into the weights, so that
raw x is read: W_enc s, W_dec / s_out, b_dec / s_out, where s_out belongs to the site that is written.

    v1     hyperparams.json, checkpoints/final.safetensors     its one threshold is in units of raw x: times s
    2.x    config.json, sae_weights.safetensors                log thresholds, a latent each, in units of x'

With `sparsity_include_decoder_norm` an activation function sees p_i |W_dec_i|: a threshold is divided by the norm, top-k
compares the products, and its latents are those products in the units of what is written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .foreign_files import damaged, needed, number, read_object, read_tensors, renamed, unreadable
from .layout import as_cfg

__all__ = ["FIRST", "SECOND", "describe_first", "describe_second", "tensors_first", "tensors_second"]

FIRST = ("hyperparams.json", "checkpoints/final.safetensors")
SECOND = ("config.json", "sae_weights.safetensors")
_ACTIVATIONS = {"relu": "standard", "jumprelu": "jumprelu", "topk": "topk"}
_NORM = "dataset_average_activation_norm"
_LOG_THRESHOLD = "activation_function.log_jumprelu_threshold"
_UNIT = 0.01  # bf16 rows of norm 1 are off by less
_RELEASE = re.compile(r"Llama3_1-8B-Base-L\d+(?:R|A|M|TC)-\d+x")


def describe_first(folder: Path) -> dict[str, Any]:
    """hyperparams.json of Llama Scope in SAELens's words.

    Raises:
        InputError: an activation function or a normalisation that is not known.
        IntegrityError: keys are missing.
    """
    path = folder / FIRST[0]
    said = read_object(path)
    model = "meta-llama/Llama-3.1-8B" if _RELEASE.fullmatch(folder.resolve().name) else None
    cfg = _shared(path, said, model, bool(said.get("apply_decoder_bias_to_pre_encoder")))
    scales = [1.0, 1.0]
    if said.get("norm_activation", "dataset-wise") == "dataset-wise":
        norms = said.get(_NORM)
        scales = [_scale(path, cfg["d_in"], norms.get(at) if isinstance(norms, dict) else None) for at in ("in", "out")]
    if said["act_fn"].lower() == "jumprelu":
        threshold = said.get("jump_relu_threshold")
        if not isinstance(threshold, int | float):
            raise damaged(path, f"jump_relu_threshold is no number: {threshold!r}")
        cfg["jump_relu_threshold"] = threshold
    return cfg | {"scales": scales}


def tensors_first(folder: Path, cfg: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors under SAELens's names, of raw activations.

    Raises:
        InputError: decoder rows are not of norm 1, and the threshold would have to know.
        IntegrityError: the tensors are not the layout's.
    """
    path = folder / FIRST[1]
    names = {"encoder.weight": "W_enc.T", "encoder.bias": "b_enc", "decoder.weight": "W_dec.T"}
    names |= {"decoder.bias": "b_dec"} if cfg["decoder_bias"] else {}
    found = _with_bias(renamed(path, read_tensors(path), names))
    norms = found["W_dec"].norm(dim=1)
    if cfg["by_norm"] and cfg["architecture"] != "standard" and bool(((norms - 1).abs() > _UNIT).any()):
        raise unreadable(
            path,
            "the decoder's rows are not of norm 1",
            "with sparsity_include_decoder_norm the threshold depends on them, which this layout does not settle",
            "save the SAE with unit decoder rows, or with llamascopium 2",
        )
    if "jump_relu_threshold" in cfg:
        found["threshold"] = torch.full((cfg["d_sae"],), cfg["jump_relu_threshold"] * cfg["scales"][0])
    return _raw(found, *cfg["scales"])


def describe_second(folder: Path) -> dict[str, Any]:
    """config.json of llamascopium 2 in SAELens's words.

    Raises:
        InputError: a kind of dictionary, an activation function or a normalisation that is not known.
        IntegrityError: keys are missing.
    """
    path = folder / SECOND[0]
    said = read_object(path)
    kind = said.get("sae_type")
    if kind not in ("sae", "matryoshka_sae"):
        raise unreadable(
            path, f"the sae_type {kind!r} is not read", "only sae and matryoshka_sae are", "choose one of these"
        )
    cfg = _shared(path, said, None, False)
    glu = {"glu": True} if said.get("use_glu_encoder") else {}
    rescaled = {"rescale_acts_by_decoder_norm": True} if cfg["by_norm"] and "k" in cfg else {}
    return cfg | glu | rescaled | {"normalised": said.get("norm_activation", "dataset-wise") == "dataset-wise"}


def tensors_second(folder: Path, cfg: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors under SAELens's names, of raw activations.

    Raises:
        IntegrityError: the tensors are not the layout's, or a norm is missing.
    """
    path = folder / SECOND[1]
    found = read_tensors(path)
    norms = {name.removeprefix(f"{_NORM}."): found.pop(name) for name in list(found) if name.startswith(f"{_NORM}.")}
    names = {"W_E": "W_enc", "b_E": "b_enc", "W_D": "W_dec"}
    names |= {"b_D": "b_dec"} if cfg["decoder_bias"] else {}
    names |= {"W_E_glu": "W_glu", "b_E_glu": "b_glu"} if cfg.get("glu") else {}
    jumps = cfg["architecture"].startswith("jumprelu")
    if jumps:
        names[_LOG_THRESHOLD if _LOG_THRESHOLD in found else "log_jumprelu_threshold"] = "threshold"
    mine = _with_bias(renamed(path, found, names))
    if jumps:
        rows = mine["W_dec"].norm(dim=1) if cfg["by_norm"] else torch.ones(())
        mine["threshold"] = mine["threshold"].exp() / rows.clamp_min(1e-30)
    scales = [1.0, 1.0]
    if cfg["normalised"]:
        scales = [_scale(path, cfg["d_in"], float(norms[hook]) if hook in norms else None) for hook in cfg["hooks"]]
    return _raw(mine, *scales)


def _shared(path: Path, said: Mapping[str, Any], model: str | None, shifted: bool) -> dict[str, Any]:
    """What both layouts say alike."""
    needed(path, said, "act_fn", "hook_point_in")
    d_in, function = number(path, said, "d_model"), str(said["act_fn"]).lower()
    if function not in _ACTIVATIONS:
        raise unreadable(
            path,
            f"the activation function {said['act_fn']!r} is not read",
            "what a token's latents are depends on the batch" if "batch" in function else "it is not known",
            "convert it to a jumprelu with Llama Scope's own program, or choose an SAE with " + ", ".join(_ACTIVATIONS),
        )
    norm = said.get("norm_activation", "dataset-wise")
    if norm not in ("dataset-wise", "inference"):
        why = "each token or batch has a factor of its own, which no weights can hold"
        raise unreadable(path, f"norm_activation {norm!r} is not read", why, "choose an SAE with dataset-wise")
    hooks = [str(said["hook_point_in"]), str(said.get("hook_point_out") or said["hook_point_in"])]
    transcoder = hooks[0] != hooks[1]
    plain, suffix = _ACTIVATIONS[function], "_transcoder" * transcoder
    return as_cfg(
        "transcoder" if plain + suffix == "standard_transcoder" else plain + suffix,
        d_in,
        _d_sae(path, said, d_in),
        layout="Llama Scope",
        hook_point=hooks[0],
        target=hooks[1] if transcoder else None,
        model=model,
        shifted=shifted,
        extra={
            "decoder_bias": said.get("use_decoder_bias", True) is not False,
            "by_norm": bool(said.get("sparsity_include_decoder_norm", True)),
            "hooks": hooks,
            **({"d_out": d_in} if transcoder else {}),
            **({"k": number(path, said, "top_k")} if function == "topk" else {}),
        },
    )


def _d_sae(path: Path, said: Mapping[str, Any], d_in: int) -> int:
    if "d_sae" in said:
        return number(path, said, "d_sae")
    factor = said.get("expansion_factor")
    if not isinstance(factor, int | float) or not d_in * factor >= 1:
        raise damaged(path, f"expansion_factor is no positive number: {factor!r}")
    return round(d_in * factor)


def _scale(path: Path, d: int, norm: object) -> float:
    if not isinstance(norm, int | float) or not norm > 0 or not math.isfinite(norm):
        raise damaged(path, f"{_NORM} is no positive number: {norm!r}")
    return math.sqrt(d) / norm


def _with_bias(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"b_dec": torch.zeros(found["W_dec"].shape[-1]), **found}


def _raw(found: dict[str, Tensor], scale: float, target_scale: float) -> dict[str, Tensor]:
    """From inputs `scale * x` and outputs `target_scale * y` to raw ones; latents and thresholds stay."""
    factors = {"W_enc": scale, "W_glu": scale, "W_dec": 1 / target_scale, "b_dec": 1 / target_scale}
    return {name: tensor * factors.get(name, 1.0) for name, tensor in found.items()}
