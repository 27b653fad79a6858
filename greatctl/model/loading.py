"""From a name to a frozen model, with every refusal explained.

A source is a folder in `save_pretrained` layout or a hub id. A hub id is first brought into the Hugging Face
cache, pinned to its commit, and from there on it is a folder like any other; so gated models, missing tokens
and empty caches are met in one place, before anything heavy is loaded. Weights are read from safetensors
alone, never from pickles.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, ManifestError, UsageError
from .hub import snapshot
from .interface import BLOCK_SITES, Site, unknown_site

if TYPE_CHECKING:
    import torch

    from .interface import FrozenModel

__all__ = [
    "ENGINES",
    "LEAN_FAMILIES",
    "Located",
    "ModelInfo",
    "choose_engine",
    "describe",
    "load",
    "locate",
    "quiet",
    "revision_of",
    "weight_bytes",
]

ENGINES = ("auto", "lean", "transformer-lens")
DTYPES = ("auto", "float32", "bfloat16", "float16")
LEAN_FAMILIES = frozenset({"gpt2", "llama", "mistral", "qwen2", "qwen3"})
SMALL = 1024  # below this width float32 costs nothing and bf16 costs accuracy
_LIGHT = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)
_HEAVY = ("*.safetensors", "*.safetensors.index.json")
_BLOCK, _BLOCKS = (
    256 * 2**10,
    64,
)  # hashed per weight file: all of a small one, 16 MiB spread over a large one


@dataclass(frozen=True)
class Located:
    """A model's folder on this disk and the revision of its weights."""

    folder: Path
    revision: str


@dataclass(frozen=True)
class ModelInfo:
    """What config.json says, before any weights. `family` is its `model_type`, `dtype` the checkpoint's."""

    name: str
    revision: str
    family: str
    n_layers: int
    d_model: int
    d_vocab: int
    n_ctx: int
    dtype: str


def locate(source: str | Path, *, weights: bool = False, offline: bool = False) -> Located:
    """Find a model's folder; a hub id is brought into the cache (config, tokenizer, `weights` on request).

    Raises:
        InputError: there is no such folder.
        AccessError: gated, missing token, unknown repository, or offline without a cached copy.
        NetworkError: the hub cannot be reached.
    """
    folder = Path(source)
    if folder.is_dir():
        return Located(folder, _content_revision(folder))
    if isinstance(source, Path) or source.startswith((".", "/", "~")) or source.count("/") > 1 or not source:
        raise InputError(f"there is no folder {source}", why="a model is a folder or a hub id such as org/name")
    cached = snapshot(source, _LIGHT, offline)
    if weights:  # of the same commit, even if the branch moved meanwhile
        cached = snapshot(source, _LIGHT + _HEAVY, offline, cached.name)
    return Located(cached, cached.name)


def revision_of(source: str | Path, *, offline: bool = False) -> str:
    """The revision of a model's weights: a content hash for a folder, the commit for a hub id."""
    return locate(source, offline=offline).revision


