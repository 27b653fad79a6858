"""Is this machine fit for the work? Each check says what it looked at, what it found, and what to do."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from ..errors import GreatctlError
from ..store.files import free_bytes
from .context import Project

__all__ = ["examine"]

_PACKAGES = {
    "torch": (2, 6),
    "transformers": (5, 9),
    "transformer-lens": (4, 3),
    "typer": (0, 29),
    "pluggy": (1, 7),
    "safetensors": (0, 5),
}
_CLOUD = ("Dropbox", "OneDrive", "Google Drive", "GoogleDrive", "iCloud", "CloudStorage", "Nextcloud", "Syncthing")
_ROOM = 60 * 2**30
_PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")


def examine(project: Project, *, offline: bool) -> list[dict[str, str]]:
    """Run every check; rows `{name, state, found, fix}` with state ok, warning or failed."""
    checks: list[Callable[[], dict[str, str]]] = [
        _python,
        *(lambda name=name, low=low: _package(name, low) for name, low in _PACKAGES.items()),
        _tensors,
        _gpu,
        lambda: _disk(project.data),
        lambda: _cloud(project.data),
        lambda: _locks(project.data),
        _proxy,
        lambda: _model(project, offline),
    ]
    return [check() for check in checks]


def _row(name: str, state: str, found: str, fix: str = "") -> dict[str, str]:
    return {"name": name, "state": state, "found": found, "fix": fix}


def _python() -> dict[str, str]:
    return _row("python", "ok", ".".join(map(str, sys.version_info[:3])))


def _package(name: str, lowest: tuple[int, int]) -> dict[str, str]:
    wanted = ".".join(map(str, lowest))
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return _row(name, "failed", "not installed", f"pip install '{name}>={wanted}'")
    numbers = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in found.split(".")[:2])
    if numbers >= lowest:
        return _row(name, "ok", found)
    return _row(name, "failed", found, f"pip install -U '{name}>={wanted}'")


def _tensors() -> dict[str, str]:
    """torch, numpy and safetensors were built to work together."""
    try:
        import numpy as np
        import torch
        from safetensors.torch import load, save

        there = load(save({"x": torch.from_numpy(np.arange(4, dtype=np.float32))}))["x"]
        same = bool((there == torch.arange(4)).all())
    except (ImportError, RuntimeError, AttributeError) as error:
        return _row("tensors", "failed", f"{type(error).__name__}: {error}", "reinstall torch and numpy together")
    if same:
        return _row("tensors", "ok", "torch, numpy and safetensors agree")
    return _row("tensors", "failed", "a tensor changed on its way through safetensors", "reinstall safetensors")


def _gpu() -> dict[str, str]:
    import torch

    if torch.cuda.is_available():
        props = torch.cuda.get_device_properties(0)
        return _row("gpu", "ok", f"{props.name}, {props.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        return _row("gpu", "ok", "Apple GPU (mps)")
    return _row("gpu", "warning", "none", "fine for the bundled model; Llama 3 8B wants one GPU with 24 GiB or more")


def _disk(data: Path) -> dict[str, str]:
    free = free_bytes(data)
    found = f"{free / 2**30:.0f} GiB free for {data}"
    if free >= _ROOM:
        return _row("disk", "ok", found)
    return _row(
        "disk", "warning", found, "one layer of Llama 3 8B activations over all texts is about 54 GB: --data-dir"
    )


def _cloud(data: Path) -> dict[str, str]:
    hit = next((part for part in data.parts if any(name.lower() in part.lower() for name in _CLOUD)), None)
    if hit is None:
        return _row("sync", "ok", "the data folder is not inside a cloud-synced folder")
    return _row(
        "sync",
        "warning",
        f"{data} lies inside {hit}",
        "syncing moves files while they are written and uploads 50 GB: choose another place with --data-dir",
    )


def _locks(data: Path) -> dict[str, str]:
    """Kernel locks must work where artifacts are made; some network file systems have none."""
    from ..store.lock import hold

    folder = data if data.is_dir() else Path(tempfile.gettempdir())
    try:
        with hold(folder / f"doctor-{os.getpid()}", required=True):
            pass
    except (OSError, GreatctlError) as error:
        return _row("locks", "warning", str(error), "run one greatctl at a time here, or use a local disk")
    finally:
        (folder / f".doctor-{os.getpid()}.lock").unlink(missing_ok=True)
    return _row("locks", "ok", f"file locks work in {folder}")


def _proxy() -> dict[str, str]:
    """`fetch` checks every address that it connects to, which a proxy would make impossible. Values are not shown:
    they may hold a password.
    """
    found = [name for name in _PROXIES if os.environ.get(name) or os.environ.get(name.lower())]
    if not found:
        return _row("proxy", "ok", "none is set")
    return _row(
        "proxy",
        "warning",
        f"{' and '.join(found)} set",
        "fetch connects by itself and does not use it; behind a proxy, name a base with --mirror",
    )


def _model(project: Project, offline: bool) -> dict[str, str]:
    """Can the configured model be had? Only its small config file is asked for."""
    name = project.manifest.model_name
    if name == "bundled" or Path(name).is_dir():
        return _row("model", "ok", name)
    if offline:
        return _row("model", "warning", f"{name}: not asked, --offline", "run doctor without --offline")
    from .. import model
    from .models import resolve

    source, display = resolve(name)
    try:
        info = model.describe(source, name=display)
    except GreatctlError as error:
        return _row("model", "warning", f"{name}: {error.message}", error.fix)
    return _row("model", "ok", f"{display}, {info.n_layers} layers of width {info.d_model}")
