"""The files of an SAE's folder, in whatever layout: JSON objects, tensors, and tensors under their other names.

What is read is checked here, once: a file that is torn, or that has more or fewer tensors than its layout, is damage
(exit 6) and is named; it never becomes numbers that look right.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from torch import Tensor

from ..errors import InputError, IntegrityError

__all__ = ["damaged", "needed", "number", "read_object", "read_tensors", "renamed", "shapes", "unreadable"]


def damaged(path: Path, why: str) -> IntegrityError:
    """The error for a file that is not what its layout says."""
    return IntegrityError(
        f"{path} is damaged", why=why, fix="train the SAE again, or fetch the folder again", where=str(path)
    )


def unreadable(path: Path, what: str, why: str, fix: str) -> InputError:
    """The error for a file that is whole, and says something that greatctl does not compute."""
    return InputError(f"{path}: {what}", why=why, fix=fix, where=str(path), code="unreadable-cfg")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        IntegrityError: it cannot be read, or is no object.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise damaged(path, str(error)) from error
    if not isinstance(value, dict):
        raise damaged(path, "it is JSON, but no object")
    return value


def needed(path: Path, said: Mapping[str, Any], *keys: str) -> None:
    """Keys that a config file must have.

    Raises:
        IntegrityError: some are missing.
    """
    missing = [key for key in keys if said.get(key) is None]
    if missing:
        raise damaged(path, "missing: " + ", ".join(missing))


def number(path: Path, said: Mapping[str, Any], key: str) -> int:
    """A size that a config file must have.

    Raises:
        IntegrityError: it is missing, or no positive whole number.
    """
    value = said.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise damaged(path, f"{key} is no positive whole number: {value!r}" if key in said else f"missing: {key}")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU, in the file's dtypes.

    Raises:
        IntegrityError: it cannot be read.
    """
    try:
        return load_tensors(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise damaged(path, str(error)) from error


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes in a safetensors file, from its header alone.

    Raises:
        IntegrityError: it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise damaged(path, str(error)) from error


def renamed(path: Path, found: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Float32 tensors under SAELens's names.

    Args:
        names: name in the file -> name here; `.T` at its end says that the file has the transpose.

    Raises:
        IntegrityError: a tensor is missing, or is not in `names`.
    """
    wrong = [f"{name} is missing" for name in sorted(names.keys() - found.keys())]
    wrong += [f"{name} is not in this layout" for name in sorted(found.keys() - names.keys())]
    wrong += [
        f"{name} is {list(found[name].shape)}, not a matrix"
        for name, mine in names.items()
        if mine.endswith(".T") and name in found and found[name].ndim != 2
    ]
    if wrong:
        raise damaged(path, "tensor " + "; ".join(wrong))
    return {
        mine.removesuffix(".T"): (found[name].T if mine.endswith(".T") else found[name]).float().contiguous()
        for name, mine in names.items()
    }
