"""What is done, what is stale and why, and what is damaged, without loading a model or any third-party code.

A sealed artifact is stale when its stage, planned again now, would be something else. Settings that a person gave as a
flag count as given; everything else is resolved anew, so an edited sources.toml shows as the first setting that differs.
Where a stage has made several things (two hook points, three autoencoders), each is planned as itself and not as the one
that is in use now. What was made from something stale is stale too, whatever its own settings say.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import AccessError, GreatctlError
from ..events import Run
from ..extend.loading import code_digest, from_path, in_folder, installed
from ..extend.manager import Plugins, load_plugins
from ..extend.registry import Item
from ..settings import resolve
from ..store.artifact import Artifact, difference, load
from .context import STAGES, Context, Plan, Project, StageConfig

__all__ = ["damage", "survey"]

_ITEMS = {"train": ("architectures", "arch"), "patch": ("metrics", "metric")}
_COMPANIONS = "controls"  # made by `train --controls`
_LABELS = "labels"  # made by `interpret --labeler`
_FINE, _STALE, _DAMAGED = "up-to-date", "stale", "damaged"


def survey(project: Project, *, paths: Sequence[str] = ()) -> list[dict[str, object]]:
    """One row an artifact, in the order of the stages: stage, path, state, reason, bytes.

    `state` is `up-to-date` (the reason may then hold a note), `stale`, `damaged`, or `missing` for a stage that has made
    nothing while others have.

    Args:
        paths: files or folders of `--plugin`; like the project's own plugins they are hashed, never run.
    """
    local = _LocalPlugins(project, paths)
    rows: list[dict[str, object]] = []
    known: dict[str, tuple[str, Path]] = {}  # fingerprint -> state and folder, of the stages before
    for stage, root in _roots(project).items():
        before = len(rows)
        for folder in _sealed(root):
            try:
                artifact = load(folder)
            except GreatctlError as error:
                rows.append(_row(stage, folder, _DAMAGED, error.message))
                continue
            state, reason = _judge(project, local, known, stage, artifact)
            if known.get(artifact.fingerprint, ("", folder))[0] != _FINE:
                known[artifact.fingerprint] = (state, folder)
            rows.append(_row(stage, folder, state, reason, sum(row["bytes"] for row in artifact.outputs)))
        if len(rows) == before and stage in STAGES:
            rows.append(_row(stage, root, "missing", f"run `greatctl {stage}`"))
    return rows if any(row["state"] != "missing" for row in rows) else []


def damage(project: Project) -> tuple[int, list[str]]:
    """Hash everything: (number of artifacts, damaged files with a word why)."""
    folders = [folder for root in (project.data, project.results) for folder in _sealed(root)]
    return len(folders), [line for folder in folders for line in _damage_of(folder)]


def _damage_of(folder: Path) -> list[str]:
    try:
        return [f"{folder}/{name}" for name in load(folder).damaged(deep=True)]
    except GreatctlError as error:
        return [f"{folder}/artifact.json ({error.message})"]


def _row(stage: str, path: Path, state: str, reason: str, size: int = 0) -> dict[str, object]:
    return {"stage": stage, "path": str(path), "state": state, "reason": reason, "bytes": size}


def _roots(project: Project) -> dict[str, Path]:
    """Stage -> the folder below which its artifacts lie, inputs before what is made from them."""
    roots = (project.raw, project.tokens, project.activations, project.saes)
    found = dict(zip(STAGES, (*roots, project.features, project.patches, project.report), strict=True))
    after = {stage: found.pop(stage) for stage in ("interpret", "patch", "report")}
    results = project.results
    return {**found, _COMPANIONS: results / _COMPANIONS, **after, _LABELS: results / _LABELS}


def _sealed(root: Path) -> list[Path]:
    """Folders with an artifact.json, readable or not, without work folders."""
    records = sorted(root.rglob("artifact.json")) if root.is_dir() else []
    return [r.parent for r in records if not any(part.startswith(".") for part in r.relative_to(root).parts)]


def _judge(
    project: Project, local: _LocalPlugins, known: Mapping[str, tuple[str, Path]], stage: str, artifact: Artifact
) -> tuple[str, str]:
    """State and reason of an artifact whose inputs are judged already."""
    if damaged := artifact.damaged():
        return _DAMAGED, damaged[0]
    changed, note = local.judge(_recorded(artifact, "plugins"))
    if changed:
        return _STALE, changed
    try:
        reason = _difference(project, stage, artifact)
    except AccessError as error:  # the model is not at hand: that says nothing about what was made with it
        reason, note = "", f"not compared: {error.message}"
    except GreatctlError as error:
        reason = error.message
    reason = reason or _from_stale(known, artifact)
    return (_STALE, reason) if reason else (_FINE, note)


def _from_stale(known: Mapping[str, tuple[str, Path]], artifact: Artifact) -> str:
    """Which input is gone, stale or damaged, or ""."""
    for name, fingerprint in sorted(_recorded(artifact, "inputs").items()):
        if len(fingerprint) != 64:
            continue  # a folder from elsewhere, which only its own stage can look at
        state, folder = known.get(fingerprint, ("", None))
        if folder is None:
            return f"what it was made from (inputs.{name}) is gone or was made again"
        if state != _FINE:
            return f"made from {folder.name} (inputs.{name}), which is {state}"
    return ""


def _difference(project: Project, stage: str, artifact: Artifact) -> str:
    """The first reason why running the stage again would make something else, or "".

    Raises:
        GreatctlError: the stage can no longer be planned; the message says why.
    """
    if stage in (_COMPANIONS, _LABELS):
        return ""  # they follow their SAE or its features, which are judged as their input
    if stage == "fetch":
        return ""  # a source is compared with its bytes, which only a fetch can see
    module = importlib.import_module(f"greatctl.stages.{stage}")
    recorded: dict = dict(artifact.record.get("given") or {})  # type: ignore[call-overload]
    given = {name: value for name, value in recorded.items() if name in module.Config.model_fields}
    found = resolve(module.Config, stage, flags=given, manifest=project.manifest, environ=os.environ)
    context = Context(project, _as_recorded(artifact), Run(stage), found.origins, offline=True)
    if (words := _without_code(context.plugins, stage, artifact, found.config)) is not None:
        return words
    wanted = _own_plan(module.plan, context, found.config, artifact)
    return "" if wanted == _identity(artifact) else difference(artifact.record, wanted)


def _own_plan(
    plan: Callable[[Context, StageConfig], Plan], context: Context, config: StageConfig, artifact: Artifact
) -> dict[str, object]:
    """The identity that the stage would give this very artifact now: as it is called, or else with its own site and name.

    Raises:
        GreatctlError: it can be planned in neither way.
    """
    if artifact.stage == "train" and getattr(config, "hook_point", None) is None:
        # It took the newest activations, which may be those of another site by now.
        config = config.model_copy(update={"hook_point": artifact.config.get("hook_point")})
    try:
        planned = plan(context, config)
    except GreatctlError:
        planned = None
    own = planned is None or planned.final != artifact.path
    if planned is None or own:
        planned = plan(context, config.model_copy(update=_pins(artifact)))
    assert planned.identity is not None  # every stage but fetch has one, and --text seals nothing
    wanted = planned.identity.record()
    if own and artifact.stage == "train":  # other activations are in use now; its own are judged as an input
        wanted |= {key: _identity(artifact)[key] for key in ("inputs", "model_revision")}
    if artifact.stage == "report" and "sections" in artifact.config:  # making them would run the plugins
        wanted["config"] = {**planned.identity.config, "sections": artifact.config["sections"]}
    return wanted


def _pins(artifact: Artifact) -> dict[str, object]:
    """The settings that make a plan be about this artifact and no other."""
    config, name = artifact.config, artifact.path.name
    pins: dict[str, dict[str, object]] = {
        "harvest": {"hook_point": [config.get("hook_point")], "layer": None},
        "train": {"hook_point": config.get("hook_point"), "name": name},
        "interpret": {"sae": config.get("sae")},
        "patch": {"name": name, "sae": config.get("sae"), **_circuit(artifact)},
    }
    return pins.get(artifact.stage, {})


def _circuit(artifact: Artifact) -> dict[str, object]:
    """What makes a plan of `patch` be about a circuit: its kind, or the file that was tested."""
    said = str(artifact.config.get("circuit", ""))
    if said.startswith("{"):
        return {"circuit_file": artifact.path / "circuit.json"}
    return {"circuit": True, "circuit_kind": said} if said else {}


def _identity(artifact: Artifact) -> dict[str, object]:
    return {key: artifact.record.get(key) for key in ("stage", "config", "inputs", "plugins", "model_revision")}


def _recorded(artifact: Artifact, part: str) -> dict[str, str]:
    value = artifact.record.get(part)
    return {str(k): str(v) for k, v in value.items()} if isinstance(value, Mapping) else {}


def _as_recorded(artifact: Artifact) -> Plugins:
    """The built-ins, and a name with a digest for every plugin item that the artifact was made with."""
    plugins = load_plugins(folder=None, enabled=False)
    for item, digest in _recorded(artifact, "plugins").items():
        kind, _, name = item.partition("/")
        template = Item("", "", "", "recorded", digest=digest)
        plugins.registry.registrar(kind, template)(name, "recorded:Item", replace=True)
    return plugins


def _without_code(plugins: Plugins, stage: str, artifact: Artifact, config: StageConfig) -> str | None:
    """The verdict where a plan would need a plugin's code; None where it needs none."""
    kind, key = _ITEMS.get(stage, ("", ""))
    if not kind:
        return None
    wanted, before = getattr(config, key), artifact.config.get(key)
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    needed = set(names) - set(plugins.registry.names(kind))
    if stage == "train":  # its plan asks the class itself for its settings
        needed |= {name for name in names if f"{kind}/{name}" in _recorded(artifact, "plugins")}
    if not needed:
        return None
    return "" if wanted == before else f"config.{key} {before} -> {wanted}"


