"""A finished SAE in other programs' layouts: sparsify's, dictionary_learning's, and a bare state dict.

Each takes what a folder in SAELens's layout holds (cfg.json, tensors), of raw activations and with decoder rows of norm 1.
What the other program cannot compute is refused and the way out is named; where it computes nearly the same,
it is said.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from ..errors import UsageError
from ..store.files import write_bytes, write_json
from . import foreign_dictionaries, foreign_sparsify
from .foreign_dictionaries import GATED, LINEAR, PLAIN
from .foreign_names import module_of, submodule_of

__all__ = ["write_dictionary_learning", "write_sparsify", "write_state_dict"]

_ANOTHER = "use --export saelens, which has every architecture"
_ONE_THRESHOLD = ("batchtopk", "matryoshka", "transcoder", "skip-transcoder")  # k of them a token, on average


def write_sparsify(folder: Path, cfg: Mapping[str, Any], tensors: Mapping[str, Tensor], say: Callable) -> Path:
    """Write <folder>/<hookpoint>/; returns it.

    sparsify has top-k alone. Where one threshold decides (BatchTopK and its kin), k latents a token are kept instead, and
    `say` is told.

    Raises:
        UsageError: another architecture, or a transcoder whose two sites have different widths.
    """
    arch, k, meta = _trained_as(cfg), _k(cfg), cfg["metadata"]
    if k is None or arch not in ("topk", *_ONE_THRESHOLD):
        why = "sparsify has top-k alone: topk, batchtopk, matryoshka, transcoder and skip-transcoder can be written"
        raise UsageError(f"{arch} cannot be exported to sparsify", why=why, fix=_ANOTHER)
    if cfg.get("d_out", cfg["d_in"]) != cfg["d_in"]:
        why = f"its transcoders write as many numbers as they read; this one reads {cfg['d_in']} and writes {cfg['d_out']}"
        raise UsageError(
            f"{meta['hook_name']} -> {meta['hook_name_out']} has no place in sparsify", why=why, fix=_ANOTHER
        )
    if arch in _ONE_THRESHOLD:
        say(
            f"sparsify has no threshold, so exactly k = {k} latents a token are kept, where {arch} keeps {k} on average: "
            "its latents and reconstructions are near this SAE's, not equal"
        )
    target = meta.get("hook_name_out")
    place = folder / module_of(meta["hook_name"], target)
    found = _in_their_words(tensors, {"encoder.weight": "W_enc.T", "encoder.bias": "b_enc", "W_dec": "W_dec"})
    found |= {name: tensors[name].contiguous() for name in ("b_dec", "W_skip") if name in tensors}
    write_bytes(place / foreign_sparsify.WEIGHTS, save_tensors(found))
    said = {
        "activation": "topk",
        "expansion_factor": max(1, cfg["d_sae"] // cfg["d_in"]),
        "normalize_decoder": True,
        "num_latents": cfg["d_sae"],
        "k": k,
        "multi_topk": False,
        "skip_connection": "W_skip" in tensors,
        "transcode": target is not None,
        "d_in": cfg["d_in"],
        "hook_name": meta["hook_name"],
        "hook_name_out": target,
        "model_name": meta["model_name"],
    }
    write_json(place / foreign_sparsify.CONFIG, said)
    return place


def write_dictionary_learning(folder: Path, cfg: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write <folder>/trainer_0/; returns it.

    Raises:
        UsageError: dictionary_learning has no such architecture (a transcoder, or a plugin's).
    """
    arch, k, meta = _trained_as(cfg), _k(cfg), cfg["metadata"]
    if arch not in _CLASSES:
        why = "dictionary_learning has " + ", ".join(_CLASSES) + ", and no transcoders"
        raise UsageError(f"{arch} cannot be exported to dictionary_learning", why=why, fix=_ANOTHER)
    dict_class, trainer_class, state = _CLASSES[arch]
    sink = io.BytesIO()
    torch.save(state(cfg, tensors, k), sink)
    layer, submodule = submodule_of(meta["hook_name"])
    trainer = {
        "trainer_class": trainer_class,
        "dict_class": dict_class,
        "activation_dim": cfg["d_in"],
        "dict_size": cfg["d_sae"],
        "device": "cpu",
        "layer": layer,
        "lm_name": meta["model_name"],
        "submodule_name": submodule,
        **({"k": k} if arch in ("topk", "batchtopk", "matryoshka") else {}),
    }
    buffer = {"d_submodule": cfg["d_in"], "io": "out", "ctx_len": meta["context_size"]}
    place = folder / "trainer_0"
    write_bytes(place / foreign_dictionaries.WEIGHTS, sink.getvalue())
    write_json(place / foreign_dictionaries.CONFIG, {"trainer": trainer, "buffer": buffer})
    return place


