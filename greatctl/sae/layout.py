"""The architectures of the SAELens v6 layout: which tensors a file has, and what is computed with them.

    p = x W_enc + b_enc, x less b_dec where `apply_b_dec_to_input` says so

    standard             relu(p)                         jumprelu   relu(p) 1[p > threshold], a threshold a latent
    topk                 the k largest p of a token, then relu
    gated                h = (x - b_dec) W_enc;  1[h + b_gate > 0] relu(h e^{r_mag} + b_mag)
    transcoder           relu(p), x as it is, writes d_out       skip_transcoder   the same + x W_skip^T
    jumprelu_transcoder, jumprelu_skip_transcoder                with a threshold a latent

Other programs' folders are put into the same words by their readers (`foreign`), with three architectures more (`OTHERS`:
topk with a skip, transcoders with topk) and two settings: `glu` multiplies p by sigmoid(x W_glu + b_glu), and
`rescale_acts_by_decoder_norm` lets topk compare p_i |W_dec_i|.

Reading is strict, since a file that is misread gives numbers that look right: tensors beyond the table or missing, a
width that is not named, a normalisation that is not in the file, and an architecture that is not here are refused by
name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["LAYOUTS", "OTHERS", "Layout", "Reading", "as_cfg", "objection"]

_Activate = Callable[[Tensor, Mapping[str, Tensor], int], Tensor]


def _relu(pre_acts: Tensor, tensors: Mapping[str, Tensor], k: int) -> Tensor:
    return pre_acts.relu()


def _jumprelu(pre_acts: Tensor, tensors: Mapping[str, Tensor], k: int) -> Tensor:
    return pre_acts.relu() * (pre_acts > tensors["threshold"])


def _topk(pre_acts: Tensor, tensors: Mapping[str, Tensor], k: int) -> Tensor:
    values, places = pre_acts.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre_acts).scatter_(-1, places, values.relu())


def _gated(h: Tensor, tensors: Mapping[str, Tensor], k: int) -> Tensor:
    magnitude = (h * tensors["r_mag"].exp() + tensors["b_mag"]).relu()
    return (h + tensors["b_gate"] > 0) * magnitude


@dataclass(frozen=True)
class Layout:
    """One architecture of the layout.

    Attributes:
        activate: latents [n, d_sae] from pre-activations (for gated: from h).
        tensors: names with their shapes; a size is a key of cfg.json.
        transcoder: writes `d_out` numbers, and takes its input as it is.
        keys: keys of cfg.json that it needs besides d_in, d_sae and dtype.
    """

    activate: _Activate
    tensors: dict[str, tuple[str, ...]]
    transcoder: bool = False
    keys: tuple[str, ...] = ()


_FOUR = {"W_enc": ("d_in", "d_sae"), "b_enc": ("d_sae",), "W_dec": ("d_sae", "d_out"), "b_dec": ("d_out",)}
_THRESHOLD = {"threshold": ("d_sae",)}
_SKIP = {"W_skip": ("d_out", "d_in")}
_GATE = {name: ("d_sae",) for name in ("b_gate", "b_mag", "r_mag")}
LAYOUTS = {
    "standard": Layout(_relu, _FOUR),
    "topk": Layout(_topk, _FOUR, keys=("k",)),
    "jumprelu": Layout(_jumprelu, _FOUR | _THRESHOLD),
    "gated": Layout(_gated, {name: shape for name, shape in _FOUR.items() if name != "b_enc"} | _GATE),
    "transcoder": Layout(_relu, _FOUR, True, ("d_out",)),
    "skip_transcoder": Layout(_relu, _FOUR | _SKIP, True, ("d_out",)),
    "jumprelu_transcoder": Layout(_jumprelu, _FOUR | _THRESHOLD, True, ("d_out",)),
    "jumprelu_skip_transcoder": Layout(_jumprelu, _FOUR | _THRESHOLD | _SKIP, True, ("d_out",)),
}
OTHERS = {  # what other programs have besides; no SAELens folder can say so
    "topk_skip": Layout(_topk, _FOUR | _SKIP, keys=("k",)),
    "topk_transcoder": Layout(_topk, _FOUR, True, ("k", "d_out")),
    "topk_skip_transcoder": Layout(_topk, _FOUR | _SKIP, True, ("k", "d_out")),
}
_GLU = {"W_glu": ("d_in", "d_sae"), "b_glu": ("d_sae",)}


def as_cfg(
    architecture: str,
    d_in: int,
    d_sae: int,
    *,
    layout: str,
    hook_point: str | None,
    model: str | None,
    target: str | None = None,
    shifted: bool = True,
    trained_as: str | None = None,
    extra: Mapping[str, object] | None = None,
) -> dict[str, Any]:
    """What another program's folder says, as a cfg.json of SAELens.

    Args:
        layout: whose folder it is.
        target: the site that a transcoder writes.
        shifted: b_dec is subtracted from the input.
        trained_as: the architecture's name in training, where it differs.
        extra: further keys (`k`, `d_out`, `glu`).
    """
    return {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "apply_b_dec_to_input": shifted,
        "normalize_activations": "none",
        **(extra or {}),
        "metadata": {
            "layout": layout,
            "model_name": model,
            "hook_name": hook_point,
            "hook_name_out": target,
            "training_architecture": trained_as or architecture,
        },
    }


class Reading:
    """Encode, decode and reconstruct of a file.

    Args:
        cfg: cfg.json, without objection.
        tensors: of the layout's shapes, one dtype.
    """

    def __init__(self, cfg: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
        self.layout = (LAYOUTS | OTHERS)[str(cfg["architecture"])]
        self.tensors = tensors
        self.k = int(cfg.get("k") or 0)  # type: ignore[call-overload]
        self.W_enc, self.W_dec, self.b_dec = (tensors[name] for name in ("W_enc", "W_dec", "b_dec"))
        self.shifted = not self.layout.transcoder and bool(cfg.get("apply_b_dec_to_input", True))
        rescaled = self.layout.activate is _topk and bool(cfg.get("rescale_acts_by_decoder_norm"))
        self.norms = self.W_dec.norm(dim=1) if rescaled else None

    def encode(self, x: Tensor) -> Tensor:
        """Latents [n, d_sae] of x [n, d_in]."""
        x = x.to(self.W_enc.dtype)
        pre_acts = (x - self.b_dec if self.shifted else x) @ self.W_enc
        if "b_enc" in self.tensors:
            pre_acts = pre_acts + self.tensors["b_enc"]
        if "W_glu" in self.tensors:
            pre_acts = pre_acts * (x @ self.tensors["W_glu"] + self.tensors["b_glu"]).sigmoid()
        if self.norms is not None:
            pre_acts = pre_acts * self.norms
        return self.layout.activate(pre_acts, self.tensors, self.k)

    def decode(self, latents: Tensor) -> Tensor:
        """[n, d_out] from latents [n, d_sae], without a skip."""
        return (latents if self.norms is None else latents / self.norms.clamp_min(1e-30)) @ self.W_dec + self.b_dec

    def reconstruct(self, x: Tensor) -> Tensor:
        """decode(encode(x)), and x W_skip^T where there is a skip."""
        found = self.decode(self.encode(x))
        return found + x.to(found.dtype) @ self.tensors["W_skip"].T if "W_skip" in self.tensors else found


def objection(cfg: Mapping[str, object], tensors: Mapping[str, Tensor]) -> str | None:
    """Why these tensors cannot be those of this cfg.json, of an architecture of the table; None where they can."""
    layout = (LAYOUTS | OTHERS)[str(cfg["architecture"])]
    sizes = {name: cfg.get(name) for name in ("d_in", "d_sae", *layout.keys)}
    odd = [f"{name} {size!r}" for name, size in sizes.items() if isinstance(size, bool) or not _positive(size)]
    if odd:
        return "no positive whole number: " + ", ".join(odd)
    if layout.transcoder and cfg.get("apply_b_dec_to_input", True):
        return "a transcoder whose input is shifted by the bias of its output (apply_b_dec_to_input is not false)"
    if "k" in sizes and int(cfg["k"]) > int(cfg["d_sae"]):  # type: ignore[call-overload]
        return f"k {cfg['k']} is above d_sae {cfg['d_sae']}"
    sizes.setdefault("d_out", cfg["d_in"])
    named = layout.tensors | _GLU if cfg.get("glu") else layout.tensors
    wanted = {name: tuple(sizes[size] for size in shape) for name, shape in named.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = [
        f"{name} is {list(found[name]) if name in found else 'missing'}"
        + (f", expected {list(wanted[name])}" if name in wanted else ", which the architecture does not have")
        for name in sorted(wanted.keys() | found.keys())
        if found.get(name) != wanted.get(name)
    ]
    return "tensor " + "; ".join(wrong) if wrong else None


def _positive(size: object) -> bool:
    return isinstance(size, int) and size > 0
