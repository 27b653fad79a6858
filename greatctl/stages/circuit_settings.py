"""The settings of `greatctl patch --circuit`: what kind of circuit, how it is chosen, and from which file it is re-tested."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from .context import StageConfig

__all__ = ["CircuitSettings"]


class CircuitSettings(StageConfig):
    """Part of the settings of `greatctl patch`."""

    circuit: bool = Field(False, description="find a small set of components that carries the effect, and test it")
    circuit_kind: Literal["edges", "nodes", "latents"] = Field(
        "edges", description="for circuits: what they consist of; latents of every SAE named, or of all of the project"
    )
    circuit_size: int | None = Field(
        None, ge=1, description="for circuits: how many components (default: as few as restore nine tenths)"
    )
    circuit_file: Path | None = Field(None, description="test this circuit.json, edited or not, instead of finding one")
    selection: Literal["threshold", "greedy"] = Field(
        "threshold", description="for circuits: the largest scores; greedy also takes out what is not needed"
    )
    random_sets: int = Field(
        200,
        ge=29,
        description="for circuits: random sets of equal size to compare with (fewer than 29 could decide nothing)",
    )
