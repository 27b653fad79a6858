"""SAEs that other programs wrote: whose folder it is, and what it says in SAELens's words.

Each layout has a reader that gives a cfg.json and tensors under SAELens's names, so that behind this module there is one
kind of SAE (`layout.Reading`). A folder is recognised by a file that only its layout has.

    sparsify                 cfg.json, sae.safetensors
    dictionary_learning      config.json, ae.pt
    Llama Scope              hyperparams.json, checkpoints/final.safetensors
    Llama Scope 2            config.json, sae_weights.safetensors (llamascopium)
    Gemma Scope, and 2       params.npz; config.json, params.safetensors

Besides sparsify's and dictionary_learning's these come as releases: they are read and not written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import InputError
from . import foreign_dictionaries, foreign_gemma_scope, foreign_llama_scope, foreign_sparsify

__all__ = ["FOREIGN", "OWN", "Foreign", "recognise", "refused"]

OWN = ("cfg.json", "sae_weights.safetensors")
_DEPTH, _SHOWN = 4, 8  # folders below a run that are looked at, and how many are named


@dataclass(frozen=True)
class Foreign:
    """One program's layout.

    Attributes:
        mark: the file that only this layout has.
        files: what an SAE's folder consists of.
        describe: cfg.json in SAELens's words, without reading weights.
        tensors: the tensors under SAELens's names, float32, given that cfg.
    """

    name: str
    mark: str
    files: tuple[str, ...]
    describe: Callable[[Path], dict[str, Any]]
    tensors: Callable[[Path, dict[str, Any]], dict[str, Tensor]]


def _foreign(name: str, mark: str, files: tuple[str, ...], describe: Callable, tensors: Callable) -> Foreign:
    return Foreign(name, mark, tuple(dict.fromkeys(files)), describe, tensors)


_S, _D, _L, _G = foreign_sparsify, foreign_dictionaries, foreign_llama_scope, foreign_gemma_scope
FOREIGN = (
    _foreign("sparsify", _S.WEIGHTS, (_S.CONFIG, _S.WEIGHTS), _S.describe, _S.tensors),
    _foreign("dictionary_learning", _D.WEIGHTS, (_D.CONFIG, _D.WEIGHTS), _D.describe, _D.tensors),
    _foreign("Llama Scope", _L.FIRST[0], _L.FIRST, _L.describe_first, _L.tensors_first),
    _foreign("Llama Scope 2", _L.SECOND[1], _L.SECOND, _L.describe_second, _L.tensors_second),
    _foreign("Gemma Scope", _G.FIRST[1], _G.FIRST, _G.describe_first, _G.tensors_first),
    _foreign("Gemma Scope 2", _G.SECOND[1], _G.SECOND, _G.describe_second, _G.tensors_second),
)
_NOT_READ: Mapping[str, str] = {  # a file's pattern -> what it is
    "sae_weights.dcp": "a distributed checkpoint of Llama Scope 2",
    "sae_weights.pt": "a checkpoint of Llama Scope 2",
    "*.sae.pt": "Qwen-Scope's layout",
    "*.pth": "a state dict alone, as Goodfire's, without a config",
}


def recognise(folder: Path) -> Foreign | None:
    """The layout of a folder from elsewhere; None for SAELens's, which is greatctl's own.

    Raises:
        InputError: it is no SAE's folder, or files of its layout are missing, or it holds several SAEs.
    """
    if all((folder / name).is_file() for name in OWN):
        return None
    found = next((layout for layout in FOREIGN if (folder / layout.mark).is_file()), None)
    if found is None:
        raise refused(folder, _why_unknown(folder), _inside(folder))
    missing = [name for name in found.files if not (folder / name).is_file()]
    if missing:
        of = f"{OWN[0]} or {missing[0]}" if found.mark == OWN[1] else " and ".join(missing)
        raise refused(folder, f"it is in the layout of {found.name}, but {of} is missing")
    return found


def refused(folder: Path, why: str, inside: list[str] | None = None) -> InputError:
    """The error for a folder that cannot be read."""
    if inside:
        more = f" and {len(inside) - _SHOWN:,} more" if len(inside) > _SHOWN else ""
        return InputError(
            f"{folder} is not an SAE, but holds {'some' if len(inside) > 1 else 'one'}",
            why=f"there {'are' if len(inside) > 1 else 'is'} {', '.join(inside[:_SHOWN])}{more}",
            fix=f"name one of them: {folder / inside[0]}",
            where=str(folder),
            code="several-saes",
        )
    return InputError(
        f"{folder} is not an SAE that can be read",
        why=why,
        fix="name a folder in the layout of SAELens, "
        + ", ".join(layout.name for layout in FOREIGN)
        + ", or a trained SAE (`greatctl status` lists them)",
        where=str(folder),
        code="unknown-layout",
    )


def _why_unknown(folder: Path) -> str:
    for pattern, what in _NOT_READ.items():
        if any(folder.glob(pattern)):
            return f"it holds {what}, which is not read"
    return f"there is no {OWN[0]} with {OWN[1]}, and no file of another known layout"


def _inside(folder: Path, depth: int = _DEPTH) -> list[str]:
    """SAEs in the folders below, by their paths from here: a run has one for each hook point or trainer."""
    if depth == 0 or not folder.is_dir():
        return []
    found = []
    for path in sorted(folder.iterdir(), key=_by_number):
        if not path.is_dir() or path.name.startswith("."):
            continue
        whole = all((path / name).is_file() for name in OWN) or any((path / f.mark).is_file() for f in FOREIGN)
        found += [path.name] if whole else [f"{path.name}/{name}" for name in _inside(path, depth - 1)]
    return found


def _by_number(path: Path) -> list[tuple[int, str]]:
    """layers.2 before layers.10."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", path.name)]
