"""A trained SAE's folder: the SAELens v6 layout, written and read with safetensors alone; other layouts, opened.

    cfg.json                 architecture, sizes, metadata
    sae_weights.safetensors  the tensors of the architecture (see `layout`)

Whatever training did to its inputs is folded away before writing, `normalize_activations` is "none", and
decoder rows have norm 1; so the file works on raw activations wherever it is read. BatchTopK and Matryoshka are
written as a JumpReLU, which is what they are at inference, and transcoders as SAELens's with thresholds. An
architecture that SAELens does not know keeps its own name, and is read through the registry. Folders of other programs
(`foreign`) open as the same `LoadedSAE`, and `foreign_write` writes two of their layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from ..errors import InputError, StageError, UsageError, did_you_mean
from ..store.files import write_bytes, write_json
from .coder import Coder
from .foreign import OWN, Foreign, recognise
from .foreign_files import damaged, needed, read_object, read_tensors, unreadable
from .foreign_write import write_dictionary_learning, write_sparsify, write_state_dict
from .layout import LAYOUTS, Reading, objection

__all__ = ["CONFIG", "EXPORTS", "WEIGHTS", "LoadedSAE", "Origin", "describe", "export", "load", "save"]

CONFIG, WEIGHTS = OWN
_LAYOUT_VERSION = "6.54.12"
_OLDEST = 6  # earlier versions have another cfg.json
_REQUIRED = ("architecture", "d_in", "d_sae", "dtype")
_DTYPES = ("float32", "bfloat16", "float16")
_TRAINING_ONLY = ("batchtopk", "matryoshka_batchtopk")
EXPORTS = ("saelens", "sparsify", "dictionary_learning", "pth")


class Registry(Protocol):
    """What is needed of `greatctl.extend.registry.Registry`."""

    def get(self, kind: str, name: str) -> type:
        """The class registered as `name`."""
        ...


@dataclass(frozen=True)
class Origin:
    """What an SAE was trained on, for cfg.json. A transcoder has a `target_hook_point`: the site that it writes."""

    model_name: str
    hook_point: str
    context_size: int
    prepend_bos: bool = True
    target_hook_point: str | None = None


@dataclass(frozen=True)
class LoadedSAE:
    """An SAE that reads raw activations.

    Attributes:
        name: the folder's name.
        arch: the architecture it was trained as (`batchtopk`), else the one of the file.
        hook_point: TransformerLens name of the site that it reads, None where the folder does not say.
        target_hook_point: the site that a transcoder writes; None for an autoencoder, which writes where it reads.
        d_in: width of what it reads.
        cfg: cfg.json.
        W_dec: [d_sae, d_out]; a latent's row is its direction.
    """

    name: str
    arch: str
    hook_point: str | None
    target_hook_point: str | None
    d_in: int
    cfg: Mapping[str, object]
    W_dec: Tensor
    _encode: Callable[[Tensor], Tensor]
    _decode: Callable[[Tensor], Tensor]
    _reconstruct: Callable[[Tensor], Tensor]

    @property
    def d_out(self) -> int:
        """Width of what it writes."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_dec.shape[0]

    def encode(self, x: Tensor) -> Tensor:
        """Latent activations [n, d_sae] >= 0 of raw activations x [n, d_in].

        Raises:
            InputError: x has another width.
        """
        self._must_fit(x)
        with torch.no_grad():
            return self._encode(x)

    def decode(self, latents: Tensor) -> Tensor:
        """[n, d_out] from latents; what a skip-transcoder takes straight from x is not in it."""
        with torch.no_grad():
            return self._decode(latents)

    def reconstruct(self, x: Tensor) -> Tensor:
        """What it makes of raw activations x [n, d_in]: [n, d_out]. Errors as `encode`."""
        self._must_fit(x)
        with torch.no_grad():
            return self._reconstruct(x)

    def _must_fit(self, x: Tensor) -> None:
        if x.shape[-1] != self.d_in:
            raise InputError(
                f"{self.name} reads {self.d_in} numbers, and was given {x.shape[-1]}",
                why=f"these are not the activations of {self.hook_point or 'the place'} that it was trained on",
                fix="choose the model that the SAE was trained on, or another SAE",
                code="another-model",
            )


def save(folder: Path, coder: Coder, scale: float, origin: Origin, *, target_scale: float = 1.0) -> None:
    """Write `coder`, trained on inputs `scale * x` (and targets `target_scale * y`), as a folder that reads raw x.

    Raises:
        StageError: a weight is NaN or infinite.
    """
    state = coder.folded(scale, target_scale).inference_state()
    broken = sorted(name for name, tensor in state.tensors.items() if not bool(torch.isfinite(tensor).all()))
    if broken:
        raise StageError(
            "training ended with weights that are not finite, so they are not saved",
            why=f"NaN or infinity in {', '.join(broken)}",
            fix="train again from the start with a lower --lr and --force",
            code="diverged",
        )
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
    if origin.target_hook_point is not None:
        metadata["hook_name_out"] = origin.target_hook_point
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
    """Open a folder in SAELens's layout, or in one of `foreign`'s.

    Raises:
        InputError: the folder is missing, or in another layout or architecture than is known here.
        IntegrityError: the config or the weights cannot be read, or do not fit each other.
    """
    layout = recognise(folder)
    cfg = _read_cfg(folder) if layout is None else layout.describe(folder)
    tensors = read_tensors(folder / WEIGHTS) if layout is None else layout.tensors(folder, cfg)
    tensors = {k: v.to(device, torch.float32) for k, v in tensors.items()}
    metadata = cfg.get("metadata") or {}
    architecture = str(cfg["architecture"])
    if layout is not None or architecture in LAYOUTS:
        _check(folder / (layout.files[-1] if layout else WEIGHTS), cfg, tensors)
        reader: Reading | Coder = Reading(cfg, tensors)
    else:
        reader = _through_registry(folder, architecture, metadata, tensors, registry).to(device)
    return LoadedSAE(
        name=folder.resolve().name,
        arch=str(metadata.get("training_architecture") or architecture),
        hook_point=metadata.get("hook_name"),
        target_hook_point=metadata.get("hook_name_out"),
        d_in=int(cfg["d_in"]),
        cfg=cfg,
        W_dec=reader.W_dec.detach(),
        _encode=reader.encode,
        _decode=reader.decode,
        _reconstruct=reader.reconstruct,
    )


