"""Stage `tokenize`: clean texts become rows of token ids.

    greatctl tokenize --model bundled --window 256

Reads every sealed source below data/raw (in manifest order), writes data/tokens/<tokenizer>-<window>. Where a
window began and ended in the text is kept, and everything that the manifest knows of a work goes along, so
that later stages need neither the texts nor the manifest.

Exports for other programs go into exports/ of the finished folder. They follow from it and are no part of what it is:
another export makes nothing stale, and one that was deleted is no damage.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from ..errors import InputError, ManifestError
from ..store.artifact import Artifact, Identity, current, load, touch, work
from ..store.files import canonical_json, disk_errors, sha256_bytes
from ..store.lock import hold
from .context import Context, Plan, Result, StageConfig
from .models import chosen_model, slug

if TYPE_CHECKING:
    from ..manifest import Entry

__all__ = ["Config", "plan", "run"]

STAGE = "tokenize"
_FACTS = ("character", "author", "role", "era", "genre", "topic", "translated", "split", "year", "unit")


class Config(StageConfig):
    """Settings of `greatctl tokenize`."""

    model: str | None = Field(None, description="model whose tokenizer is used: hub id, folder or `bundled`")
    window: int = Field(256, ge=8, description="tokens a window, BOS included")
    character: list[str] = Field([], description="only the works of this character (repeatable)")
    export: list[str] = Field([], description="also write the windows as pt, datasets or parquet (repeatable)")

    @field_validator("export", mode="before")
    @classmethod
    def _known_forms(cls, value: object) -> object:
        forms = [value] if isinstance(value, str) else value or []
        for form in forms if isinstance(forms, list | tuple) else []:
            if form not in ("pt", "datasets", "parquet"):
                raise ValueError(f"{form!r} is none of pt, datasets, parquet")
        return forms


@dataclass(frozen=True)
class _Job:
    """What `plan` found out and `run` needs."""

    sources: list[tuple[Entry, Artifact]]
    source: str | Path
    name: str
    digest: str
    plan: Plan


def plan(ctx: Context, config: Config) -> Plan:
    """What would be tokenized, with what.

    Raises:
        InputError: no source is on disk yet.
        ManifestError: the window is longer than the model's context.
        AccessError: the tokenizer is gated or not cached.
    """
    return _prepare(ctx, config).plan


def run(ctx: Context, config: Config) -> Result:
    """Tokenize, or say that nothing changed."""
    job = _prepare(ctx, config)
    final, identity = job.plan.final, job.plan.identity
    assert final is not None and identity is not None
    artifact, reason = current(final, identity)
    if artifact and not ctx.force:
        touch(artifact)
        ctx.run.notice("tokenize: up to date")
        return Result(STAGE, artifact.path, {**artifact.summary, **_exported(config, job, artifact)}, up_to_date=True)
    ctx.run.notice(f"tokenize: {reason or 'forced'}")
    from ..corpus import windows
    from ..model import tokenizer as tok

    started = time.monotonic()
    tokenizer = tok.load_tokenizer(job.source, offline=ctx.offline)
    facts = {
        "name": slug(job.name),
        "path_or_id": job.name,
        "bos_id": tok.bos_id(tokenizer),
        "pad_id": tok.pad_id(tokenizer),
        "special_ids": tok.special_ids(tokenizer),
        "vocab_size": len(tokenizer),
        "sha256": job.digest,
    }
    total = len(job.sources)

    def said(done: int) -> None:
        ctx.run.progress("cutting windows", done, total, "documents")
        ctx.run.stop_here()

    with work(final, identity, origins=ctx.origins, fresh=ctx.force) as w:
        shutil.rmtree(w.path / "exports", ignore_errors=True)  # of a damaged artifact that is being mended
        counts = windows.build(
            w.path,
            [_row(entry) for entry, _ in job.sources],
            ((source.path / "text.txt").read_text(encoding="utf-8") for _, source in job.sources),
            lambda texts: tok.encode_batch(tokenizer, texts),
            window=config.window,
            tokenizer=facts,
            on_document=said,
        )
        if not counts["n_windows"]:
            raise InputError(
                "the sources hold no text", why="every text.txt is empty", fix="run `greatctl fetch --force`"
            )
        summary = {**counts, "window": config.window, "tokenizer": slug(job.name), "documents": total}
        artifact = w.seal(summary, seconds=round(time.monotonic() - started, 3))
    return Result(STAGE, artifact.path, {**summary, **_exported(config, job, artifact)})


def _exported(config: Config, job: _Job, artifact: Artifact) -> dict[str, object]:
    """Write what `export` asks for; {"export": paths}, or nothing where nothing was asked for.

    Everything is made in a hidden folder beside its place, and moved in when it is whole.
    """
    if not config.export:
        return {}
    from ..corpus import windows

    target = artifact.path / "exports"
    aside = target / ".partial"
    names = {e.id: f"{_stem(e)}_chunks_{config.window}" for e, _ in job.sources}
    paths = []
    with hold(artifact.path), disk_errors(target):
        shutil.rmtree(aside, ignore_errors=True)  # what a killed run left
        for made in windows.export(windows.TokenStore(artifact.path), aside, config.export, names):
            paths.append(target / made.name)
            if paths[-1].is_dir():
                shutil.rmtree(paths[-1])
            made.replace(paths[-1])
        aside.rmdir()
    return {"export": [str(path) for path in paths]}


def _prepare(ctx: Context, config: Config) -> _Job:
    sources = _sources(ctx, config.character)
    source, name = chosen_model(ctx, config.model)
    from .. import model
    from ..model import loading
    from ..model import tokenizer as tok

    located = loading.locate(source, offline=ctx.offline)
    if (located.folder / "config.json").is_file():
        info = model.describe(source, name=name, offline=ctx.offline)
        if config.window > info.n_ctx:
            raise ManifestError(
                f"window {config.window} is longer than the context of {name}",
                why=f"the model reads at most {info.n_ctx} tokens ({ctx.origins.get('window', 'default')})",
                fix=f"use --window {info.n_ctx} or less",
            )
    digest = tok.digest(source, offline=ctx.offline)
    identity = Identity(
        STAGE,
        {
            "tokenizer": digest,
            "name": slug(name),
            "window": config.window,
            "character": sorted(config.character),
            "documents": {e.id: sha256_bytes(canonical_json(_row(e)).encode())[:16] for e, _ in sources},
        },
        inputs={e.id: a.fingerprint for e, a in sources},
        model_revision=located.revision,
    )
    final = ctx.project.tokens / _folder(slug(name), config)
    size = sum(int(row["bytes"]) for _, a in sources for row in a.outputs if row["path"] == "text.txt")
    facts = {"model": name, "documents": len(sources), "text_bytes": size, "window": config.window}
    return _Job(sources, source, name, digest, Plan(STAGE, final, identity, facts))


def _sources(ctx: Context, characters: Sequence[str]) -> list[tuple[Entry, Artifact]]:
    """Manifest entries that are on disk, in manifest order, each checked against its hashes."""
    manifest = ctx.project.manifest
    entries = manifest.select(characters=tuple(characters)) if characters else manifest.entries
    found = []
    for entry in entries:
        folder = ctx.project.raw / entry.id
        if (folder / "artifact.json").exists():
            found.append((entry, load(folder).check()))
    if not found:
        what = f" of {', '.join(characters)}" if characters else ""
        flags = "".join(f" --character {c}" for c in characters)
        raise InputError(
            f"no text{what} is on disk",
            why=f"{ctx.project.raw} holds no finished source{what}",
            fix=f"run `greatctl fetch{flags}` first",
        )
    return found


def _row(entry: Entry) -> dict[str, object]:
    """The document's row: what the manifest knows of it (a control has no character)."""
    return {"source_id": entry.id, "work": entry.title, **{key: getattr(entry, key) for key in _FACTS}}


def _folder(name: str, config: Config) -> str:
    if not config.character:
        return f"{name}-{config.window}"
    subset = "-".join(sorted(config.character))
    if len(subset) > 60:
        subset = sha256_bytes(subset.encode())[:12]
    return f"{name}-{config.window}-{subset}"


def _stem(entry: Entry) -> str:
    return f"gutenberg_{entry.pg}" if entry.pg else entry.id.replace("-", "_")