def describe(source: str | Path, *, name: str = "", offline: bool = False) -> ModelInfo:
    """Read config.json.

    Raises:
        InputError: it is not the configuration of a language model; else as `locate`.
    """
    located = locate(source, offline=offline)
    if not (located.folder / "config.json").is_file():
        raise _no_model(source, "there is no config.json in it")
    try:
        config = json.loads((located.folder / "config.json").read_bytes())
        config = {**config, **config.get("text_config", {})}
        family = str(config["model_type"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _no_model(source, f"config.json is not a model's configuration ({error})") from error

    def number(*keys: str) -> int:
        for key in keys:
            if isinstance(config.get(key), int):
                return config[key]
        raise _no_model(source, f"config.json has no {keys[0]}")

    return ModelInfo(
        name=name or str(source),
        revision=located.revision,
        family=family,
        n_layers=number("num_hidden_layers", "n_layer", "num_layers"),
        d_model=number("hidden_size", "n_embd", "d_model"),
        d_vocab=number("vocab_size"),
        n_ctx=number("max_position_embeddings", "n_positions", "n_ctx"),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
    )


def choose_engine(engine: str, family: str, sites: Sequence[str] = ()) -> str:
    """`auto` settled: lean where it knows the family and every site, else transformer-lens.

    Raises:
        UsageError: an unknown engine or hook point, or lean asked for what it does not know.
    """
    if engine not in ENGINES:
        raise UsageError(
            f"unknown engine {engine!r}",
            why="it is none of the engines",
            fix=f"use one of {', '.join(ENGINES)}",
        )
    for name in sites:
        site = Site.parse(name)
        if not site.is_plausible:
            raise unknown_site(name, [f"blocks.{site.layer}.{kind}" for kind in BLOCK_SITES])
    foreign = [s for s in sites if not Site.parse(s).is_lean]
    able = family in LEAN_FAMILIES and not foreign
    if engine == "lean" and not able:
        what = f"the hook point {foreign[0]}" if foreign else f"the {family!r} family"
        raise UsageError(f"the lean engine does not know {what}", fix="use --engine transformer-lens")
    if engine == "auto":
        return "lean" if able else "transformer-lens"
    return engine


def load(
    source: str | Path,
    *,
    name: str,
    device: str = "cpu",
    dtype: str = "auto",
    engine: str = "auto",
    upto: int | None = None,
    device_map: str | Mapping[str, object] | None = None,
    offline: bool = False,
) -> FrozenModel:
    """Load a frozen model.

    Args:
        source: folder or hub id.
        name: what it is called in artifacts.
        dtype: `auto` is float32 below d_model 1024, else the checkpoint's own.
        engine: `auto` takes lean where it knows the family.
        upto: load only this many blocks (from the bottom) and no unembedding: enough to capture, not to run.
        device_map: instead of `device`: where each part lies, as Hugging Face's `from_pretrained` takes it ("auto"
            spreads the blocks over the GPUs and, if need be, main memory). Lean only.
        offline: use the cache alone.

    Raises:
        AccessError: gated, missing token, unknown repository, or offline without a cached copy; the fix says
        what to do.
        InputError: the folder is no model, or weights are missing from it.
    """
    info = describe(source, name=name, offline=offline)
    located = locate(source, weights=True, offline=offline)
    if not any(located.folder.glob("*.safetensors")):
        raise _no_model(source, "it has no *.safetensors weights (pickled weights are never read)")
    if upto is not None and not 1 <= upto <= info.n_layers:
        raise ManifestError(f"{upto} blocks are out of range", why=f"{info.name} has {info.n_layers}")
    chosen = choose_engine(engine, info.family)
    if device_map is not None and chosen != "lean":
        raise UsageError(
            f"{info.name} cannot be spread over several devices",
            why="the transformer-lens engine takes one device",
            fix="give one device, or use a model that the lean engine knows",
        )
    from .tokenizer import load_tokenizer, special_ids

    tokenizer = load_tokenizer(located.folder)
    hf = _load_weights(
        source, located.folder, _dtype(dtype, info), upto if chosen == "lean" else None, device_map=device_map
    )
    special = special_ids(tokenizer)
    if chosen == "lean":
        from .lean import LeanModel

        return LeanModel(hf if device_map is not None else hf.to(device), info, tokenizer, special)
    from .bridge import BridgeModel

    return BridgeModel(hf.to(device), info, tokenizer, special)


def weight_bytes(
    source: str | Path, info: ModelInfo, *, dtype: str = "auto", upto: int | None = None, offline: bool = False
) -> int:
    """About how much memory the weights take once loaded as `load` would; a hub id is brought into the cache."""
    located = locate(source, weights=True, offline=offline)
    import torch

    on_disk = sum(path.stat().st_size for path in located.folder.glob("*.safetensors"))
    stored: torch.dtype = getattr(torch, info.dtype, torch.float32)
    return on_disk * _dtype(dtype, info).itemsize * (upto or info.n_layers) // (stored.itemsize * info.n_layers)


def _dtype(dtype: str, info: ModelInfo) -> torch.dtype:
    import torch

    if dtype not in DTYPES:
        raise UsageError(
            f"unknown dtype {dtype!r}",
            why="it is no dtype for a model",
            fix=f"use one of {', '.join(DTYPES)}",
        )
    if dtype == "auto":
        dtype = "float32" if info.d_model < SMALL else info.dtype
    return getattr(torch, dtype)


def _load_weights(
    source: str | Path,
    folder: Path,
    dtype: torch.dtype,
    upto: int | None,
    *,
    device_map: str | Mapping[str, object] | None = None,
) -> Any:
    """The Hugging Face module, quiet; the bare decoder cut to `upto` blocks where that is given."""
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        if upto is not None:
            config.num_hidden_layers = upto
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[:upto]
        kind = AutoModelForCausalLM if upto is None else AutoModel
        with quiet():
            loaded: Any = kind.from_pretrained(
                str(folder),
                config=config,
                dtype=dtype,
                device_map=device_map,
                attn_implementation="sdpa",
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise _no_model(source, str(error).strip().splitlines()[0]) from error
    hf, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would fill them with random numbers and go on
        raise _no_model(source, f"weights are missing: {', '.join(missing[:3])}")
    return hf


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' bars and load reports off the terminal (upper blocks are left out on purpose)."""
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def _no_model(source: str | Path, why: str) -> InputError:
    return InputError(
        f"{source} is not a usable model", why=why, fix="name a Hugging Face model, or use `--model bundled`"
    )


def _content_revision(folder: Path) -> str:
    """sha256 over sizes and evenly spread blocks of config and weights (every byte up to 16 MiB)."""
    total = hashlib.sha256()
    for path in sorted([*folder.glob("config.json"), *folder.glob("*.safetensors")]):
        size = path.stat().st_size
        total.update(f"{path.name} {size}\n".encode())
        stride = max(_BLOCK, size // _BLOCKS)
        with path.open("rb") as stream:
            for start in range(0, size, stride):
                stream.seek(start)
                total.update(stream.read(_BLOCK))
    return total.hexdigest()
