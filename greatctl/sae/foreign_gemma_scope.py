"""Gemma Scope 1 and 2, read: a JumpReLU of raw x with a threshold a latent; b_dec is not subtracted.

1      params.npz                            NumPy arrays, never objects; model and place are in the folder's path
2      config.json, params.safetensors       transcoders too, some with a linear path past the latents
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .foreign_files import damaged, needed, read_object, read_tensors, renamed, shapes, unreadable
from .foreign_names import hook_of
from .layout import as_cfg

__all__ = ["FIRST", "SECOND", "describe_first", "describe_second", "tensors_first", "tensors_second"]

FIRST = ("params.npz", "params.npz")
SECOND = ("config.json", "params.safetensors")
_RELEASE = re.compile(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)")
_SITES = {
    "res": ("hook_resid_post", None),
    "mlp": ("hook_mlp_out", None),
    "att": ("attn.hook_z", None),
    "transcoders": ("ln2.hook_normalized", "hook_mlp_out"),
}


def describe_first(folder: Path) -> dict[str, Any]:
    """Gemma Scope in SAELens's words. The file has arrays alone: model and place are read off the folder's path, as
    in gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71.

    Raises:
        InputError: it is one of the token embedding, or of attention heads.
        IntegrityError: the arrays cannot be read.
    """
    path, where = folder / FIRST[1], str(folder.resolve())
    release, layer = _RELEASE.search(where), re.search(r"layer_(\d+)", where)
    if "embedding" in folder.resolve().parts[-4:]:
        raise unreadable(path, "an SAE of token embeddings is not read", "no site gives them", "choose a layer's")
    found = _npz_shapes(path)
    if len(found.get("w_enc", ())) != 2 or len(found.get("w_dec", ())) != 2:
        raise damaged(path, "it has no matrices w_enc and w_dec")
    kind, target = _SITES[release[3]] if release else (None, None)
    if kind == "attn.hook_z":
        raise _of_heads(path)
    return as_cfg(
        "jumprelu_transcoder" if target else "jumprelu",
        *found["w_enc"],
        layout="Gemma Scope",
        hook_point=f"blocks.{layer[1]}.{kind}" if kind and layer else None,
        target=f"blocks.{layer[1]}.{target}" if target and layer else None,
        model=f"google/gemma-2-{release[1]}" + "-it" * (release[2] == "it") if release else None,
        shifted=False,
        extra={"d_out": found["w_dec"][1]} if target else None,
    )


def tensors_first(folder: Path, cfg: Mapping[str, Any]) -> dict[str, Tensor]:
    """The arrays under SAELens's names; a `scaling_factor`, where there is one, is handed on.

    Raises:
        IntegrityError: they cannot be read, or are not the layout's.
    """
    path = folder / FIRST[1]
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in arrays.files}
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise damaged(path, str(error)) from error
    return renamed(path, found, _names(found))


def describe_second(folder: Path) -> dict[str, Any]:
    """config.json of Gemma Scope 2 in SAELens's words.

    Raises:
        InputError: the architecture is not known, or it reads attention heads or writes many layers.
        IntegrityError: keys are missing, or the tensors cannot be read.
    """
    path = folder / SECOND[0]
    said = read_object(path)
    needed(path, said, "architecture", "hf_hook_point_in")
    if said["architecture"] != "jump_relu":
        why = "only jump_relu is known"
        raise unreadable(path, f"the architecture {said['architecture']!r} is not read", why, "choose another SAE")
    found = shapes(folder / SECOND[1])
    if len(found.get("w_enc", ())) != 2 or "w_dec" not in found:
        raise damaged(folder / SECOND[1], "it has no matrices w_enc and w_dec")
    if len(found["w_dec"]) != 2:
        why = "it writes several layers"
        raise unreadable(path, "a cross-layer transcoder is not read", why, "choose one that writes one site")
    hook, out = hook_of(str(said["hf_hook_point_in"])), said.get("hf_hook_point_out")
    target = hook_of(str(out)) if out and out != said["hf_hook_point_in"] else None
    if hook and hook.endswith("attn.hook_z"):
        raise _of_heads(path)
    skip = bool(said.get("affine_connection"))
    transcoder = skip or (out is not None and out != said["hf_hook_point_in"])
    model = str(said["model_name"]) if said.get("model_name") else None
    return as_cfg(
        "jumprelu" + "_skip" * skip + "_transcoder" * transcoder,
        *found["w_enc"],
        layout="Gemma Scope 2",
        hook_point=hook,
        target=target,
        model=model if model is None or "/" in model else f"google/{model}",
        shifted=False,
        extra={"d_out": found["w_dec"][1]} if transcoder else None,
    )


def tensors_second(folder: Path, cfg: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors under SAELens's names.

    Raises:
        IntegrityError: they cannot be read, or are not the layout's.
    """
    path = folder / SECOND[1]
    found = read_tensors(path)
    more = {"affine_skip_connection": "W_skip.T"} if "_skip" in cfg["architecture"] else {}
    return renamed(path, found, _names(found) | more)


def _of_heads(path: Path) -> InputError:
    why = "its inputs are the heads of an attention layer side by side, which no site gives"
    return unreadable(path, "an SAE of attention heads is not read", why, "choose one of the residual stream")


def _names(found: Mapping[str, Tensor]) -> dict[str, str]:
    names = {"w_enc": "W_enc", "w_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}
    return names | ({"scaling_factor": "scaling_factor"} if "scaling_factor" in found else {})


def _npz_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the arrays in an .npz file, from their headers alone."""
    found = {}
    try:
        with zipfile.ZipFile(path) as file:
            for name in file.namelist():
                with file.open(name) as array:
                    version = np.lib.format.read_magic(array)
                    header = (
                        np.lib.format.read_array_header_1_0
                        if version == (1, 0)
                        else np.lib.format.read_array_header_2_0
                    )
                    found[name.removesuffix(".npy")] = header(array)[0]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise damaged(path, str(error)) from error
    return found
