"""From words on the command line to a running stage.

Opens the project (manifest, folders, plugins), resolves the settings, runs the stage with a display and with signal
handlers that let it stop at a safe point, and prints the result. Imported only once a command really runs.
"""

from __future__ import annotations

import importlib
import os
import re
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import ManifestError, UsageError
from ..events import Event, Run, StopRequest
from .next_step import next_step
from .options import Common, Root
from .output import document, print_document, print_result, stderr, stdout
from .progress import Display
from .text import literal

if TYPE_CHECKING:
    from ..extend.manager import Plugins
    from ..stages.context import Context, Plan, Project, Result, StageConfig

__all__ = ["open_plugins", "open_project", "prepare", "run_stage", "running", "show"]

_DEVICE = re.compile(r"auto|(cpu|cuda|mps)(:\d+)?")


def open_project(root: Root, *, quiet: bool = False) -> Project:
    """The project at `-C DIR` (default: here), with the packaged manifest where there is none."""
    from .. import manifest as manifests
    from ..settings import project_paths
    from ..stages.context import Project

    folder = (root.project or Path()).absolute()
    if not folder.is_dir():
        raise ManifestError(
            f"{folder} is not a folder",
            why="--project/-C names the folder that holds sources.toml",
            fix=f"greatctl -C {folder.parent}" if folder.exists() else f"greatctl -C {folder} init  makes one",
            where=str(folder),
        )
    path = folder / "sources.toml"
    if not path.exists():
        path = manifests.packaged_path()
        if not quiet:
            stderr().print(
                literal("no sources.toml here: using the packaged one (`greatctl init` writes a copy)", "dim")
            )
    manifest = manifests.load(path)
    data, results, _ = project_paths(folder, manifest, root.data_dir, root.results_dir, os.environ)
    return Project(folder, manifest, data, results)


def open_plugins(root: Root, project: Project | None, *, quiet: bool = False) -> Plugins:
    """Built-ins, installed plugins, `plugins/` of the project, and each `--plugin`; failures become notices."""
    from ..extend.manager import load_plugins

    def notice(text: str) -> None:
        if not quiet:
            stderr().print(literal(text, "yellow"))

    folder = project.root if project else None
    plugins = load_plugins(folder=folder, paths=root.plugins, enabled=not root.no_plugins, notice=notice)
    for loaded in plugins.report:
        if loaded.error:
            notice(f"plugin {loaded.name} was not loaded: {loaded.error}")
    return plugins


def prepare(
    root: Root, stage: str, flags: Mapping[str, Any], common: Common, project: Project, plugins: Plugins, run: Run
) -> tuple[Any, Context, StageConfig]:
    """The stage's module, its context and its typed settings."""
    from ..settings import resolve, resolve_device
    from ..stages.context import Context

    module = importlib.import_module(f"greatctl.stages.{stage}")
    given = dict(flags)
    if common.seed is not None and "seed" in module.Config.model_fields:
        given["seed"] = common.seed
    resolved = resolve(module.Config, stage, flags=given, manifest=project.manifest, environ=os.environ)
    device, origin = resolve_device(stage, flag=common.device, manifest=project.manifest, environ=os.environ)
    if not _DEVICE.fullmatch(device):
        raise UsageError(
            f"unknown device {device!r}", why=f"given by: {origin}", fix="use auto, cpu, cuda, cuda:1 or mps"
        )
    context = Context(project, plugins, run, resolved.origins, common.force, root.offline, device)
    return module, context, resolved.config


def run_stage(root: Root, stage: str, flags: Mapping[str, Any], common: Common) -> None:
    """Run one stage (or show its plan) and print the result; exits with the stage's code."""
    project = open_project(root, quiet=common.quiet)
    plugins = open_plugins(root, project, quiet=common.quiet)
    with running(stage, plugins, quiet=common.quiet) as run:
        module, context, config = prepare(root, stage, flags, common, project, plugins, run)
        if common.dry_run:
            _show_plan(module.plan(context, config), config, context, as_json=common.as_json)
            return
        result = module.run(context, config)
    show(result, as_json=common.as_json, hint="" if common.quiet else next_step(result, root, flags))
    raise typer.Exit(result.exit_code)


@contextmanager
def running(stage: str, plugins: Plugins, *, quiet: bool) -> Iterator[Run]:
    """A `Run` whose events are shown and passed to observers, and that SIGINT, SIGTERM and SIGHUP ask to stop."""
    stop = StopRequest()
    with Display(quiet=quiet) as display:

        def emit(event: Event) -> None:
            display(event)
            plugins.observe(event)

        def on_signal(number: int, frame: object) -> None:
            if stop.signal_number is not None:
                os._exit(128 + number)  # asked twice: everything under a final name is whole at any instant
            stop.request(number)
            display(Event("notice", stage, "stopping at the next safe point (once more to stop at once)"))

        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        heard = [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]  # nohup keeps its word
        before = {number: signal.signal(number, on_signal) for number in heard}
        try:
            yield Run(stage, emit, stop)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def show(result: Result, *, as_json: bool, hint: str = "") -> None:
    """Print a result: one JSON document, or the stage's view for people with a command that could come next."""
    if as_json:
        print_document(document(result.stage, result.artifact, result.summary))
        return
    from .views import render

    print_result(render(result))
    if hint:
        stdout().print(literal("next  ", "dim").append_text(literal(hint)), soft_wrap=True)


def _show_plan(plan: Plan, config: StageConfig, context: Context, *, as_json: bool) -> None:
    values = config.model_dump(mode="json")
    settings = {name: {"value": values[name], "origin": origin} for name, origin in context.origins.items()}
    if as_json:
        summary = {"plan": dict(plan.facts), "settings": settings}
        print_document(document(plan.stage, plan.final, summary, dry_run=True))
        return
    from .views.plan import render_plan

    print_result(render_plan(plan, settings))
