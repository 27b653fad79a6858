"""dictionary_learning's layout, read: `trainer_<i>/` with config.json and ae.pt.

    AutoEncoder               relu(p), decoder rows brought to norm 1     p = (x - b_dec) W_enc + b_enc
    AutoEncoderNew            relu(p), x as it is
    AutoEncoderTopK           the k largest relu(p) of a token
    BatchTopKSAE, MatryoshkaBatchTopKSAE    relu(p) where p > threshold, one for all
    JumpReluAutoEncoder       relu(p) where p > threshold, one each; x as it is
    GatedAutoEncoder          as `gated` in `layout`

ae.pt is a pickle. It is read here and nowhere else, and only as tensors (`weights_only`): nothing in it is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import did_you_mean
from .foreign_files import damaged, needed, number, read_object, renamed, unreadable
from .foreign_names import hook_of
from .layout import as_cfg

__all__ = ["CONFIG", "GATED", "LINEAR", "PLAIN", "WEIGHTS", "describe", "tensors"]

CONFIG, WEIGHTS = "config.json", "ae.pt"
LINEAR = {"encoder.weight": "W_enc.T", "encoder.bias": "b_enc", "decoder.weight": "W_dec.T"}
PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
GATED = {
    "encoder.weight": "W_enc.T",
    "decoder.weight": "W_dec.T",
    "decoder_bias": "b_dec",
    "gate_bias": "b_gate",
    "mag_bias": "b_mag",
    "r_mag": "r_mag",
}
_BATCH = {"b_dec": "b_dec", "k": "k", "threshold": "threshold"}
# architecture here, how it was trained, whether b_dec is subtracted, tensors
_CLASSES: dict[str, tuple[str, str, bool, dict[str, str]]] = {
    "AutoEncoder": ("standard", "standard", True, LINEAR | {"bias": "b_dec"}),
    "AutoEncoderNew": ("standard", "standard", False, LINEAR | {"decoder.bias": "b_dec"}),
    "AutoEncoderTopK": ("topk", "topk", True, LINEAR | _BATCH),
    "BatchTopKSAE": ("jumprelu", "batchtopk", True, LINEAR | _BATCH),
    "MatryoshkaBatchTopKSAE": ("jumprelu", "matryoshka", True, PLAIN | {"k": "k", "group_sizes": "group_sizes"}),
    "JumpReluAutoEncoder": ("jumprelu", "jumprelu", False, PLAIN),
    "GatedAutoEncoder": ("gated", "gated", True, GATED),
}
_WITH_K = ("topk", "batchtopk", "matryoshka")


def describe(folder: Path) -> dict[str, Any]:
    """config.json in SAELens's words.

    Raises:
        InputError: the class is not known.
        IntegrityError: keys are missing.
    """
    path = folder / CONFIG
    said = read_object(path)
    trainer, buffer = said.get("trainer"), said.get("buffer")
    if not isinstance(trainer, dict):
        raise damaged(path, "missing: trainer")
    needed(path, trainer, "dict_class")
    name = str(trainer["dict_class"])
    if name not in _CLASSES:
        raise unreadable(
            path,
            f"the dict_class {name!r} of dictionary_learning is not read",
            "it is none of " + ", ".join(_CLASSES),
            did_you_mean(name, _CLASSES),
        )
    architecture, trained_as, shifted, _ = _CLASSES[name]
    io = buffer.get("io") if isinstance(buffer, dict) else None
    return as_cfg(
        architecture,
        number(path, trainer, "activation_dim"),
        number(path, trainer, "dict_size"),
        layout="dictionary_learning",
        hook_point=_hook(trainer, "input" if io == "in" else "output"),
        model=trainer.get("lm_name") or None,
        shifted=shifted,
        trained_as=trained_as,
        extra={"dict_class": name, **({"k": number(path, trainer, "k")} if trained_as in _WITH_K else {})},
    )


def _hook(trainer: dict[str, Any], side: str) -> str | None:
    """The place by its name; by the layer's number, where a run gives nothing else, what that layer writes."""
    name, layer = trainer.get("submodule_name"), trainer.get("layer")
    if isinstance(name, str) and name:
        return hook_of(name, side=side)
    return hook_of(f"layers.{layer}", side=side) if isinstance(layer, int) and layer >= 0 else None


def tensors(folder: Path, cfg: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors under SAELens's names; one threshold is repeated for each latent.

    Raises:
        IntegrityError: ae.pt holds anything but tensors, or others than the class has.
    """
    path = folder / WEIGHTS
    found = renamed(path, _state(path), _CLASSES[cfg["dict_class"]][3])
    k, threshold, groups = (found.pop(name, None) for name in ("k", "threshold", "group_sizes"))
    if k is not None and (k.numel() != 1 or int(k) != cfg["k"]):
        raise damaged(path, f"k is {k.tolist()}, and {cfg['k']} in {CONFIG}")
    if groups is not None and int(groups.sum()) != cfg["d_sae"]:
        raise damaged(path, f"group_sizes {groups.tolist()} do not add up to dict_size {cfg['d_sae']}")
    if cfg["architecture"] == "jumprelu":
        assert threshold is not None
        found["threshold"] = threshold.expand(cfg["d_sae"]).contiguous() if threshold.ndim == 0 else threshold
    return _unit(found) if cfg["dict_class"] == "AutoEncoder" else found


def _state(path: Path) -> dict[str, Tensor]:
    """The state dict in a .pt file, its tensors alone."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the bytes of a stranger's pickle lead its reader to raise
        why = "it is torn, or a pickle of more than tensors, which is not run"  # torch's own words say how to run it
        raise damaged(path, why) from error
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise damaged(path, "it is no dictionary of tensors")
    return found


def _unit(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Decoder rows of norm 1, which dictionary_learning's loader makes of an AutoEncoder; latents take up the norm."""
    norms = found["W_dec"].norm(dim=1)
    norms = norms.where(norms > 0, 1.0)
    return found | {
        "W_enc": found["W_enc"] * norms,
        "b_enc": found["b_enc"] * norms,
        "W_dec": found["W_dec"] / norms[:, None],
    }
