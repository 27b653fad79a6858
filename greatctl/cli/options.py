"""Options that many commands share, declared once.

A stage's command file declares only its own options; `stage_command` adds the common ones and hands everything the
person actually gave to `session.run_stage`. What was not given stays None, so that settings.py can look further
(environment, sources.toml, default) and say where each value came from.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from typer.models import OptionInfo

from .completion import completer
from .help import Command

__all__ = ["COMMON", "Common", "JsonFlag", "QuietFlag", "Root", "completed", "epilog", "stage_command"]

_PANEL = "Common options"


def _common(*flags: str, help: str) -> Any:
    return typer.Option(*flags, help=help, rich_help_panel=_PANEL)


JsonFlag = Annotated[bool, _common("--json", help="Print exactly one JSON document on stdout.")]
QuietFlag = Annotated[bool, _common("--quiet", "-q", help="No progress and no notices on stderr.")]
_DryRun = Annotated[bool, _common("--dry-run", "-n", help="Show what would be done, and each setting's origin.")]
_Force = Annotated[bool, _common("--force", "-f", help="Do it again from nothing, even if up to date.")]
_Seed = Annotated[int | None, _common("--seed", help="Seed of every random choice of this stage.")]
_Device = Annotated[str | None, _common("--device", help="cpu, cuda, cuda:1, mps or auto.")]

COMMON: dict[str, tuple[Any, Any]] = {
    "as_json": (JsonFlag, False),
    "quiet": (QuietFlag, False),
    "dry_run": (_DryRun, False),
    "force": (_Force, False),
    "seed": (_Seed, None),
    "device": (_Device, None),
}


@dataclass(frozen=True)
class Root:
    """The root options, as given."""

    project: Path | None = None
    data_dir: Path | None = None
    results_dir: Path | None = None
    plugins: tuple[str, ...] = ()
    no_plugins: bool = False
    offline: bool = False
    debug: bool = False


@dataclass(frozen=True)
class Common:
    """The common options of a stage command, as given."""

    as_json: bool = False
    quiet: bool = False
    dry_run: bool = False
    force: bool = False
    seed: int | None = None
    device: str | None = None


def epilog(examples: Sequence[str]) -> str:
    """Examples as the last block of a help page, which `help.Command` prints."""
    return "\n".join(examples)


def completed(command: str, parameter: inspect.Parameter) -> inspect.Parameter:
    """A parameter whose option is completed with live values, where there are any; its declaration stays as it is."""
    complete = completer(command, parameter.name)
    for info in get_args(parameter.annotation):
        if complete is not None and isinstance(info, OptionInfo) and info.autocompletion is None:
            own = copy.copy(info)
            own.autocompletion = complete
            return parameter.replace(annotation=Annotated[get_args(parameter.annotation)[0], own])
    return parameter


def stage_command(
    app: typer.Typer, stage: str, examples: Sequence[str], *, panel: str = "The seven stages, in order"
) -> Callable[[Callable], Callable]:
    """Register a function that declares a stage's own options as the command of that stage."""

    def decorate(declaration: Callable) -> Callable:
        own = list(inspect.signature(declaration, eval_str=True).parameters.values())
        unset = {p.name: p.default for p in own}

        def command(ctx: typer.Context, **values: Any) -> None:
            from .session import run_stage

            common = Common(**{name: values.pop(name) for name in COMMON})
            flags = {
                k: v for k, v in values.items() if v is not None and v != [] and not (v is False and unset[k] is False)
            }
            run_stage(ctx.obj or Root(), stage, flags, common)

        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [
            inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context),
            *(completed(stage, p.replace(kind=keyword)) for p in own),
            *(
                completed(stage, inspect.Parameter(name, keyword, default=default, annotation=annotation))
                for name, (annotation, default) in COMMON.items()
            ),
        ]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        command.__doc__ = declaration.__doc__
        app.command(stage, cls=Command, epilog=epilog(examples), rich_help_panel=panel)(command)
        return declaration

    return decorate
