"""fetch: every work of the manifest into a sealed folder of its own, `data/raw/<id>/`.

A night alone is the case to build for: one failing source never stops the others, an interrupted download
goes on where it stopped, what is intact is not asked for again, and a file that changed at its source
replaces nothing until a person says `--update`. Ends with 11 when something is missing (manual sources
included). Where nothing at all was obtained, the run ends as its first failure does: 7 for the network, 8 for a
plugin, 6 for bytes that are not the work.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from ..corpus import raw, size
from ..corpus.library import DOWNLOADS, ON_DISK, Library, Row
from ..corpus.reading import locate
from ..errors import (
    GreatctlError,
    InputError,
    IntegrityError,
    InterruptedRun,
    LockedError,
    ManifestError,
    NetworkError,
    PluginError,
    ResourceError,
    UsageError,
)
from ..events import Run
from ..extend.contracts import Source
from ..manifest import Entry
from ..store.addresses import mirror_base
from ..store.http import Client
from ..store.lock import hold
from ..urls import url_problem
from . import survey
from .context import Context, Plan, Result, StageConfig

__all__ = ["Config", "plan", "run"]

_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
_STOPS = (InterruptedRun, LockedError, ManifestError, ResourceError)
"""What ends the whole run; anything else ends one source."""


class Config(StageConfig):
    """Settings of `fetch`."""

    character: list[str] = Field([], description="Fetch this character's works (repeatable).")
    control: list[str] = Field([], description="Fetch this control (repeatable).")
    source: list[str] = Field([], description="Fetch this one work (repeatable).")
    mirror: str | None = Field(None, description="Take the bytes from this base URL: it replaces scheme and host.")
    import_file: Path | None = Field(None, description="Bring FILE in as the text of the one --source given.")
    origin: str = Field("", max_length=2000, description="Where the imported file was got, in words.")
    rights: str = Field("", max_length=2000, description="Under which rights the imported file may be used.")
    audit: bool = Field(False, description="Account for every byte of what is on disk; download nothing.")
    estimate: bool = Field(False, description="Only say how large text, tokens and activations are; download nothing.")
    update: bool = Field(
        False, description="Ask the hosts again, and take what changed there (--force only reports it)."
    )
    pace: float | None = Field(
        None,
        ge=0,
        le=3600,
        description="Seconds between two requests to one host [2; 0 for a loopback mirror].",
    )
    contact: str = Field(
        "",
        max_length=200,
        pattern=r"^[\x20-\x7e]*$",
        description="Mail address or URL by which a host can reach you.",
    )
    timeout: float = Field(30.0, gt=0, le=3600, description="Seconds without a byte before an attempt has failed.")
    deadline: float = Field(900.0, gt=0, le=86400, description="Seconds for one file, retries and waits included.")
    attempts: int = Field(4, ge=1, le=20, description="Failures in a row before a file is given up.")
    d_model: int | None = Field(
        None, ge=1, le=1_000_000, description="Width of the model, for the size of its activations [the model's]."
    )


def plan(ctx: Context, config: Config) -> Plan:
    """What would be fetched: one row an entry with address, expected bytes and state on disk.

    Raises:
        UsageError: an unknown id, a mirror that is no address, --import without exactly one --source.
        InputError: the file to import is not there.
        ManifestError: an address that its source kind may not contact, or a mirror that only a person may
            name.
    """
    entries = _selected(ctx, config)
    _check_mirror(ctx, config)
    rows = []
    for entry in entries:
        source, plugins = _maybe_source(ctx, entry)
        there = raw.originals(ctx.project.raw / entry.id, entry) is not None
        rows.append(
            {
                "id": entry.id,
                "kind": entry.kind,
                "url": _address(entry, source, plugins) if source and source.hosts else entry.url,
                "bytes": size.file_bytes(entry),
                "state": "on disk" if there else "missing" if source is None or source.hosts else "by hand",
            }
        )
    missing = [r for r in rows if r["state"] == "missing"]
    facts = {
        "sources": rows,
        "on_disk": sum(r["state"] == "on disk" for r in rows),
        "by_hand": sum(r["state"] == "by hand" for r in rows),
        "missing": len(missing),
        "bytes": sum(r["bytes"] or 0 for r in missing),
    }
    return Plan("fetch", ctx.project.raw, None, facts)


def run(ctx: Context, config: Config) -> Result:
    """Fetch what is selected; see the module's docstring for how it ends.

    Raises:
        NetworkError: nothing at all could be obtained, because of the network.
        PluginError: nothing at all could be obtained, because of a plugin.
        LockedError: another fetch works on the same data folder.
    """
    planned = plan(ctx, config)
    entries = _selected(ctx, config)
    if config.estimate:
        return _estimate(ctx, config, entries)
    if config.audit:
        return _audit(ctx, config, entries)
    _tell_beforehand(ctx, config, downloads=bool(planned.facts["missing"] or config.update))
    with hold(ctx.project.raw), _client(ctx, config) as client:
        library = Library(
            ctx.project.raw,
            raw.Ledger(ctx.project.root / raw.LEDGER),
            client,
            ctx.run,
            ctx.project.manifest.entries,
            again=ctx.force or config.update,
            update=config.update,
            noted={"mirror": config.mirror, "settings": dict(ctx.origins)},
        )
        rows, errors = _collect(ctx, config, entries, library)
        _tidy(ctx.project.raw / DOWNLOADS)
    return _finish(ctx, config, rows, errors)


def _collect(
    ctx: Context, config: Config, entries: Sequence[Entry], library: Library
) -> tuple[list[Row], list[GreatctlError]]:
    """One row an entry; a failure ends its own entry alone."""
    rows: list[Row] = []
    errors: list[GreatctlError] = []
    for entry in entries:
        ctx.run.progress("sources", len(rows), len(entries), "sources")
        try:
            source, plugins = _source(ctx, entry)
            if config.import_file is not None:
                row = library.bring_in(entry, source, plugins, config.import_file.expanduser(), _told(config))
            else:
                row = library.obtain(entry, source, plugins)
        except _STOPS:
            raise
        except GreatctlError as error:
            if config.import_file is not None:
                raise
            errors.append(error)
            kept = raw.originals(library.folder / entry.id, entry)
            row = Row.failed(entry, kept.files if kept else None, error)
        rows.append(row)
        if row.status not in ("up-to-date", "manual"):
            ctx.run.notice(f"{entry.id}: {row.status}" + (f" ({row.why})" if row.why else ""))
        ctx.run.stop_here()
    ctx.run.progress("sources", len(rows), len(entries), "sources")
    return rows, errors


def _finish(ctx: Context, config: Config, rows: Sequence[Row], errors: Sequence[GreatctlError]) -> Result:
    """Summary and exit code; raises where nothing was obtained and one cause explains it."""
    if all(row.status in ("failed", "manual") for row in rows):
        _raise_cause(errors)
    here = [row for row in rows if row.bytes is not None]
    texts = [raw.text_bytes(ctx.project.raw / row.id) or 0 for row in here]
    summary = _summary(_width(ctx, config)[0], [row.to_json() for row in rows], texts)
    complete = all(row.status in ON_DISK or (row.status == "changed" and row.bytes) for row in rows)
    by_hand = [row.id for row in rows if row.status == "manual"]
    if by_hand:
        ctx.run.notice(f"to be brought by hand ({len(by_hand)}): {', '.join(by_hand)}")
    return Result(
        "fetch",
        ctx.project.raw if ctx.project.raw.is_dir() else None,
        summary,
        up_to_date=all(row.status == "up-to-date" for row in rows),
        exit_code=0 if complete else 11,
    )


def _raise_cause(errors: Sequence[GreatctlError]) -> None:
    """Where nothing was obtained, the network (or a plugin, or else wrong bytes) is what the run failed of."""
    for cause in (NetworkError, PluginError, IntegrityError):
        for first in errors:
            if isinstance(first, cause):
                message = f"nothing could be fetched: {first.message}"
                raise cause(message, why=first.why, fix=first.fix, where=first.where, code=first.name)


def _tell_beforehand(ctx: Context, config: Config, *, downloads: bool) -> None:
    """What a person should know before hosts are asked, or of what they bring."""
    if config.import_file is not None:
        unsaid = [flag for flag, value in (("--origin", config.origin), ("--rights", config.rights)) if not value]
        if unsaid:
            ctx.run.notice(f"not said: {' and '.join(unsaid)}; the record will not tell where the text is from")
        return
    if not downloads or ctx.offline:
        return
    if not (config.contact or config.mirror):
        ctx.run.notice('no contact is set; hosts like to know whom to write to: [fetch] contact = "you@example.org"')
    proxy = next((name for name in _PROXIES if os.environ.get(name)), None)
    if proxy and not config.mirror:
        ctx.run.notice(f"{proxy} is set and not used: fetch connects by itself, to addresses that it checked")


def _told(config: Config) -> dict[str, str]:
    """What a person said of the file that they import."""
    return {name: value for name, value in (("origin", config.origin), ("rights", config.rights)) if value}


def _estimate(ctx: Context, config: Config, entries: Sequence[Entry]) -> Result:
    """Sizes from the manifest's facts and from what is on disk; nothing is contacted."""
    d_model, model = _width(ctx, config)
    rows, totals = survey.estimate(ctx, entries, d_model, lambda entry: _maybe_source(ctx, entry))
    summary = _summary(d_model, rows, [row["text_bytes"] for row in rows])
    ctx.run.notice(size.one_line(summary["text_bytes"], summary["tokens_estimate"], d_model))
    return Result("fetch", None, {**summary, "totals": totals, "model": model, "d_model": d_model})


