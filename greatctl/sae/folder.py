"""A trained SAE's folder: the SAELens v6 layout, written and read with safetensors alone.

    cfg.json               architecture, sizes, metadata
    sae_weights.safetensors  W_enc b_enc W_dec b_dec (threshold)

Whatever training did to its inputs is folded away before writing, `normalize_activations` is "none", and
decoder rows have norm 1; so the file works on raw activations wherever it is read. BatchTopK is written as a
JumpReLU, which is what it is at inference. An architecture that SAELens does not know keeps its own name, and
is read through the registry.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from ..errors import InputError, IntegrityError, did_you_mean
from ..store.files import write_bytes, write_json
from .coder import Coder

__all__ = ["CONFIG", "WEIGHTS", "LoadedSAE", "Origin", "export", "load", "save"]

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_LAYOUT_VERSION = "6.54.12"
_REQUIRED = ("architecture", "d_in", "d_sae", "dtype")
_OTHER_LAYOUTS = {
    "sae.safetensors": "sparsify",
    "ae.pt": "dictionary_learning",
    "params.npz": "Gemma Scope",
    "params.safetensors": "Gemma Scope 2",
    "hyperparams.json": "Llama Scope",
}
EXPORTS = ("saelens", "pth")


class Registry(Protocol):
    """What is needed of `greatctl.extend.registry.Registry`."""

    def get(self, kind: str, name: str) -> type:
        """The class registered as `name`."""
        ...


@dataclass(frozen=True)
class Origin:
    """What an SAE was trained on, for cfg.json."""

    model_name: str
    hook_point: str
    context_size: int
    prepend_bos: bool = True


@dataclass(frozen=True)
class LoadedSAE:
    """An SAE that reads raw activations.

    Attributes:
        name: the folder's name.
        arch: the architecture it was trained as (`batchtopk`), else the one of the file.
        hook_point: TransformerLens name of its site, None where the folder does not say.
        cfg: cfg.json.
        W_dec: [d_sae, d_in]; a latent's row is its direction.
    """

    name: str
    arch: str
    hook_point: str | None
    cfg: Mapping[str, object]
    W_dec: Tensor
    _encode: Callable[[Tensor], Tensor]
    _decode: Callable[[Tensor], Tensor]

    @property
    def d_in(self) -> int:
        """Width of an activation."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_dec.shape[0]

    def encode(self, x: Tensor) -> Tensor:
        """Latent activations [n, d_sae] >= 0 of raw activations x [n, d_in]."""
        with torch.no_grad():
            return self._encode(x)

    def decode(self, latents: Tensor) -> Tensor:
        """Reconstruction [n, d_in] of raw activations."""
        with torch.no_grad():
            return self._decode(latents)


def save(folder: Path, coder: Coder, scale: float, origin: Origin) -> None:
    """Write `coder`, trained on inputs `scale * x`, as a folder that reads raw x."""
    state = coder.folded(scale).inference_state()
    metadata: dict[str, object] = {
        "sae_lens_version": _LAYOUT_VERSION,
        "sae_lens_training_version": None,
        "model_name": origin.model_name,
        "hook_name": origin.hook_point,
        "hook_head_index": None,
        "context_size": origin.context_size,
        "prepend_bos": origin.prepend_bos,
        "seqpos_slice": [None],
        "model_from_pretrained_kwargs": {},
        "training_architecture": coder.name,
        "training_architecture_details": dict(state.details),
        "greatctl_config": coder.config.model_dump(mode="json"),
    }
    cfg = {
        "architecture": state.architecture,
        "d_in": coder.config.d_in,
        "d_sae": coder.config.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **state.extra,
        "metadata": metadata,
    }
    write_bytes(folder / WEIGHTS, save_tensors(dict(state.tensors)))
    write_json(folder / CONFIG, cfg)


def load(folder: Path, registry: Registry | None = None, *, device: str | torch.device = "cpu") -> LoadedSAE:
    """Open a folder in the SAELens layout.

    Raises:
        InputError: the folder is missing, or in another layout or architecture than is known here.
        IntegrityError: cfg.json or the weights cannot be read, or do not fit each other.
    """
    cfg = _read_cfg(folder)
    tensors = {k: v.to(device, torch.float32) for k, v in _read_weights(folder).items()}
    metadata = cfg.get("metadata") or {}
    architecture = str(cfg["architecture"])
    if architecture in _READERS:
        _check_shapes(folder, cfg, tensors)
        encode, decode = _plain(architecture, cfg, tensors)
        W_dec = tensors["W_dec"]
    else:
        coder = _through_registry(folder, architecture, metadata, tensors, registry).to(device)
        encode, decode, W_dec = coder.encode, coder.decode, coder.W_dec.detach()
    return LoadedSAE(
        name=folder.resolve().name,
        arch=str(metadata.get("training_architecture") or architecture),
        hook_point=metadata.get("hook_name"),
        cfg=cfg,
        W_dec=W_dec,
        _encode=encode,
        _decode=decode,
    )


