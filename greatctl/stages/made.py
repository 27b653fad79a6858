"""The first question of every stage: is what it would make there already?"""

from __future__ import annotations

from pathlib import Path

from ..store.artifact import Artifact, Identity, current, touch
from .context import Context

__all__ = ["made_already"]


def made_already(ctx: Context, speaker: str, final: Path, identity: Identity) -> Artifact | None:
    """The artifact at `final` if it is up to date and nobody forces; then it counts as the newest of its kind.

    Either way `speaker` (a stage's name) says so: that it is up to date, or the first reason why it is made again.
    """
    artifact, reason = current(final, identity)
    if artifact is None or ctx.force:
        ctx.run.notice(f"{speaker}: {reason or 'forced'}")
        return None
    touch(artifact)
    ctx.run.notice(f"{speaker}: up to date")
    return artifact