def write_state_dict(path: Path, cfg: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write {cfg, state_dict} with torch's own format; returns the file."""
    sink = io.BytesIO()
    torch.save({"cfg": dict(cfg), "state_dict": dict(tensors)}, sink)
    write_bytes(path, sink.getvalue())
    return path


def _trained_as(cfg: Mapping[str, Any]) -> str:
    return str(cfg["metadata"]["training_architecture"])


def _k(cfg: Mapping[str, Any]) -> int | None:
    return cfg["metadata"]["greatctl_config"].get("k")


def _in_their_words(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors under the other program's names; `.T` at the end of a name here: it keeps the transpose."""
    pairs = ((theirs, mine.removesuffix(".T"), mine.endswith(".T")) for theirs, mine in names.items())
    return {theirs: (tensors[mine].T if turned else tensors[mine]).contiguous() for theirs, mine, turned in pairs}


def _relu(cfg: Mapping[str, Any], tensors: Mapping[str, Tensor], k: int | None) -> dict[str, Tensor]:
    return _in_their_words(tensors, LINEAR | {"bias": "b_dec"})


def _topk(cfg: Mapping[str, Any], tensors: Mapping[str, Tensor], k: int | None) -> dict[str, Tensor]:
    """Their threshold stands for "none was followed" below 0."""
    threshold = tensors["threshold"][0].float().clone() if "threshold" in tensors else torch.tensor(-1.0)
    numbers = {"k": torch.tensor(k, dtype=torch.int32), "threshold": threshold}
    return _in_their_words(tensors, LINEAR | {"b_dec": "b_dec"}) | numbers


def _matryoshka(cfg: Mapping[str, Any], tensors: Mapping[str, Tensor], k: int | None) -> dict[str, Tensor]:
    widths = cfg["metadata"]["training_architecture_details"]["matryoshka_widths"]
    sizes = torch.tensor([wide - narrow for narrow, wide in zip([0, *widths], widths, strict=False)])
    numbers = {"k": torch.tensor(k, dtype=torch.int32), "group_sizes": sizes}
    return _in_their_words(tensors, PLAIN) | numbers | {"threshold": tensors["threshold"][0].float().clone()}


def _jumprelu(cfg: Mapping[str, Any], tensors: Mapping[str, Tensor], k: int | None) -> dict[str, Tensor]:
    """Their b_dec is not subtracted from the input, so b_enc takes that up."""
    found = _in_their_words(tensors, PLAIN)
    exact = tensors["b_enc"].double() - tensors["b_dec"].double() @ tensors["W_enc"].double()
    return found | {"b_enc": exact.float()}


def _gated(cfg: Mapping[str, Any], tensors: Mapping[str, Tensor], k: int | None) -> dict[str, Tensor]:
    return _in_their_words(tensors, GATED)


_State = Callable[[Mapping[str, Any], Mapping[str, Tensor], int | None], dict[str, Tensor]]
_CLASSES: dict[str, tuple[str, str, _State]] = {  # architecture -> their dict_class, trainer_class, state dict
    "relu": ("AutoEncoder", "StandardTrainerAprilUpdate", _relu),
    "topk": ("AutoEncoderTopK", "TopKTrainer", _topk),
    "batchtopk": ("BatchTopKSAE", "BatchTopKTrainer", _topk),
    "matryoshka": ("MatryoshkaBatchTopKSAE", "MatryoshkaBatchTopKTrainer", _matryoshka),
    "jumprelu": ("JumpReluAutoEncoder", "JumpReluTrainer", _jumprelu),
    "gated": ("GatedAutoEncoder", "GatedSAETrainer", _gated),
}
