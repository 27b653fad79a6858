"""What every stage is handed, and what it hands back.

A stage has typed settings (`Config`), a `plan` that touches nothing (what would be made, from what, how large) and a
`run`, which begins with that very plan; so what `--dry-run` prints is what happens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from ..events import Run
from ..store.artifact import Identity

if TYPE_CHECKING:
    from ..extend.manager import Plugins
    from ..manifest import Manifest

__all__ = ["STAGES", "Context", "Plan", "Project", "Result", "StageConfig"]

STAGES = ("fetch", "tokenize", "harvest", "train", "interpret", "patch", "report")


class StageConfig(BaseModel):
    """Base of the stages' settings: frozen, and an unknown key is an error. Each field's description is its help."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


@dataclass(frozen=True)
class Project:
    """Where things are. `root` is the folder of sources.toml (or the one named with `-C`)."""

    root: Path
    manifest: Manifest
    data: Path
    results: Path

    @property
    def raw(self) -> Path:
        """One folder a source."""
        return self.data / "raw"

    @property
    def tokens(self) -> Path:
        """Token windows."""
        return self.data / "tokens"

    @property
    def activations(self) -> Path:
        """Activation shards, by model and hook point."""
        return self.data / "activations"

    @property
    def saes(self) -> Path:
        """Trained autoencoders, in SAELens layout."""
        return self.results / "saes"

    @property
    def features(self) -> Path:
        """Feature tables."""
        return self.results / "features"

    @property
    def patches(self) -> Path:
        """Patching effects."""
        return self.results / "patches"

    @property
    def report(self) -> Path:
        """The report."""
        return self.results / "report"


@dataclass(frozen=True)
class Context:
    """Everything a stage may use besides its own config.

    Attributes:
        origins: where each setting came from ("flag --k", "env GREATCTL_SEED", "sources.toml [train]", "default").
        device: `cpu`, `cuda`, `cuda:1`, `mps` or `auto`.
    """

    project: Project
    plugins: Plugins
    run: Run
    origins: Mapping[str, str] = field(default_factory=dict)
    force: bool = False
    offline: bool = False
    device: str = "auto"


@dataclass(frozen=True)
class Plan:
    """What a stage would do. `facts` are lines for people and JSON values for programs (items, bytes, tokens, …)."""

    stage: str
    final: Path | None
    identity: Identity | None
    facts: Mapping[str, object] = field(default_factory=dict)

    @property
    def target(self) -> tuple[Path, Identity]:
        """Where its artifact goes and what that is made from; only of a plan that makes one."""
        assert self.final is not None and self.identity is not None
        return self.final, self.identity


@dataclass(frozen=True)
class Result:
    """What a stage did.

    Attributes:
        artifact: the sealed folder (or the exported file), None where there is none.
        summary: the fixed keys of the `--json` document, JSON values only.
        up_to_date: nothing had to be done.
        exit_code: 0, or 11 where something is missing.
        view: whatever the terminal view of this stage needs beyond the summary (never in the JSON document).
    """

    stage: str
    artifact: Path | None
    summary: Mapping[str, object]
    up_to_date: bool = False
    exit_code: int = 0
    view: Mapping[str, object] = field(default_factory=dict)
