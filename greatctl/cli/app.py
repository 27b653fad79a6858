"""The Typer application: root options, commands, and the one place where an error becomes an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from .. import __version__
from ..errors import BugError, GreatctlError
from .help import Group
from .options import Root

__all__ = ["app", "run"]

_given: list[Root] = []  # the root options of this call, for the crash file

app = typer.Typer(
    name="greatctl",
    cls=Group,
    help="Reads great and ordinary lives with a frozen language model and asks which sparse-autoencoder latents carry "
    "ambition, composure, greatness; every claim is printed beside the baseline that could explain it away.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"greatctl {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    ctx: typer.Context,
    project: Annotated[
        Path | None, typer.Option("--project", "-C", metavar="DIR", help="Folder with sources.toml (default: here).")
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", metavar="DIR", help="Where texts and activations live (GREATCTL_DATA_DIR)."),
    ] = None,
    results_dir: Annotated[
        Path | None,
        typer.Option("--results-dir", metavar="DIR", help="Where results live (GREATCTL_RESULTS_DIR)."),
    ] = None,
    plugin: Annotated[
        list[str] | None, typer.Option("--plugin", metavar="PATH", help="Load a plugin file or folder (repeatable).")
    ] = None,
    no_plugins: Annotated[bool, typer.Option("--no-plugins", help="Load built-ins only.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Make no connection at all.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Root options; each command finds them in its context."""
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub client is imported
    ctx.obj = Root(project, data_dir, results_dir, tuple(plugin or ()), no_plugins, offline, debug)
    _given.append(ctx.obj)


def _register() -> None:
    from . import commands

    commands.register(app)


def run() -> NoReturn:
    """Parse, run, and exit with the documented code; with `--json` there is always exactly one document on stdout."""
    as_json, debug = "--json" in sys.argv[1:], "--debug" in sys.argv[1:]
    if sys.stdout is None:  # the caller closed it
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    _register()
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        code = _closed_pipe()
    except (Exception, KeyboardInterrupt) as problem:
        try:
            code = _report(problem, as_json=as_json, debug=debug)
        except BrokenPipeError:
            code = _closed_pipe()
    raise SystemExit(code if isinstance(code, int) else 0)


def _report(problem: BaseException, *, as_json: bool, debug: bool) -> int:
    from .output import print_error

    error = _as_error(problem)
    if debug:
        traceback.print_exception(problem)
    print_error(error, as_json=as_json)
    return error.exit_code


def _as_error(problem: BaseException) -> GreatctlError:
    if isinstance(problem, GreatctlError):
        return problem
    if isinstance(problem, KeyboardInterrupt | typer.Abort):
        from ..errors import InterruptedRun

        return InterruptedRun(2)
    if isinstance(problem, typer.TyperException):
        from .usage import explained

        return explained(problem)
    if isinstance(problem, MemoryError) or type(problem).__name__ == "OutOfMemoryError":  # the latter is torch's
        from ..errors import ResourceError

        return ResourceError(
            "out of memory", why=str(problem), fix="use a smaller --batch-size, or a machine with more memory"
        )
    if isinstance(problem, OSError) and (known := _disk_error(problem)):
        return known
    return BugError(
        f"greatctl met something it did not expect: {type(problem).__name__}: {problem}",
        why="this is a fault of greatctl, not of your input",
        fix=f"the details are in {_crash_file(problem)}; run again with --debug to see them",
    )


def _disk_error(problem: OSError) -> GreatctlError | None:
    """A full or unwritable disk, met outside the places that expect one."""
    from ..store.files import disk_errors

    try:
        with disk_errors(Path(str(problem.filename or ".")).absolute()):
            raise problem
    except GreatctlError as error:
        return error
    except OSError:
        return None


def _crash_file(problem: BaseException) -> Path | str:
    """Keep the traceback (no values of variables, so no secrets) beside the results; returns where."""
    root = _given[-1] if _given else Root()
    named = root.results_dir or os.environ.get("GREATCTL_RESULTS_DIR")
    folder = (Path(named) if named else (root.project or Path()) / "results") / "logs"
    path = folder / f"crash-{os.getpid()}.txt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(traceback.format_exception(problem)))
    except OSError as error:
        return f"no file ({error})"
    return path


def _closed_pipe() -> int:
    """The reader went away: say nothing more, also not at interpreter exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 141