@dataclass(frozen=True)
class _Local:
    """A local plugin: the digest and the text of its code."""

    digest: str
    text: str


class _LocalPlugins:
    """The project's plugins and those of `--plugin`, as files."""

    def __init__(self, project: Project, paths: Iterable[str]) -> None:
        folder = [project.root / "plugins"] if (project.root / "sources.toml").is_file() else []
        found = [c for place in folder for c in in_folder(place)] + [c for path in paths for c in from_path(path)]
        self._found = [_Local(code_digest(Path(c.origin)), "".join(_texts(Path(c.origin)))) for c in found]

    def judge(self, recorded: Mapping[str, str]) -> tuple[str, str]:
        """(reason why stale, note) for the plugin items {"kind/name": digest} that something was made with."""
        digests = {plugin.digest for plugin in self._found}
        for item, digest in sorted(recorded.items()):
            name = item.partition("/")[2]
            if digest in digests:
                continue
            if any(f'"{name}"' in plugin.text or f"'{name}'" in plugin.text for plugin in self._found):
                return f"plugins.{item} changed", ""
            if not installed():
                return f"the plugin that gave {item} is gone", ""
            return "", f"made with the plugin item {item}: run its stage to check"
        return "", ""


def _texts(place: Path) -> Iterator[str]:
    for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
        yield path.read_text(encoding="utf-8", errors="replace")
