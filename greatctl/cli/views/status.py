"""The tables of `status` and `doctor`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Group, RenderableType

from ..text import literal
from .table import size, table

__all__ = ["render_checks", "render_status"]


def render_status(rows: Sequence[Mapping]) -> RenderableType:
    """One row an artifact; the sources, being many, are one row unless something is wrong with one."""
    if not rows:
        return literal("nothing is made yet; `greatctl fetch` is the first stage, `greatctl demo` shows all of them")
    sources = [r for r in rows if r["stage"] == "fetch"]
    fine = [r for r in sources if r["state"] == "up-to-date"]
    cells = []
    if fine:
        cells.append(("fetch", f"{len(fine)} sources", "up-to-date", size(sum(r["bytes"] for r in fine)), ""))
    for row in rows:
        if row not in fine:
            name = "/".join(Path(row["path"]).parts[-2:])
            cells.append((row["stage"], name, row["state"], size(row["bytes"]), row["reason"]))
    return table(["stage", "artifact", "state", "size", "why"], cells, right=(3,))


def render_checks(checks: Sequence[Mapping[str, str]]) -> RenderableType:
    """One row a check, then what to do."""
    view = table(["check", "state", "found"], [(c["name"], c["state"], c["found"]) for c in checks])
    fixes = [literal(f"{c['name']}: {c['fix']}") for c in checks if c["fix"] and c["state"] != "ok"]
    return Group(view, *fixes)
