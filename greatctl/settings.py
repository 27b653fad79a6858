"""Where a setting's value comes from: flag, then environment, then sources.toml, then the default.

Each value keeps its origin, since "why is k 64?" is asked more often than anyone admits. Types and bounds are
those of the stage's own schema; this file knows no setting by name, except the two that every stage shares.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Generic, NoReturn, TypeVar, Union, cast, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from .errors import BugError, GreatctlError, ManifestError, UsageError, did_you_mean
from .manifest import Manifest, because
from .toml_positions import shown

__all__ = ["SHARED", "Resolved", "project_paths", "resolve", "resolve_device"]

SHARED = ("seed", "device")
"""Settings that `GREATCTL_SEED` and `GREATCTL_DEVICE` give to every stage at once."""

_OUT_OF_RANGE = (
    "greater_",
    "less_",
    "multiple_of",
    "finite",
    "too_",
    "string_too",
    "value_error",
    "assertion",
)
_Schema = TypeVar("_Schema", bound=BaseModel)


class Origins(dict[str, str]):
    """Setting -> origin. `given` holds the values (JSON) of the settings that came as flags, which no file remembers."""

    def __init__(self, origins: Mapping[str, str], values: Mapping[str, object]) -> None:
        super().__init__(origins)
        self.given = {k: values[k] for k, origin in origins.items() if origin.startswith("flag")}


@dataclass(frozen=True)
class Resolved(Generic[_Schema]):
    """A stage's settings and the origin of each field.

    Origins read `flag --k`, `env GREATCTL_TRAIN_K`, `sources.toml [train]` or `default`.
    """

    config: _Schema
    origins: Origins


def resolve(
    schema: type[_Schema],
    stage: str,
    *,
    flags: Mapping[str, object],
    manifest: Manifest,
    environ: Mapping[str, str],
) -> Resolved[_Schema]:
    """The settings of one stage.

    Args:
        schema: the stage's `Config`; field names are the long flags with `_`.
        flags: what the person gave; None counts as not given.

    Raises:
        UsageError: a value of the wrong type or an unknown choice in a flag or the environment.
        ManifestError: a value out of range wherever it came from, or anything wrong in the stage's table.
    """
    table = manifest.tables.get(stage, {})
    _known_keys(schema, stage, table, manifest)
    if strangers := set(flags) - set(schema.model_fields):
        raise BugError(f"{stage} has no setting {min(strangers)!r}", why="a flag was passed that has no field")
    values: dict[str, object] = {}
    origins: dict[str, str] = {}
    for name, field in schema.model_fields.items():
        origins[name] = "default"
        variable = _variable(stage, name, environ)
        if flags.get(name) is not None:
            values[name], origins[name] = flags[name], "flag --" + name.replace("_", "-")
        elif variable:
            values[name], origins[name] = _from_environment(field, environ[variable]), f"env {variable}"
        elif name in table:
            origins[name] = f"sources.toml [{stage}]"
            values[name] = _from_file(field, table[name], stage, name, manifest)
    try:
        config = schema(**values)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False)[0], stage, values, origins, manifest) from None
    return Resolved(config, Origins(origins, config.model_dump(mode="json")))


def resolve_device(stage: str, *, flag: str | None, manifest: Manifest, environ: Mapping[str, str]) -> tuple[str, str]:
    """The device and its origin: `--device`, the environment, `device` in the stage's table, else `auto`."""
    if flag:
        return flag, "flag --device"
    if variable := _variable(stage, "device", environ):
        return environ[variable], f"env {variable}"
    value = manifest.tables.get(stage, {}).get("device")
    if value is None:
        return "auto", "default"
    if not isinstance(value, str):
        _bad_value("device", value, "it must be a string", manifest.where(stage, "device"), stage)
    return value, f"sources.toml [{stage}]"


def project_paths(
    root: Path,
    manifest: Manifest,
    data_dir: Path | None,
    results_dir: Path | None,
    environ: Mapping[str, str],
) -> tuple[Path, Path, dict[str, str]]:
    """Absolute folders for data and results, with the origin of each under `data_dir` and `results_dir`.

    Flags and environment are relative to the current folder, `[project]` to `root`, where the manifest is
    (the packaged one stands for a manifest there), and the defaults are `data` and `results` in `root`.
    """
    root = Path(root).expanduser().absolute()
    project = manifest.tables.get("project", {})
    found: list[Path] = []
    origins: dict[str, str] = {}
    for key, flag in (("data_dir", data_dir), ("results_dir", results_dir)):
        variable = f"GREATCTL_{key.upper()}"
        if flag is not None:
            path, origins[key] = Path(flag), "flag --" + key.replace("_", "-")
        elif environ.get(variable):
            path, origins[key] = Path(environ[variable]), f"env {variable}"
        elif key in project:
            path, origins[key] = root / Path(project[key]).expanduser(), "sources.toml [project]"
        else:
            path, origins[key] = root / key.removesuffix("_dir"), "default"
        found.append(path.expanduser().absolute())
    return found[0], found[1], origins


