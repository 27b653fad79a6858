"""sparsify's layout, read: `<run>/<hookpoint>/` with cfg.json and sae.safetensors.

    p = relu((x - b_dec) encoder.weight^T + encoder.bias), x as it is with `transcode`
    a = the k largest p of a token;   y = a W_dec + b_dec (+ x W_skip^T)

The folder is called after the module that is read; the model is in the run's config.json, one folder up. Keys
`hook_name`, `hook_name_out` and `model_name` in cfg.json, which greatctl writes and sparsify passes over, go first.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from .foreign_files import number, read_object, read_tensors, renamed, unreadable
from .foreign_names import hook_of
from .layout import as_cfg

__all__ = ["CONFIG", "WEIGHTS", "describe", "tensors"]

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
_NAMES = {"encoder.weight": "W_enc.T", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}


def describe(folder: Path) -> dict[str, Any]:
    """cfg.json in SAELens's words.

    Raises:
        InputError: its activation is not top-k.
        IntegrityError: keys are missing.
    """
    path = folder / CONFIG
    said = read_object(path)
    activation = said.get("activation", "topk")
    if activation != "topk":
        raise unreadable(
            path,
            f"the activation {activation!r} of sparsify is not read",
            "it takes the largest latent of each of k groups" if activation == "groupmax" else "only topk is known",
            "choose an SAE whose cfg.json says activation topk",
        )
    transcode, skip = bool(said.get("transcode")), bool(said.get("skip_connection"))
    own = said.get("hook_name")
    name = folder.resolve().name
    hook = own or hook_of(name, side="input" if transcode else "output")
    target = said.get("hook_name_out") or (hook_of(name) if transcode and not own else None)
    d_in = number(path, said, "d_in")
    return as_cfg(
        "topk" + "_skip" * skip + "_transcoder" * transcode,
        d_in,
        number(path, said, "num_latents") if said.get("num_latents") else d_in * number(path, said, "expansion_factor"),
        layout="sparsify",
        hook_point=hook,
        target=target,
        model=said.get("model_name") or _model_of_run(folder),
        shifted=not transcode,
        extra={"k": number(path, said, "k"), **({"d_out": d_in} if transcode else {})},
    )


def tensors(folder: Path, cfg: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors under SAELens's names.

    Raises:
        IntegrityError: they are not the layout's.
    """
    names = _NAMES | ({"W_skip": "W_skip"} if "_skip" in cfg["architecture"] else {})
    return renamed(folder / WEIGHTS, read_tensors(folder / WEIGHTS), names)


def _model_of_run(folder: Path) -> str | None:
    """`model` of the run's config.json, where there is one."""
    try:
        model = json.loads((folder.resolve().parent / "config.json").read_bytes())["model"]
    except (OSError, ValueError, KeyError, TypeError):  # an SAE that was copied out of its run
        return None
    return model if isinstance(model, str) else None
