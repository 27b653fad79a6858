"""The five places where a plugin meets greatctl.

A plugin is a module (or any object) with functions of these names marked `@hookimpl`:

    from greatctl import hookimpl

    @hookimpl
    def register_metrics(register):
        register("rank", "my_package.rank:Rank")

An implementation may leave arguments out; it may not add any. No hook is `firstresult`: with it, the last
plugin that was installed would replace a built-in without a word. Names are found in the registry instead,
which refuses duplicates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import pluggy

from ..events import Event

__all__ = ["PROJECT", "REGISTER_HOOKS", "Register", "Section", "hookimpl", "hookspec"]

PROJECT = "greatctl"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

REGISTER_HOOKS = {
    "sources": "register_sources",
    "architectures": "register_architectures",
    "metrics": "register_metrics",
}

Section = Mapping[str, object]


class Register(Protocol):
    """What a `register_*` hook is handed."""

    def __call__(self, name: str, target: type | str, *, replace: bool = False) -> None:
        """Give an item to greatctl.

        Args:
            name: the word that people write in flags and in sources.toml: a-z, 0-9 and single '-' between
                them. It equals the class's own `name` (`kind` for a source).
            target: the class, or "package.module:Class", which is imported when it is first used
                (".module:Class" is relative to the plugin). Prefer the string where the class needs torch.
            replace: take the place of an item of that name. This is announced and recorded.

        Raises:
            PluginError: the name is no slug or is taken, or the class does not keep its contract.
        """
        ...


@hookspec
def register_sources(register: Register) -> None:
    """Add kinds of sources: classes that keep `contracts.Source`. Called once, while plugins load."""


@hookspec
def register_architectures(register: Register) -> None:
    """Add autoencoders: subclasses of `greatctl.sae.coder.Coder`. Called once, while plugins load."""


@hookspec
def register_metrics(register: Register) -> None:
    """Add patching metrics: classes that keep `contracts.PatchMetric`. Called once, while plugins load."""


@hookspec
def report_sections(results: Path) -> Sequence[Section]:
    """Add sections to the report, as data and never as HTML. Called once, when the report is made.

    Args:
        results: the project's results folder (saes/, features/, patches/).

    Returns:
        Sections `{"title": str, "blocks": [block, …]}`. A block is one of

            {"kind": "prose", "text": str}
            {"kind": "table", "columns": [str, …], "rows": [[str | int | float | bool | None, …], …]}
            {"kind": "chart", "draw": "bars" | "lines" | "points", "title": str, "words": str, "x": axis, "y": axis,
             "series": {str: [[str | number, number | None], …], …}}
            {"kind": "chart", "draw": "heat", "title": str, "words": str, "x": axis, "y": axis, "value": axis,
             "cells": [[str | number, str | number, number | None], …]}

        An axis is `{"name": str, "unit": str}` ("" for no unit); `words` say what is to be seen in it. On one axis stand
        names or numbers, not both, and a chart holds at most `sections.MOST` numbers.
    """
    return ()


@hookspec
def observe(event: Event) -> None:
    """Hear what a run says (a tracker, say). Called for each event, on the thread that runs the stage.

    An observer that raises is muted for the rest of the run, with one notice.
    """
