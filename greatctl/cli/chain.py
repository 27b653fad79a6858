"""Several stages in a row: `run` (from the manifest) and `demo` (the bundled project)."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

from ..errors import UsageError, did_you_mean
from ..events import Run
from ..manifest import Manifest
from ..stages.context import STAGES, Result
from .options import Common, Root
from .output import stderr
from .session import open_plugins, open_project, prepare, running
from .text import literal

__all__ = ["run_chain", "run_demo"]


def run_chain(
    root: Root,
    start: str,
    end: str,
    flags: Mapping[str, Mapping[str, object]],
    common: Common,
    *,
    implied: Mapping[str, Mapping[str, object]] | None = None,
) -> list[Result]:
    """Run the stages from `start` to `end`; a failure ends the chain, missing sources (11) do not.

    Args:
        implied: settings of a stage that hold unless a flag, the environment or the manifest says otherwise.
    """
    for name in (start, end):
        if name not in STAGES:
            raise UsageError(f"'{name}' is not a stage", fix=did_you_mean(name, STAGES))
    first, last = STAGES.index(start), STAGES.index(end)
    if first > last:
        raise UsageError(f"{start} comes after {end}", fix=f"greatctl run --from {end} --to {start}")
    project = open_project(root, quiet=common.quiet)
    plugins = open_plugins(root, project, quiet=common.quiet)
    results = []
    with running("run", plugins, quiet=common.quiet) as run:
        for stage in STAGES[first : last + 1]:
            run.stop_here()
            voice = Run(stage, run.emit, run.stop)
            given = {**_unless_said(stage, (implied or {}).get(stage, {}), project.manifest), **flags.get(stage, {})}
            module, context, config = prepare(root, stage, given, common, project, plugins, voice)
            began = time.perf_counter()
            results.append(module.run(context, config))
            if not results[-1].up_to_date:
                voice.notice(f"{stage}: done in {time.perf_counter() - began:,.0f} s")
    return results


def _unless_said(stage: str, implied: Mapping[str, object], manifest: Manifest) -> dict[str, object]:
    """Those of the implied settings that neither the environment nor the manifest sets."""
    table = manifest.tables.get(stage, {})
    return {k: v for k, v in implied.items() if k not in table and not os.environ.get(f"GREATCTL_{stage}_{k}".upper())}


def run_demo(root: Root, folder: Path, common: Common) -> dict[str, object]:
    """Make the demonstration project in `folder`, import its texts, run the chain, and say what came out."""
    from ..stages.demo import findings, make_project

    began = time.perf_counter()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file", why="the demo makes a folder", fix=f"greatctl demo {folder}-demo")
    imports = make_project(folder.absolute())
    inside = Root(folder, root.data_dir, root.results_dir, root.plugins, root.no_plugins, True, root.debug)
    if not common.quiet:
        stderr().print(literal(f"the demonstration project is {folder}; everything runs offline", "dim"))
    _import_texts(inside, imports, common)
    results = run_chain(inside, "fetch", "report", {}, common)
    summaries = {r.stage: r.summary for r in results}
    made = {r.stage: r.artifact for r in results}
    features, patches = made["interpret"], made["patch"]
    assert features is not None and patches is not None  # both stages always seal a folder
    return {
        "project": str(folder.absolute()),
        "report": str(summaries["report"]["path"]),
        "findings": findings(summaries, features, patches),
        "seconds": round(time.perf_counter() - began, 1),
    }


def _import_texts(root: Root, imports: list[tuple[str, Path]], common: Common) -> None:
    """Bring each bundled text in as a person would: `fetch --import FILE --source ID`."""
    project = open_project(root, quiet=True)
    plugins = open_plugins(root, project, quiet=common.quiet)
    with running("fetch", plugins, quiet=common.quiet) as run:
        for done, (source, path) in enumerate(imports):
            run.progress("importing the sketches", done, len(imports), "texts")
            run.stop_here()
            silent = Run("fetch", stop=run.stop)
            flags = {"import_file": path, "source": [source]}
            module, context, config = prepare(root, "fetch", flags, common, project, plugins, silent)
            module.run(context, config)
