"""Stage `report`: what is sealed so far, on one page that opens without a network.

    greatctl report --open

Reads the newest features with the autoencoder that they are of, every other autoencoder, every patching run and what
all of it was made from, and writes results/report: index.html, and the same as data (report.json) and as text
(report.md). Parts that are not made yet are named as missing rather than left out.
"""

from __future__ import annotations

import webbrowser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from ..errors import GreatctlError, InputError, ManifestError
from ..report.collect import Parts, view
from ..store.artifact import Artifact, Identity, load, newest, sealed_under, work
from ..store.files import canonical_json, sha256_bytes, write_bytes, write_text
from .context import Context, Plan, Project, Result, StageConfig
from .controls import controls_of
from .labels import labels_of
from .made import made_already

__all__ = ["Config", "plan", "run"]

STAGE = "report"
LAYOUT = 14  # raised when the page changes, so that an old report is remade
_FILES = {"html": "index.html", "md": "report.md", "json": "report.json"}


class Config(StageConfig):
    """Settings of `greatctl report`."""

    open_browser: bool = Field(False, description="open the page in the browser")
    output: Path | None = Field(
        None, description="also write a copy of the page here (of the text or the data with --format)"
    )
    format: Literal["html", "md", "json"] = Field(
        "html", description="what the path, --output and --open mean: the page, the same as text, or as data"
    )
    latents: int = Field(24, ge=1, le=200, description="latents that get a page of their own")


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
    final, identity = p.target
    artifact = made_already(ctx, STAGE, final, identity)
    up_to_date = artifact is not None
    if artifact is None:
        artifact = _write(ctx, config, final, identity, sections)
    page = _page(final, config)
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
    from ..report.markdown import markdown
    from ..report.page import render
    from ..report.values import dumps

    made = view(_checked(ctx), plugin_sections=sections, root=ctx.project.root, latents=config.latents, rules=_rules())
    page = render(made)
    with work(final, identity, origins=ctx.origins, fresh=True) as w:
        write_text(w.path / "index.html", page)
        write_text(w.path / "report.md", markdown(made))
        write_text(w.path / "report.json", dumps(made.to_json()))
        return w.seal({"bytes": len(page.encode())})


def _page(final: Path, config: Config) -> Path:
    return final / _FILES[config.format]


def _output(config: Config) -> Path | None:
    """Where the copy goes; from the current folder where it is relative."""
    return config.output.expanduser().absolute() if config.output else None


def _rules() -> str:
    """The written rules of the verdicts: the docstring of `greatctl.features.judge`."""
    from ..features import judge

    return judge.__doc__ or ""


def _parts(ctx: Context) -> dict[str, Artifact]:
    """Every artifact that the page tells of, by a name that is stable."""
    project = ctx.project
    saes = sealed_under(project.saes, "train")
    features = newest(project.features, "interpret")
    made_from = str(_inputs(features).get("sae")) if features else ""
    sae = next((a for a in saes if a.fingerprint == made_from), saes[-1] if saes else None)
    found = {
        "tokens": newest(project.tokens, "tokenize"),
        "activations": newest(project.activations, "harvest"),
        "sae": sae,
        "features": features,
        "controls": controls_of(project, sae) if sae else None,
        "labels": labels_of(project, features) if features else None,
    }
    found |= {f"sae/{a.path.name}": a for a in saes if a is not sae}
    found |= {f"patch/{a.path.name}": a for a in sealed_under(project.patches, "patch")}
    parts = {name: artifact for name, artifact in sorted(found.items()) if artifact}
    return parts | _origins(project, parts)


def _origins(project: Project, parts: Mapping[str, Artifact]) -> dict[str, Artifact]:
    """What the autoencoder and the features were made from, where the newest of its stage is another."""
    wanted = {str(v) for name in ("sae", "features") if name in parts for v in _inputs(parts[name]).values()}
    wanted -= {artifact.fingerprint for artifact in parts.values()}
    if not wanted:
        return {}
    stages = ((project.tokens, "tokenize"), (project.activations, "harvest"))
    older = [artifact for root, stage in stages for artifact in sealed_under(root, stage)]
    return {f"from/{a.stage}/{a.fingerprint}": a for a in older if a.fingerprint in wanted}


def _inputs(artifact: Artifact) -> Mapping[str, object]:
    inputs = artifact.record.get("inputs")
    return inputs if isinstance(inputs, Mapping) else {}


def _checked(ctx: Context) -> Parts:
    """The parts, intact, with those of the features' own making where they are at hand."""
    parts = {name: artifact.check() for name, artifact in _parts(ctx).items()}
    others = {name: a for name, a in parts.items() if name.startswith("from/")}
    read = {a.stage: a for a in others.values()}
    tokens = read.get("tokenize") or parts.get("tokens")
    kept = [parts[name] for name in ("tokens", "activations") if name in parts]
    return Parts(
        tokens=tokens,
        activations=read.get("harvest") or parts.get("activations"),
        sae=parts.get("sae"),
        controls=parts.get("controls"),
        features=parts.get("features"),
        labels=parts.get("labels"),
        saes=[a for name, a in parts.items() if name == "sae" or name.startswith("sae/")],
        patches={name.removeprefix("patch/"): a for name, a in parts.items() if name.startswith("patch/")},
        sources=_sources(ctx.project, tokens),
        others=[*kept, *others.values()],
    )


def _sources(project: Project, tokens: Artifact | None) -> dict[str, Artifact]:
    """What `fetch` kept of each text that was read, as long as it is what was read."""
    found = {}
    for name, fingerprint in sorted(_inputs(tokens).items()) if tokens else ():
        try:
            source = load(project.raw / name)
        except GreatctlError:
            continue
        if source.fingerprint == fingerprint:
            found[name] = source
    return found