def _variable(stage: str, name: str, environ: Mapping[str, str]) -> str | None:
    """The environment variable that sets this field, if one does; an empty one counts as not set."""
    names = [f"GREATCTL_{stage}_{name}".upper().replace("-", "_")]
    if name in SHARED:
        names.append(f"GREATCTL_{name}".upper())
    return next((n for n in names if environ.get(n, "").strip()), None)


def _known_keys(schema: type[BaseModel], stage: str, table: Mapping[str, object], manifest: Manifest) -> None:
    known = {*schema.model_fields, "device"}
    for key in table:
        if key not in known:
            raise ManifestError(
                f"unknown setting '{shown(key)}' in [{stage}]",
                why=f"the stage {stage} has no such setting",
                fix=did_you_mean(key.replace("-", "_"), known),
                where=manifest.where(stage, key),
            )


def _from_environment(field: FieldInfo, text: str) -> object:
    """Text as it stands; a list is separated by commas."""
    if _is_list(field.annotation):
        return [part.strip() for part in text.split(",") if part.strip()]
    return text.strip()


def _from_file(field: FieldInfo, value: object, stage: str, name: str, manifest: Manifest) -> object:
    """A value of the file, of exactly the type that the setting has; relative paths start at the manifest."""
    try:
        TypeAdapter(cast(Any, field.annotation)).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        why, fix = _reason(error.errors(include_url=False)[0], value)
        _bad_value(name, value, why, manifest.where(stage, name), stage, fix)
    base = manifest.path.absolute().parent
    if isinstance(value, str) and (_has(field.annotation, Path) or _is_beside(value, base)):
        return str(base / Path(value).expanduser())
    return value


def _is_beside(value: str, base: Path) -> bool:
    """Whether a word that may be a path or a name (a model, an SAE, pairs) is a path that starts at `base`.

    A plain word stays a name, whatever lies there; `texts/mine` and `mine.toml` are paths where there is such a thing.
    """
    if value.startswith(("./", "../")):
        return True
    place = os.path.join(base, value)  # os.path: asking about a text that can be no path at all is no error
    return os.path.exists(place) if "/" in value else "." in value and os.path.isfile(place)


def _bad_value(name: str, value: object, why: str, where: str, stage: str, fix: str = "") -> NoReturn:
    message = f"{name} = {shown(repr(value))} in sources.toml [{stage}]"
    raise ManifestError(message, why=why, fix=fix or f"mend {name}", where=where)


def _refusal(
    problem: ErrorDetails,
    stage: str,
    values: Mapping[str, object],
    origins: Mapping[str, str],
    manifest: Manifest,
) -> GreatctlError:
    """The error for a value that the schema refuses, told with the value, the bound and the origin."""
    if not problem["loc"]:
        given = ", ".join(f"{k} = {shown(values[k], 40)} ({o})" for k, o in origins.items() if k in values)
        message = f"the settings of {stage} do not fit together"
        return ManifestError(message, why=because(problem["msg"]), fix=f"given: {given}" if given else "")
    name = str(problem["loc"][0])
    origin, value = origins.get(name, "default"), values.get(name)
    why, fix = _reason(problem, value)
    if problem["type"] == "missing":
        flag = "--" + name.replace("_", "-")
        return UsageError(f"{stage} needs {flag}", why="it has no default", fix=f"give {flag}")
    message = f"{name} = {shown(repr(value))} is not possible ({origin})"
    where = manifest.where(stage, name) if origin.startswith("sources.toml") else None
    if where or problem["type"].startswith(_OUT_OF_RANGE):
        return ManifestError(message, why=why, fix=fix or f"change {origin}", where=where)
    return UsageError(message, why=why, fix=fix or f"change {origin}")


def _reason(problem: ErrorDetails, value: object) -> tuple[str, str]:
    """Why a value is refused and, for a choice, the nearest one."""
    if problem["type"] in ("literal_error", "enum"):
        expected = str(problem.get("ctx", {}).get("expected", ""))
        choices = [c.strip().strip("'") for part in expected.split(" or ") for c in part.split(",")]
        return because(problem["msg"]), did_you_mean(str(value), choices)
    return because(problem["msg"]), ""


def _is_list(annotation: object) -> bool:
    return any(_has(annotation, kind) for kind in (list, tuple, set, frozenset, Sequence))


def _has(annotation: Any, kind: type) -> bool:
    """Whether a type, or a member of a union, is `kind`."""
    if get_origin(annotation) in (Union, UnionType):
        return any(_has(part, kind) for part in get_args(annotation))
    return annotation is kind or get_origin(annotation) is kind
