"""What is done, what is stale and why, and what is damaged, without loading a model or any third-party plugin.

A sealed artifact is stale when its stage, planned again now, would be something else. Settings that a person gave as a
flag count as given; everything else is resolved anew, so an edited sources.toml shows as the first setting that differs.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import GreatctlError
from ..events import Run
from ..extend.manager import load_plugins
from ..settings import resolve
from ..store.artifact import Artifact, difference, sealed_under
from .context import Context, Project

__all__ = ["damage", "survey"]


def survey(project: Project) -> list[dict[str, object]]:
    """One row an artifact: stage, path, state (`up-to-date`, `stale`, `damaged`), reason."""
    rows: list[dict[str, object]] = []
    for stage, artifact in _artifacts(project):
        damaged = artifact.damaged()
        reason = damaged[0] if damaged else _stale(project, stage, artifact)
        state = "damaged" if damaged else ("stale" if reason else "up-to-date")
        size = sum(row["bytes"] for row in artifact.outputs)
        rows.append({"stage": stage, "path": str(artifact.path), "state": state, "reason": reason, "bytes": size})
    return rows


def damage(project: Project) -> tuple[int, list[str]]:
    """Hash everything: (number of artifacts, damaged files with a word why)."""
    found: list[str] = []
    checked = 0
    for root in (project.data, project.results):
        for record in sorted(root.rglob("artifact.json")) if root.is_dir() else []:
            if any(part.startswith(".") for part in record.relative_to(root).parts):
                continue
            checked += 1
            found += _damage_of(record.parent)
    return checked, found


def _damage_of(folder: Path) -> list[str]:
    from ..store.artifact import load

    try:
        return [f"{folder}/{name}" for name in load(folder).damaged(deep=True)]
    except GreatctlError as error:
        return [f"{folder}/artifact.json ({error.message})"]


def _artifacts(project: Project) -> Iterator[tuple[str, Artifact]]:
    roots = (project.raw, project.tokens, project.activations, project.saes)
    for root in (*roots, project.features, project.patches, project.results):
        for artifact in sealed_under(root):
            if root != project.results or artifact.path == project.report:
                yield artifact.stage, artifact


def _stale(project: Project, stage: str, artifact: Artifact) -> str:
    """The first reason why running the stage again would make something else, or ""."""
    if stage == "fetch":
        return ""  # a source is compared with its bytes, which only a fetch can see
    module = importlib.import_module(f"greatctl.stages.{stage}")
    recorded: dict = dict(artifact.record.get("given") or {})  # type: ignore[call-overload]
    given = {name: value for name, value in recorded.items() if name in module.Config.model_fields}
    try:
        found = resolve(module.Config, stage, flags=given, manifest=project.manifest, environ=os.environ)
        plugins = load_plugins(folder=None, enabled=False)
        plan = module.plan(Context(project, plugins, Run(stage), found.origins), found.config)
    except GreatctlError as error:
        return error.message
    if plan.identity is None or plan.identity.fingerprint == artifact.fingerprint:
        return ""
    return difference(artifact.record, plan.identity.record())