def export(folder: Path, form: str) -> Path:
    """Write exports/ in a finished SAE's folder: `saelens` (a folder of the two files) or `pth` (a state
    dict).

    The `.pth` file is for other programs; greatctl never reads one back.
    """
    if form == "saelens":
        target = folder / "exports" / "saelens"
        for name in (CONFIG, WEIGHTS):
            write_bytes(target / name, (folder / name).read_bytes())
        return target
    target = folder / "exports" / f"{folder.name}.pth"
    sink = io.BytesIO()
    torch.save({"cfg": _read_cfg(folder), "state_dict": _read_weights(folder)}, sink)
    write_bytes(target, sink.getvalue())
    return target


def _standard(pre_acts: Tensor, cfg: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Tensor:
    return pre_acts.relu()


def _jumprelu(pre_acts: Tensor, cfg: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Tensor:
    return pre_acts.relu() * (pre_acts > tensors["threshold"])


def _topk(pre_acts: Tensor, cfg: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Tensor:
    values, places = pre_acts.topk(int(cfg["k"]), dim=-1, sorted=False)  # type: ignore[call-overload]
    return torch.zeros_like(pre_acts).scatter(-1, places, values.relu())


_READERS = {"standard": _standard, "topk": _topk, "jumprelu": _jumprelu}


def _plain(
    architecture: str, cfg: Mapping[str, object], tensors: Mapping[str, Tensor]
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Encode and decode of an architecture that the layout itself defines."""
    activate = _READERS[architecture]
    W_enc, b_enc, W_dec, b_dec = (tensors[n] for n in ("W_enc", "b_enc", "W_dec", "b_dec"))
    shift = b_dec if cfg.get("apply_b_dec_to_input", True) else torch.zeros_like(b_dec)
    norms = W_dec.norm(dim=1) if cfg.get("rescale_acts_by_decoder_norm") else None

    def encode(x: Tensor) -> Tensor:
        pre_acts = (x.to(W_enc.dtype) - shift) @ W_enc + b_enc
        return activate(pre_acts if norms is None else pre_acts * norms, cfg, tensors)

    def decode(latents: Tensor) -> Tensor:
        return (latents if norms is None else latents / norms) @ W_dec + b_dec

    return encode, decode


def _through_registry(
    folder: Path,
    architecture: str,
    metadata: Mapping,
    tensors: Mapping[str, Tensor],
    registry: Registry | None,
) -> Coder:
    """A coder of a registered class, in evaluation mode, with the folder's tensors."""
    if registry is None or "greatctl_config" not in metadata:
        raise InputError(
            f"{folder}: the architecture {architecture!r} cannot be read",
            why="it is none of " + ", ".join(sorted(_READERS)) + ", and no plugin for it is at hand",
            fix=did_you_mean(architecture, _READERS),
            where=str(folder / CONFIG),
            code="unknown-architecture",
        )
    cls = registry.get("architectures", architecture)
    try:
        coder = cls(cls.Config(**metadata["greatctl_config"]))
        coder.load_state_dict(tensors)
    except (ValueError, TypeError, RuntimeError) as error:  # pydantic's error is a ValueError
        raise _damaged(folder / WEIGHTS, f"it does not fit the architecture {architecture!r}: {error}") from error
    return coder.eval()


def _read_cfg(folder: Path) -> dict:
    path = folder / CONFIG
    other = next((layout for name, layout in _OTHER_LAYOUTS.items() if (folder / name).exists()), None)
    if not (folder / WEIGHTS).exists() or not path.exists():
        found = (
            f"it is in the layout of {other}, which is not read yet"
            if other
            else f"there is no {CONFIG} with {WEIGHTS}"
        )
        raise InputError(
            f"{folder} is not an SAE that can be read",
            why=found,
            fix="name a folder in SAELens layout, or a trained SAE (`greatctl status` lists them)",
            where=str(folder),
            code="unknown-layout",
        )
    try:
        cfg = json.loads(path.read_bytes())
        missing = [key for key in _REQUIRED if key not in cfg]
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(path, str(error)) from error
    if missing:
        raise _damaged(path, "missing: " + ", ".join(missing))
    if cfg.get("normalize_activations", "none") != "none":
        raise InputError(
            f"{path}: normalize_activations {cfg['normalize_activations']!r} is not read",
            why="the factors that it needs are not in the folder, so its outputs would be mis-scaled",
            fix='save the SAE with its normalisation folded in (normalize_activations "none")',
            where=str(path),
        )
    return cfg


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    try:
        return load_tensors(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise _damaged(path, str(error)) from error


def _check_shapes(folder: Path, cfg: Mapping, tensors: Mapping[str, Tensor]) -> None:
    d, f = cfg["d_in"], cfg["d_sae"]
    wanted = {"W_enc": (d, f), "b_enc": (f,), "W_dec": (f, d), "b_dec": (d,)}
    if cfg["architecture"] == "jumprelu":
        wanted["threshold"] = (f,)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != wanted:
        raise _damaged(folder / WEIGHTS, f"tensors {found}, expected {wanted}")


def _damaged(path: Path, why: str) -> IntegrityError:
    return IntegrityError(
        f"{path} is damaged", why=why, fix="train the SAE again, or fetch the folder again", where=str(path)
    )
