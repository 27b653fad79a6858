"""The tables of `status` and `doctor`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from ..text import literal
from .table import size, table

__all__ = ["render_checks", "render_status"]


def render_status(rows: Sequence[Mapping]) -> RenderableType:
    """One row an artifact; the sources, being many, are one row unless something is wrong with one."""
    if not rows:
        return literal("nothing is made yet; `greatctl fetch` is the first stage, `greatctl demo` shows all of them")
    sources = [r for r in rows if r["stage"] == "fetch"]
    fine = [r for r in sources if r["state"] == "up-to-date"]
    cells: list[tuple[object, ...]] = []
    if fine:
        cells.append(("fetch", f"{len(fine)} sources", "up-to-date", size(sum(r["bytes"] for r in fine))))
    cells += [(row["stage"], _artifact(row), row["state"], size(row["bytes"])) for row in rows if row not in fine]
    return Group(literal(_headline(rows), "bold"), table(["stage", "artifact", "state", "size"], cells, right=(3,)))


def _headline(rows: Sequence[Mapping]) -> str:
    """The finding: how many are as they should be."""
    counts = Counter(row["state"] for row in rows)
    made = len(rows) - counts["missing"]
    off = [f"{counts[state]} {state}" for state in ("damaged", "stale", "missing") if counts[state]]
    fine = counts["up-to-date"]
    return f"{fine} of {made} artifacts up to date" + (", " + ", ".join(off) if off else "")


def _artifact(row: Mapping) -> Text:
    """The name below its stage's folder, and in a line of its own why it is not as it should be."""
    parts = Path(row["path"]).parts
    name = literal(
        "–" if row["state"] == "missing" else "/".join(parts[-2:] if row["stage"] == "harvest" else parts[-1:])
    )
    return Text("\n").join([name, literal(row["reason"], "dim")]) if row["reason"] else name


def render_checks(checks: Sequence[Mapping[str, str]]) -> RenderableType:
    """One row a check, then what to do."""
    view = table(["check", "state", "found"], [(c["name"], c["state"], c["found"]) for c in checks])
    fixes = [literal(f"{c['name']}: {c['fix']}") for c in checks if c["fix"] and c["state"] != "ok"]
    return Group(view, *fixes)
