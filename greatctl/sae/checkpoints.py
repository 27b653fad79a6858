"""What a training run needs to go on after a kill, as numbered files.

A checkpoint is one safetensors file, so that one rename makes it whole; the numbers beside the tensors (step,
cursor, counters) are JSON in its header. Two are kept: should the newest be torn by a failing disk, the one before
serves.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from ..store.files import canonical_json, write_bytes

__all__ = ["Checkpoints"]

_KEPT = 2
_SLOW_SECONDS, _MOST_SHARE = 1.0, 0.05


class Checkpoints:
    """Numbered checkpoint files of a run; the last two are kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seconds, self._written = 0.0, 0.0

    @property
    def affordable(self) -> bool:
        """Whether a checkpoint now would keep all of them below 5 % of the run's time (large ones take seconds)."""
        waited = time.monotonic() - self._written
        return self._seconds < _SLOW_SECONDS or self._seconds < _MOST_SHARE * waited

    def write(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, object]) -> None:
        """Write the checkpoint of `step` whole and durably, then remove all but the last two."""
        began = time.monotonic()
        data = save_tensors(
            {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {"state": canonical_json(state)}
        )
        write_bytes(self.folder / f"step-{step:09d}.safetensors", data)
        for old in self._files()[:-_KEPT]:
            old.unlink()
        self._written = time.monotonic()
        self._seconds = self._written - began

    def steps(self) -> set[int]:
        """The steps whose checkpoints can be read."""
        return {_step(path) for path in self._files() if _readable(path)}

    def rewind(self, step: int) -> None:
        """Forget every checkpoint after `step`: a set of runs goes on where all of them can."""
        for path in self._files():
            if _step(path) > step:
                path.unlink()

    def latest(self) -> tuple[dict[str, Tensor], dict] | None:
        """Tensors and state of the newest readable checkpoint."""
        for path in reversed(self._files()):
            try:
                with safe_open(path, framework="pt") as stream:
                    state = json.loads(stream.metadata()["state"])
                    return {name: stream.get_tensor(name) for name in stream.keys()}, state  # noqa: SIM118
            except (SafetensorError, OSError, ValueError, KeyError, TypeError):
                continue
        return None

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"))


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _readable(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as stream:
            return "state" in (stream.metadata() or {})
    except (SafetensorError, OSError):
        return False
