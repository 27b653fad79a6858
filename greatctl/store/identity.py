"""What was asked for, as one value with a fingerprint: the answer to "is this still what I want?"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .files import canonical_json, sha256_bytes

__all__ = ["Identity", "difference"]


@dataclass(frozen=True)
class Identity:
    """What was asked for. Equal identities give equal outputs; no time, path or host belongs in here.

    Attributes:
        stage: the stage's name.
        config: every setting that changes the outputs (JSON values), the seed included.
        inputs: name -> fingerprint of each input artifact.
        plugins: name -> digest of each plugin item used (built-ins are not listed).
        model_revision: hash or commit of the model's weights, where one is used.
    """

    stage: str
    config: Mapping[str, object]
    inputs: Mapping[str, str] = field(default_factory=dict)
    plugins: Mapping[str, str] = field(default_factory=dict)
    model_revision: str | None = None

    def record(self) -> dict[str, object]:
        """The identity as JSON values."""
        return {
            "stage": self.stage,
            "config": dict(self.config),
            "inputs": dict(self.inputs),
            "plugins": dict(self.plugins),
            "model_revision": self.model_revision,
        }

    @property
    def fingerprint(self) -> str:
        """sha256 of the canonical JSON of the identity."""
        return sha256_bytes(canonical_json(self.record()).encode())


def difference(old: Mapping, new: Mapping) -> str:
    """The first difference between two identities, in words ("config.k 64 -> 32")."""
    for part in ("stage", "config", "inputs", "plugins", "model_revision"):
        before, after = old.get(part), new.get(part)
        if before == after:
            continue
        if not (isinstance(before, Mapping) and isinstance(after, Mapping)):
            return f"{part} {before} -> {after}"
        for key in sorted({*before, *after}):
            if before.get(key) != after.get(key):
                if part in ("inputs", "plugins"):
                    return f"{part}.{key} changed"
                return f"{part}.{key} {_change(before.get(key), after.get(key))}"
    return "the fingerprint differs"


def _change(before: object, after: object) -> str:
    """ "64 -> 32"; of a table, the first of its entries that changed."""
    if not (isinstance(before, Mapping) and isinstance(after, Mapping)):
        return f"{before} -> {after}"
    keys = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
    what = "is new" if keys[0] not in before else "is gone" if keys[0] not in after else "changed"
    return f"{keys[0]} {what}" + (f" (and {len(keys) - 1} more)" if len(keys) > 1 else "")