def _audit(ctx: Context, config: Config, entries: Sequence[Entry]) -> Result:
    """Every byte of what is on disk accounted for; 11 where a work is missing or its text is not what its original gives."""
    states, rows = survey.audit(ctx, entries, lambda entry: _maybe_source(ctx, entry))
    summary = _summary(_width(ctx, config)[0], [row.to_json() for row in states], [row["kept"] for row in rows])
    complete = all(state.status == "up-to-date" for state in states)
    return Result("fetch", None, {**summary, "audit": rows}, exit_code=0 if complete else 11)


def _width(ctx: Context, config: Config) -> tuple[int, str]:
    """(d_model, name) of the model whose activations are counted."""
    if config.d_model is not None:
        return config.d_model, f"a model of width {config.d_model}"
    return survey.model_width(ctx)


def _summary(d_model: int, rows: Sequence[Mapping[str, Any]], texts: Sequence[int]) -> dict[str, Any]:
    tokens = size.tokens_of(texts)
    return {
        "sources": list(rows),
        "text_bytes": sum(texts),
        "tokens_estimate": tokens,
        "activation_bytes_per_layer": size.activation_bytes(tokens, d_model),
    }


def _selected(ctx: Context, config: Config) -> list[Entry]:
    if config.import_file is None:
        return ctx.project.manifest.select(characters=config.character, controls=config.control, sources=config.source)
    if len(config.source) != 1 or config.character or config.control or config.estimate or config.audit:
        raise UsageError(
            "--import brings in one work",
            why="it needs exactly one --source and no other selection",
            fix="greatctl fetch --import FILE --source ID",
        )
    path = config.import_file.expanduser()
    if not path.is_file():
        raise InputError(f"{path} is not a file", why="--import copies this file in", fix="give the path of the file")
    return [ctx.project.manifest.entry(config.source[0])]