def describe(folder: Path) -> tuple[dict, tuple[str, ...]]:
    """What a folder says of itself in cfg.json's words, and the files that it consists of; no weights are read.

    Raises: as `load`, but for what only the weights show.
    """
    layout: Foreign | None = recognise(folder)
    return (read_object(folder / CONFIG), OWN) if layout is None else (layout.describe(folder), layout.files)


def export(folder: Path, form: str, *, say: Callable[[str], None] | None = None) -> Path:
    """Write exports/ in a finished SAE's folder, for other programs.

    Args:
        form: `saelens` (a folder of the two files), `sparsify`, `dictionary_learning` or `pth` (a state dict, which
            greatctl never reads back).
        say: told where the exported SAE is not quite the same one.

    Returns:
        The folder that the other program opens, or the file.

    Raises:
        UsageError: that program has no such architecture.
    """
    cfg, tensors = _read_cfg(folder), read_tensors(folder / WEIGHTS)
    if form != "pth" and cfg["architecture"] not in LAYOUTS:
        raise UsageError(
            f"{cfg['architecture']} cannot be exported to {form}",
            why="it is a plugin's architecture, which no other program has",
            fix="use --export pth",
        )
    exports = folder / "exports"
    if form == "sparsify":
        return write_sparsify(exports / "sparsify", cfg, tensors, say or (lambda text: None))
    if form == "dictionary_learning":
        return write_dictionary_learning(exports / "dictionary_learning", cfg, tensors)
    if form == "pth":
        return write_state_dict(exports / f"{folder.name}.pth", cfg, tensors)
    for name in OWN:
        write_bytes(exports / "saelens" / name, (folder / name).read_bytes())
    return exports / "saelens"


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
            why="it is a checkpoint of SAELens's training, whose threshold no reader applies"
            if architecture in _TRAINING_ONLY
            else "it is none of " + ", ".join(sorted(LAYOUTS)) + ", and no plugin for it is at hand",
            fix="save it from SAELens for inference (as a jumprelu)"
            if architecture in _TRAINING_ONLY
            else did_you_mean(architecture, LAYOUTS),
            where=str(folder / CONFIG),
            code="unknown-architecture",
        )
    cls = registry.get("architectures", architecture)
    try:
        coder = cls(cls.Config(**metadata["greatctl_config"]))
        coder.load_state_dict(tensors)
    except (ValueError, TypeError, RuntimeError) as error:  # pydantic's error is a ValueError
        raise damaged(folder / WEIGHTS, f"it does not fit the architecture {architecture!r}: {error}") from error
    return coder.eval()


def _read_cfg(folder: Path) -> dict:
    path = folder / CONFIG
    cfg = read_object(path)
    needed(path, cfg, *_REQUIRED)
    if not isinstance(cfg.get("metadata") or {}, dict):
        raise damaged(path, "metadata is no object")
    refusal = _refusal(cfg)
    if refusal:
        raise unreadable(path, *refusal)
    return cfg


def _refusal(cfg: Mapping) -> tuple[str, str, str] | None:
    """What is refused of a cfg.json that is whole: what, why, fix."""
    again = "load the SAE with a current SAELens and save it again"
    if cfg.get("normalize_activations", "none") != "none":
        return (
            f"normalize_activations {cfg['normalize_activations']!r} is not read",
            "the factors that it needs are not in the folder, so its outputs would be mis-scaled",
            'save the SAE with its normalisation folded in (normalize_activations "none")',
        )
    if cfg.get("reshape_activations", "none") != "none":
        why = "its inputs are the heads of an attention layer side by side, which no site gives"
        return f"reshape_activations {cfg['reshape_activations']!r} is not read", why, "choose an SAE of another site"
    if str(cfg["dtype"]).removeprefix("torch.") not in _DTYPES:
        return f"dtype {cfg['dtype']!r} is not read", "it is none of " + ", ".join(_DTYPES), again
    version = str((cfg.get("metadata") or {}).get("sae_lens_version") or "")
    major = version.partition(".")[0]
    if not major.isdecimal() or int(major) < _OLDEST:
        found = f"of version {version}" if version else "without metadata.sae_lens_version"
        why = f"cfg.json is {found}; before version {_OLDEST} its keys mean something else"
        return "the layout of an earlier SAELens is not read", why, again
    return None


def _check(path: Path, cfg: Mapping, tensors: dict[str, Tensor]) -> None:
    """Tensors and cfg.json fit each other; a `scaling_factor` of ones, which some files carry, is dropped."""
    factor = tensors.get("scaling_factor")
    if factor is not None and bool((factor == 1).all()):
        del tensors["scaling_factor"]
    why = objection(cfg, tensors)
    if why is None:
        broken = sorted(name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all()))
        why = f"NaN or infinity in {', '.join(broken)}" if broken else None
    if why:
        raise damaged(path, why)
