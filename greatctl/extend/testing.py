"""Conformance checks: what a plugin's author runs in pytest before anyone else runs the plugin.

    from greatctl.extend.testing import check_architecture, check_metric, check_source, sample_entry

    def test_metric():
        check_metric(ReciprocalRank)

Each check raises AssertionError with a plain sentence, the first thing that is off. They run in seconds on a
CPU and need no network; greatctl's built-ins and shipped plugins pass them. torch is imported inside the
checks that need it.
"""

from __future__ import annotations

import contextlib
import random
import re
import socket
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..entries import Entry
from ..errors import GreatctlError, IntegrityError, PluginError
from ..events import Event
from . import contracts
from .registry import check_contract
from .sections import check_sections

__all__ = [
    "check_architecture",
    "check_metric",
    "check_observer",
    "check_sections_hook",
    "check_source",
    "no_network",
    "sample_entry",
]

_PAGE = b"<!DOCTYPE html><html><head><title>One moment</title></head><body><p>A robot?</p></body></html>"


def sample_entry(kind: str, url: str | None = None, **fields: Any) -> Entry:
    """A manifest entry to test a source with. `fields` are its keys; `extra={…}` is its `options` table."""
    given = {"id": "sample", "role": "control", "title": "A Sample", "author": "Nobody", **fields}
    address = {} if url is None else {"url": url}
    return Entry.model_validate({"kind": kind, **address, **given})


@contextmanager
def no_network() -> Iterator[None]:
    """Within it, opening a socket or asking for an address is an AssertionError."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("it reaches for the network; the host downloads, `read` works on bytes alone")

    with contextlib.ExitStack() as stack:
        calls = ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo"))
        for owner, name in calls:
            original = getattr(owner, name)
            stack.callback(setattr, owner, name, original)
            setattr(owner, name, refuse)
        yield


def check_source(
    source: type[Any], entry: Entry, files: Mapping[str, bytes], *, records: Mapping[str, bytes] | None = None
) -> None:
    """Check a source kind.

    Args:
        entry: an entry of this kind (`sample_entry`).
        files: what its resources hold, by file name: a small true example.
        records: address -> bytes, for a `locate` that asks for catalogue records.
    """
    _keeps_contract("sources", source.kind, source)
    instance: contracts.Source = source()
    with no_network():
        resources = _located(instance, entry, records or {})
        document = instance.read(entry, dict(files))
        again = instance.read(entry, dict(files))
    assert document == again, "`read` gives another document for the same bytes"
    _is_document(document)
    hostile = {
        "no bytes": b"",
        "only NUL bytes": b"\0" * 4096,
        "random bytes": random.Random(0).randbytes(4096),
        **({"a page that asks for a human, sent with status 200": _PAGE} if resources else {}),
    }
    for what, data in hostile.items():
        _refuses(instance, entry, dict.fromkeys(files, data), what)


def _located(source: contracts.Source, entry: Entry, records: Mapping[str, bytes]) -> list[contracts.Resource]:
    def get(url: str) -> bytes:
        assert url in records, f"`locate` asks for {url}, which `records` does not hold"
        return records[url]

    resources = list(source.locate(entry, get))
    assert resources == list(source.locate(entry, get)), "`locate` gives other resources for the same entry"
    assert resources or not source.hosts, "`locate` names no resource, although the source names hosts"
    for resource in resources:
        parts = urlsplit(resource.url)
        assert parts.scheme == "https", f"{resource.url} is not an https address"
        assert any(_host_fits(parts.hostname or "", host) for host in source.hosts), (
            f"{parts.hostname} is not among its hosts"
        )
        assert re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", resource.filename), (
            f"{resource.filename!r} is no plain file name"
        )
        assert 0 < resource.max_bytes <= 2**30, f"max_bytes of {resource.filename} is not between 1 and 2^30"
    return resources


def _host_fits(host: str, allowed: str) -> bool:
    return host == allowed or (allowed.startswith("*.") and host.endswith(allowed[1:]))


def _is_document(document: object) -> None:
    assert isinstance(document, contracts.Document), f"`read` gives {type(document).__name__}, not a Document"
    text = document.text
    assert isinstance(text, str) and text.strip(), "the document holds no text"
    assert unicodedata.is_normalized("NFC", text), "the text is not in Unicode form NFC"
    control = sorted({c for c in text if unicodedata.category(c) == "Cc" and c != "\n"})
    assert not control, f"the text holds control characters {control}; only \\n is allowed"
    for piece in document.removed:
        assert isinstance(piece, contracts.Removed) and piece.rule, (
            "`removed` holds Removed(rule, text) with a rule's name"
        )


def _refuses(source: contracts.Source, entry: Entry, files: dict[str, bytes], what: str) -> None:
    try:
        with no_network():
            source.read(entry, files)
    except IntegrityError:
        return
    except GreatctlError as error:
        raise AssertionError(f"`read` answers {what} with {type(error).__name__}, not IntegrityError") from error
    except Exception as error:  # whatever it is, it is the finding
        raise AssertionError(
            f"`read` answers {what} with {type(error).__name__}: {error}; raise IntegrityError"
        ) from error
    raise AssertionError(f"`read` takes {what} for a text; raise IntegrityError")


def check_architecture(
    architecture: type[Any],
    settings: Mapping[str, object] | None = None,
    *,
    explained: float = 0.6,
    steps: int = 400,
) -> None:
    """Check an architecture: shapes, gradients, seeds, saving, scaling, and that it learns.

    Args:
        architecture: a subclass of `greatctl.sae.coder.Coder`.
        settings: fields of its Config besides d_in and d_sae, fit for inputs that mix three of 24 directions.
        explained: the share of variance to be explained after `steps` steps of Adam on such inputs.
    """
    from . import check_coder

    _keeps_contract("architectures", architecture.name, architecture)
    check_coder.check(architecture, dict(settings or {}), explained=explained, steps=steps)


def check_metric(metric: type[Any]) -> None:
    """Check a patching metric: one finite number an example, of that example alone, pure, and not jumpy at
    10^4.
    """
    from . import check_metric as checks

    _keeps_contract("metrics", metric.name, metric)
    checks.check(metric)


def check_observer(observe: Callable[..., object]) -> None:
    """Check an `observe` hook: it takes every kind of event without raising, and gives nothing back."""
    progress = {"done": 1, "total": 0, "unit": "tokens", "already": 0}
    for kind, data in {
        "started": {},
        "progress": progress,
        "metric": {"step": 1, "loss": 0.5},
        "notice": {},
    }.items():
        assert observe(event=Event(kind, "train", "words", data)) is None, "an observer gives nothing back"
    for kind in ("skipped", "finished", "a kind of a later version"):
        assert observe(event=Event(kind, "report")) is None, "an observer gives nothing back"


def check_sections_hook(report_sections: Callable[..., object], results: Path) -> None:
    """Check a `report_sections` hook on a results folder, and on one where nothing is there yet."""
    for folder in (results, results / "nothing-here"):
        try:
            check_sections(report_sections(results=folder))
        except PluginError as error:
            raise AssertionError(error.message) from error


def _keeps_contract(kind: str, name: str, target: type) -> None:
    try:
        check_contract(kind, name, target, plugin=target.__module__)
    except PluginError as error:
        raise AssertionError(error.message) from error
