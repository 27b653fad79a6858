"""Stage `report`: what is sealed so far, on one page that opens without a network.

    greatctl report --open

Reads the newest artifact of each stage (and every patching run) and writes results/report: index.html, and report.json
with the same as data. Parts that are not made yet are named as missing rather than left out.
"""

from __future__ import annotations

import json
import webbrowser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from ..errors import InputError, ManifestError
from ..report import collect
from ..report.view import View
from ..store.artifact import Artifact, Identity, current, newest, sealed_under, touch, work
from ..store.files import canonical_json, sha256_bytes, write_bytes, write_text
from .context import Context, Plan, Result, StageConfig
from .controls import controls_of

__all__ = ["Config", "plan", "run"]

STAGE = "report"
LAYOUT = 9  # raised when the page changes, so that an old report is remade


class Config(StageConfig):
    """Settings of `greatctl report`."""

    open_browser: bool = Field(False, description="open the page in the browser")
    output: Path | None = Field(None, description="also write a copy of the page here (of the data with --format json)")
    format: Literal["html", "json"] = Field(
        "html", description="which of the two the path, --output and --open mean: the page, or the same as data"
    )
    latents: int = Field(24, ge=1, le=400, description="latents shown as cards")


def plan(ctx: Context, config: Config) -> Plan:
    """What would be written, from which artifacts.

    Raises:
        InputError: no stage has made anything yet.
        ManifestError: `output` is a folder.
    """
    return _prepare(ctx, config)[0]


def run(ctx: Context, config: Config) -> Result:
    """Write the page, or say that nothing changed."""
    p, sections = _prepare(ctx, config)
    assert p.final is not None and p.identity is not None
    artifact, reason = current(p.final, p.identity)
    up_to_date = artifact is not None and not ctx.force
    if artifact and up_to_date:
        touch(artifact)
        ctx.run.notice("report: up to date")
    else:
        ctx.run.notice(f"report: {reason or 'forced'}")
        artifact = _write(ctx, config, p.final, p.identity, sections)
    page = _page(p.final, config)
    data = page.read_bytes()
    shown = _output(config) or page
    if shown != page:
        write_bytes(shown, data)
    if config.open_browser:
        webbrowser.open(page.as_uri())
    return Result(STAGE, artifact.path, {"path": str(shown), "bytes": len(data)}, up_to_date=up_to_date)


def _prepare(ctx: Context, config: Config) -> tuple[Plan, Sequence[Mapping]]:
    """The plan, and the sections that plugins give: they are made once, since a plugin may take its time."""
    parts = _parts(ctx)
    if not parts:
        raise InputError(
            "there is nothing to report yet",
            why=f"no finished artifact lies under {ctx.project.data} or {ctx.project.results}",
            fix="run `greatctl fetch` and the stages after it, or `greatctl demo`",
        )
    output = _output(config)
    if output and output.is_dir():
        raise ManifestError(
            f"{output} is a folder",
            why="--output names the file to write",
            fix=f"use --output {output / _page(ctx.project.report, config).name}",
            where=str(output),
        )
    inputs = {name: artifact.fingerprint for name, artifact in parts.items()}
    sections = ctx.plugins.report_sections(ctx.project.results)
    config_of: dict[str, object] = {"latents": config.latents, "layout": LAYOUT}
    if sections:
        config_of["sections"] = sha256_bytes(canonical_json(sections).encode())
    final = ctx.project.report
    facts = {"artifacts": len(parts), "path": str(output or _page(final, config))}
    return Plan(STAGE, final, Identity(STAGE, config_of, inputs), facts), sections


def _write(ctx: Context, config: Config, final: Path, identity: Identity, sections: Sequence[Mapping]) -> Artifact:
    from ..report.page import render

    view = _view(ctx, config, sections)
    page = render(view)
    data = json.dumps(view.to_json(), ensure_ascii=False, allow_nan=False, indent=1) + "\n"
    with work(final, identity, origins=ctx.origins, fresh=True) as w:
        write_text(w.path / "index.html", page)
        write_text(w.path / "report.json", data)
        return w.seal({"bytes": len(page.encode())})


def _page(final: Path, config: Config) -> Path:
    return final / ("report.json" if config.format == "json" else "index.html")


def _output(config: Config) -> Path | None:
    """Where the copy goes; from the current folder where it is relative."""
    return config.output.expanduser().absolute() if config.output else None


def _view(ctx: Context, config: Config, sections: Sequence[Mapping]) -> View:
    parts = {name: artifact.check() for name, artifact in _parts(ctx).items()}
    patches = {name: a for name, a in parts.items() if name.startswith("patch/")}
    return collect.view(
        tokens=parts.get("tokens"),
        activations=parts.get("activations"),
        sae=parts.get("sae"),
        controls=parts.get("controls"),
        features=parts.get("features"),
        patches=patches,
        plugin_sections=sections,
        root=ctx.project.root,
        latents=config.latents,
        rules=_rules(),
    )


def _rules() -> str:
    """The written rules of the verdicts: the docstring of `greatctl.features.judge`."""
    from ..features import judge

    return judge.__doc__ or ""


def _parts(ctx: Context) -> Mapping[str, Artifact]:
    project = ctx.project
    places = {
        "tokens": (project.tokens, "tokenize"),
        "activations": (project.activations, "harvest"),
        "sae": (project.saes, "train"),
        "features": (project.features, "interpret"),
    }
    found = {name: newest(root, stage) for name, (root, stage) in places.items()}
    if trained := found["sae"]:
        found["controls"] = controls_of(project, trained)
    patches = {f"patch/{a.path.name}": a for a in sealed_under(project.patches, "patch")}
    return {name: a for name, a in {**found, **dict(sorted(patches.items()))}.items() if a is not None}
