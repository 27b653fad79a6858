"""The report as data: what the page shows, and nothing about how.

Every value is a string, a number or None, so that the page can escape all of it and `--format json` can write all of it.
Numbers that are not finite become None and are shown as "not available".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

__all__ = ["Block", "Chart", "Example", "Latent", "Prose", "Section", "Table", "View", "clean"]

Cell = str | int | float | bool | None


@dataclass(frozen=True)
class Table:
    """Rows under headers. `numeric` are the columns that align right and sort as numbers."""

    headers: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numeric: Sequence[int] = ()
    caption: str = ""
    kind: str = "table"


@dataclass(frozen=True)
class Chart:
    """A plotly figure (data and layout as JSON values) with the same thing said in words."""

    title: str
    data: Sequence[Mapping]
    layout: Mapping
    words: str
    kind: str = "chart"


@dataclass(frozen=True)
class Prose:
    """A paragraph. `quiet` is for the small print; with a `summary` it is folded away and its line breaks are kept."""

    text: str
    quiet: bool = False
    summary: str = ""
    kind: str = "prose"


@dataclass(frozen=True)
class Example:
    """A passage in which a latent fires: tokens with their strength (0 to 1), and where it stands."""

    tokens: Sequence[str]
    strengths: Sequence[float]
    activation: float
    source: str


@dataclass(frozen=True)
class Latent:
    """A latent's card."""

    latent: int
    verdict: str
    reason: str
    facts: Sequence[tuple[str, Cell]]
    up: Sequence[str]
    down: Sequence[str]
    examples: Sequence[Example]
    units: Sequence[tuple[str, str, float]]
    kind: str = "latent"


Block = Table | Chart | Prose | Latent


@dataclass(frozen=True)
class Section:
    """A titled part of the page. `id` is its anchor."""

    id: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class View:
    """The whole report."""

    title: str
    subtitle: str
    findings: Sequence[str]
    sections: Sequence[Section] = field(default_factory=list)

    def to_json(self) -> dict:
        """The view as strict JSON values."""
        return clean(asdict(self))  # type: ignore[return-value]


def clean(value: object) -> object:
    """JSON values with every number finite: NaN and infinities become None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean(v) for v in value]
    return value
