"""What the corpus amounts to, asked without fetching anything: how large it is, and what cleaning made of it.

`estimate` counts what the manifest lists, what lies on disk and what is missing, down to the activations of one layer
of the model that is configured. `audit` takes every work on disk from its original bytes again and accounts for them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..corpus import raw, size
from ..corpus.audit import audit as audited
from ..corpus.library import Row
from ..corpus.reading import read
from ..errors import GreatctlError
from ..extend.contracts import Source
from ..manifest import Entry
from .context import Context
from .models import chosen_model

__all__ = ["audit", "estimate", "model_width"]

LLAMA_3_8B = 4096
"""Width of the model that the manifest names by default."""

_WIDTHS = ("hidden_size", "n_embd", "d_model")
Find = Callable[[Entry], tuple[Source | None, dict[str, str]]]


def model_width(ctx: Context) -> tuple[int, str]:
    """(d_model, the model's name) of the configured model, from its config.json where that is on this machine."""
    try:
        source, name = chosen_model(ctx, None)
    except GreatctlError:
        return LLAMA_3_8B, ctx.project.manifest.model_name
    path = source / "config.json" if isinstance(source, Path) else _cached(source)
    try:
        config = json.loads(path.read_bytes()) if path else {}
        config = config.get("text_config") or config
        width = next((config[key] for key in _WIDTHS if isinstance(config.get(key), int)), LLAMA_3_8B)
    except (OSError, ValueError, AttributeError):
        width = LLAMA_3_8B
    return width, name


def estimate(ctx: Context, entries: Sequence[Entry], d_model: int, find: Find) -> tuple[list[dict], dict[str, Any]]:
    """One row an entry and the totals (`manifest`, `on_disk`, `missing`), from the manifest's facts and the disk.

    Sizes are bytes; tokens are those of Llama 3, at its measured rate of bytes a token; activations are 16-bit.
    """
    rows: list[dict[str, Any]] = []
    for entry in entries:
        text, measured = size.text_size(entry, ctx.project.raw / entry.id)
        source, _ = find(entry)
        by_hand = source is not None and not source.hosts
        rows.append(
            {
                "id": entry.id,
                "character": entry.character,
                "role": entry.role,
                "status": "up-to-date" if measured else "manual" if by_hand else None,
                "state": "on-disk" if measured else "missing",
                "bytes": size.file_bytes(entry),
                "sha256": None,
                "text_bytes": text,
            }
        )
    on_disk = [row["text_bytes"] for row in rows if row["state"] == "on-disk"]
    missing = [row["text_bytes"] for row in rows if row["state"] == "missing"]
    totals = {"manifest": on_disk + missing, "on_disk": on_disk, "missing": missing}
    return rows, {name: _total(texts, d_model) for name, texts in totals.items()}


def audit(ctx: Context, entries: Sequence[Entry], find: Find) -> tuple[list[Row], list[dict[str, Any]]]:
    """The state of every entry, and one accounting of each that is on disk.

    A work whose original cannot be read again is `failed`, with the reason; so is one whose text.txt is not what the
    present rules make of it.
    """
    states: list[Row] = []
    rows: list[dict[str, Any]] = []
    for done, entry in enumerate(entries):
        ctx.run.progress("audit", done, len(entries), "sources")
        ctx.run.stop_here()
        held = raw.originals(ctx.project.raw / entry.id, entry)
        source, plugins = find(entry)
        if held is None or source is None:
            states.append(
                Row.manual(entry) if source and not source.hosts else Row.of(entry, "failed", None, "not on disk")
            )
            continue
        try:
            document = read(entry, source, held.files, plugins, brought=held.imported)
        except GreatctlError as error:
            states.append(Row.failed(entry, held.files, error))
            continue
        states.append(Row.of(entry, *_judged(ctx.project.raw / entry.id, document.text, held.files)))
        row = audited(b"".join(held.files.values()), document.text, document.removed)
        rows.append({"id": entry.id, "character": entry.character, "role": entry.role, **_plain(row)})
    ctx.run.progress("audit", len(entries), len(entries), "sources")
    return states, rows


def _judged(folder: Path, text: str, files: Mapping[str, bytes]) -> tuple[str, Mapping[str, bytes], str | None]:
    """Status, files and reason of a work that was read again."""
    kept = folder / "text.txt"
    if not kept.is_file():
        return "failed", files, "its text.txt is gone; run `greatctl fetch` again"
    if kept.read_bytes() == text.encode("utf-8"):
        return "up-to-date", files, None
    return "failed", files, "its text is not what the present rules make of it; run `greatctl fetch` again"


def _plain(row: Any) -> dict[str, Any]:
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in vars(row).items()}


def _total(texts: Sequence[int], d_model: int) -> dict[str, int]:
    tokens = size.tokens_of(texts)
    return {
        "sources": len(texts),
        "text_bytes": sum(texts),
        "tokens": tokens,
        "activation_bytes_per_layer": size.activation_bytes(tokens, d_model),
    }


def _cached(repo: str) -> Path | None:
    """config.json of a model of the hub, if it was downloaded before; nothing is asked."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, "config.json")
    return Path(found) if isinstance(found, str) else None
