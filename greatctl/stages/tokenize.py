"""Stage `tokenize`: clean texts become rows of token ids.

    greatctl tokenize --model bundled --window 256
    greatctl tokenize --texts /data/web --worker 1/8      (then, when all eight are done, without --worker)

Reads every sealed source below data/raw (in manifest order), writes data/tokens/<tokenizer>-<window>. Everything that
the manifest knows of a work goes along, so that later stages need neither the texts nor the manifest. Passages that two
works share stay in the earlier one alone, and no character brings more than `max_tokens_per_character` tokens. With
`texts` it reads a folder of text files from elsewhere instead, of any size.

The work is cut into parts, one a source or a file; a killed run goes on with the part it was in, and any number of
workers makes the same bytes. Exports for other programs go into exports/ of the finished folder. They follow from it and
are no part of what it is: another export makes nothing stale, and one that was deleted is no damage.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from ..errors import InputError, ManifestError, UsageError
from ..store.artifact import Artifact, Identity, work
from ..store.files import disk_errors, fsync_dir, make_dir, sweep, write_json
from ..store.lock import hold
from ..store.swap import wanted
from .context import Context, Plan, Result, StageConfig
from .corpora import Corpus, files_in, works_on_disk
from .made import made_already
from .models import chosen_model, slug
from .workers import Share, worker_folder

if TYPE_CHECKING:
    from ..corpus.overlap import Leak
    from ..corpus.parts import Cutter

__all__ = ["Config", "plan", "run"]

STAGE = "tokenize"
_PARTS = "parts"


class Config(StageConfig):
    """Settings of `greatctl tokenize`."""

    model: str | None = Field(None, description="model whose tokenizer is used: hub id, folder or `bundled`")
    window: int = Field(256, ge=8, description="tokens a window, BOS included")
    character: list[str] = Field([], description="only the works of this character (repeatable)")
    overlap: Literal["remove", "keep"] = Field(
        "remove", description="passages of 13 words and more that two works share: remove them from the later one"
    )
    max_tokens_per_character: int = Field(
        400_000, ge=0, description="tokens that one character (or control) may bring, spread over its works; 0 = all"
    )
    texts: str | None = Field(
        None, description="read this folder of text files (a column `text`) instead of the sources"
    )
    worker: str | None = Field(None, description="I/N: make only every Nth part; the plain command then seals")
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

    corpus: Corpus
    n_parts: int
    source: str | Path
    name: str
    digest: str
    plan: Plan
    share: Share | None


def plan(ctx: Context, config: Config) -> Plan:
    """What would be tokenized, with what.

    Raises:
        InputError: no source is on disk yet, or the folder of texts holds none.
        ManifestError: the window is longer than the model's context.
        UsageError: `texts` and `character` together, or a worker that cannot be.
        AccessError: the tokenizer is gated or not cached.
    """
    return _prepare(ctx, config).plan


def run(ctx: Context, config: Config) -> Result:
    """Tokenize, or say that nothing changed."""
    job = _prepare(ctx, config)
    final, identity = job.plan.target
    if artifact := made_already(ctx, "tokenize", final, identity):
        return Result(STAGE, artifact.path, {**artifact.summary, **_exported(config, job, artifact)}, up_to_date=True)
    started = time.monotonic()
    if job.share:
        return _work_along(ctx, config, job, job.share, final, identity)
    with work(final, identity, origins=ctx.origins, fresh=ctx.force) as w:
        shutil.rmtree(w.path / "exports", ignore_errors=True)  # of a damaged artifact that is being mended
        parts = w.path / _PARTS
        if taken := _adopt(final, identity, parts):
            ctx.run.notice(f"tokenize: {taken} parts come from workers")
        leaks = _leaks(config, job)
        facts = _make_parts(ctx, config, job, leaks, parts, range(job.n_parts))
        summary = {**_merged(config, job, w.path, parts), **_left_out(ctx, w.path, leaks)}
        write_json(w.path / "tokenizer.json", facts)
        seconds = round(time.monotonic() - started, 3)
        artifact = w.seal(summary, discard=(_PARTS,), seconds=seconds)
    return Result(STAGE, artifact.path, {**summary, **_exported(config, job, artifact)})


def _work_along(ctx: Context, config: Config, job: _Job, share: Share, final: Path, identity: Identity) -> Result:
    """Make the parts of one worker and leave them for the plain command, which seals."""
    mine = [number for number in range(job.n_parts) if share.has(number)]
    with worker_folder(final, identity, share, fresh=ctx.force) as folder:
        _make_parts(ctx, config, job, _leaks(config, job), folder, mine)
    command = "greatctl tokenize --force" if ctx.force else "greatctl tokenize"
    ctx.run.notice(f"tokenize: this worker is done; when all are, run `{command}` with the same options to seal")
    summary = {
        "n_windows": None,
        "n_tokens": None,
        "window": config.window,
        "tokenizer": slug(job.name),
        "worker": config.worker,
        "parts": len(mine),
    }
    return Result(STAGE, None, summary)


def _make_parts(
    ctx: Context, config: Config, job: _Job, leaks: Sequence[Leak], folder: Path, numbers: Sequence[int]
) -> dict[str, object]:
    """Make those of the parts `numbers` that are not there; returns the facts of the tokenizer."""
    from ..corpus import parts
    from ..model import tokenizer as tok
    from ..model.encoder import Encoder

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
    cutter = parts.Cutter(Encoder(tokenizer), config.window, int(facts["bos_id"]), int(facts["pad_id"]))
    sweep(folder)
    missing = [number for number in numbers if not parts.done(folder, number)]
    if missing:
        _tokenize(ctx, job, leaks, cutter, folder, numbers, missing)
    return facts


def _leaks(config: Config, job: _Job) -> list[Leak]:
    return job.corpus.leaks() if config.overlap == "remove" else []


def _tokenize(
    ctx: Context,
    job: _Job,
    leaks: Sequence[Leak],
    cutter: Cutter,
    folder: Path,
    numbers: Sequence[int],
    missing: list[int],
) -> None:
    from ..corpus import parts

    sizes = job.corpus.sizes()
    total, left = sum(sizes[n] for n in numbers), sum(sizes[n] for n in missing)
    done = already = total - left

    def said(characters: int) -> None:
        nonlocal done
        done = min(total, done + characters)  # a character is about a byte; packed files hold more of them
        ctx.run.progress("tokenizing", done, total, "bytes", already=already)
        ctx.run.stop_here()

    parts.tokenize(folder, job.corpus.parts(missing, leaks), cutter, said)
    ctx.run.progress("tokenizing", total, total, "bytes", already=already)


def _merged(config: Config, job: _Job, folder: Path, parts: Path) -> dict[str, object]:
    """Write the windows and documents; returns the summary's counts.

    Raises:
        InputError: there is no text at all.
    """
    from ..corpus.balance import within_cap
    from ..corpus.merge import merge

    cap = config.max_tokens_per_character
    choose = partial(within_cap, cap=cap) if cap and not config.texts else None
    counts = merge(folder, parts, job.n_parts, config.window, choose)
    if not counts["n_windows"]:
        raise InputError(
            "there is no text to tokenize",
            why="every text is empty",
            fix="run `greatctl fetch --force`, or look at --texts",
        )
    return {**counts, "window": config.window, "tokenizer": slug(job.name)}


def _left_out(ctx: Context, folder: Path, leaks: Sequence[Leak]) -> dict[str, object]:
    """Write overlaps.parquet, and say what was left out and why."""
    from ..corpus.overlap import table
    from ..store.tables import read_rows, write_table

    write_table(folder / "overlaps.parquet", table(leaks))
    removed = sum(end - start for leak in leaks for start, end in leak.spans)
    if removed:
        worst = max(leaks, key=lambda leak: sum(end - start for start, end in leak.spans))
        ctx.run.notice(
            f"tokenize: {removed:,} characters that a later work repeats were left out, most in {worst.loser} "
            f"(of {worst.keeper})"
        )
    rows = read_rows(folder / "documents.parquet", ["unit", "n_tokens", "tokens_capped"])
    capped = sorted({row["unit"] for row in rows if row["tokens_capped"]})
    if capped:
        left = sum(row["tokens_capped"] for row in rows)
        ctx.run.notice(
            f"tokenize: {', '.join(capped)}: cut down to the same number of tokens; {left:,} tokens were left out"
        )
    return {
        "overlap_chars_removed": removed,
        "tokens_capped": sum(row["tokens_capped"] for row in rows),
        "capped": capped,
    }


def _adopt(final: Path, identity: Identity, parts: Path) -> int:
    """Move in the parts that workers of the same identity left; returns how many.

    Raises:
        LockedError: a worker is still running.
    """
    taken = 0
    for folder in sorted(final.parent.glob(f".{final.name}.worker-*-of-*")):
        if not folder.is_dir():
            continue
        with hold(folder), disk_errors(folder):
            if wanted(folder) == identity.fingerprint:
                make_dir(parts)
                for path in sorted(folder.glob("part-*.windows.arrow")) + sorted(folder.glob("part-*.documents.arrow")):
                    path.replace(parts / path.name)
                    taken += path.name.endswith(".documents.arrow")
                fsync_dir(parts)
            shutil.rmtree(folder)
    return taken


def _exported(config: Config, job: _Job, artifact: Artifact) -> dict[str, object]:
    """Write what `export` asks for; {"export": paths}, or nothing where nothing was asked for.

    Everything is made in a hidden folder beside its place, and moved in when it is whole.
    """
    if not config.export:
        return {}
    from ..corpus.exports import export
    from ..corpus.windows import TokenStore

    target = artifact.path / "exports"
    aside = target / ".partial"
    names = {id: f"{stem}_chunks_{config.window}" for id, stem in job.corpus.stems().items()}
    paths = []
    with hold(artifact.path), disk_errors(target):
        shutil.rmtree(aside, ignore_errors=True)  # what a killed run left
        for made in export(TokenStore(artifact.path), aside, config.export, names):
            paths.append(target / made.name)
            if paths[-1].is_dir():
                shutil.rmtree(paths[-1])
            made.replace(paths[-1])
        aside.rmdir()
    return {"export": [str(path) for path in paths]}


def _prepare(ctx: Context, config: Config) -> _Job:
    share = Share.parse(config.worker)
    if config.texts and config.character:
        raise UsageError("--texts and --character exclude each other", why="both say what is read", fix="drop one")
    corpus: Corpus = files_in(config.texts) if config.texts else works_on_disk(ctx, config.character)
    source, name, digest, revision = _tokenizer(ctx, config)
    shape: dict[str, object] = {"tokenizer": digest, "name": slug(name), "window": config.window}
    if not config.texts:
        shape |= {"overlap": config.overlap, "max_tokens_per_character": config.max_tokens_per_character}
    identity = Identity(STAGE, {**shape, **corpus.identity}, inputs=corpus.inputs, model_revision=revision)
    folder = "-".join(filter(None, (slug(name), str(config.window), corpus.label)))
    sizes = corpus.sizes()
    facts = {"model": name, "parts": len(sizes), "text_bytes": sum(sizes), "window": config.window}
    made = Plan(STAGE, ctx.project.tokens / folder, identity, facts)
    return _Job(corpus, len(sizes), source, name, digest, made, share)


def _tokenizer(ctx: Context, config: Config) -> tuple[str | Path, str, str, str]:
    """(source, name, digest, revision) of the model whose tokenizer is used; its context must hold a window."""
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
    return source, name, tok.digest(source, offline=ctx.offline), located.revision