def _check_mirror(ctx: Context, config: Config) -> None:
    """A manifest may come from a stranger: only a flag or the environment may name a private or plain-http
    mirror.
    """
    if config.mirror is None:
        return
    mirror_base(config.mirror)
    problem = url_problem(config.mirror) or ("" if config.mirror.startswith("https://") else "it is not https")
    if problem and _from_file(ctx):
        raise ManifestError(
            f"[fetch] mirror = {config.mirror!r} is not allowed in sources.toml",
            why=problem,
            fix=f"give it on the command line: --mirror {config.mirror}",
            where=_mirror_origin(ctx),
        )


def _mirror_origin(ctx: Context) -> str:
    """Where the mirror's name came from, in words."""
    noted = ctx.origins.get("mirror", "")
    return str(noted.get("origin", "") if isinstance(noted, Mapping) else noted)


def _from_file(ctx: Context) -> bool:
    return "sources.toml" in _mirror_origin(ctx)


def _client(ctx: Context, config: Config) -> Client:
    return Client(
        contact=config.contact,
        mirror=config.mirror,
        mirror_trusted=not _from_file(ctx),
        offline=ctx.offline,
        pace=config.pace,
        timeout=config.timeout,
        deadline=config.deadline,
        attempts=config.attempts,
        sleep=_patient(ctx.run),
    )


def _patient(run: Run) -> Callable[[float], None]:
    """A sleep that a stop request ends within half a second."""

    def sleep(seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            run.stop_here()
            time.sleep(min(left, 0.5))

    return sleep


def _source(ctx: Context, entry: Entry) -> tuple[Source, dict[str, str]]:
    """The source of an entry's kind, and its plugin's digest where it comes from one."""
    registry = ctx.plugins.registry
    kind: Callable[[], Source] = registry.get("sources", entry.kind)
    digest = registry.digest("sources", entry.kind)
    return kind(), {f"sources/{entry.kind}": digest} if digest else {}


def _maybe_source(ctx: Context, entry: Entry) -> tuple[Source | None, dict[str, str]]:
    try:
        return _source(ctx, entry)
    except (UsageError, PluginError):
        return None, {}  # `run` says so in the entry's row


class _Later(Exception):
    """A source wanted the network while it was only being planned."""


def _address(entry: Entry, source: Source, plugins: Mapping[str, str]) -> str | None:
    """Where the bytes would come from, if the source knows without asking."""

    def refuse(url: str) -> bytes:
        raise _Later

    try:
        return locate(entry, source, plugins, refuse)[0].url
    except (_Later, PluginError):
        return entry.url


def _tidy(folder: Path) -> None:
    """Remove the downloads folder, and those in it, where nothing is waiting."""
    inner = list(folder.iterdir()) if folder.is_dir() else []
    for path in [*inner, folder]:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
