"""The report as data: what the page shows, and nothing about how.

Every value is a string, a number or None, so that the page can escape all of it and `--format json` can write all of it.
Numbers that are not finite become None and are shown as "not available". What a block was read from stands in its
`origin`; the artifact with that fingerprint is one of the view's `records`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Protocol

from .values import clean

__all__ = [
    "Block",
    "Box",
    "Chart",
    "Curve",
    "Drawing",
    "Example",
    "Facet",
    "Finding",
    "Gate",
    "Hypothesis",
    "Index",
    "Label",
    "Latent",
    "Line",
    "Origin",
    "Prose",
    "Record",
    "Rival",
    "Score",
    "Section",
    "Share",
    "Table",
    "View",
    "read_from",
]

Cell = str | int | float | bool | None


@dataclass(frozen=True)
class Origin:
    """Where a number comes from: the artifact's fingerprint, and the file in it."""

    fingerprint: str
    file: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under headers. `numeric` are the columns that align right and sort as numbers, with `digits` that count."""

    headers: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numeric: Sequence[int] = ()
    caption: str = ""
    digits: int = 3
    folded: bool = False
    origin: Origin | None = None
    kind: str = "table"


@dataclass(frozen=True)
class Chart:
    """A plotly figure (data and layout as JSON values) with the same thing said in words.

    Charts of a section that have `tags` (which run, metric, direction …) can be filtered by them. `numbers` is what is
    drawn, as a table, for whoever cannot see the drawing.
    """

    title: str
    data: Sequence[Mapping]
    layout: Mapping
    words: str
    tags: Mapping[str, str] = field(default_factory=dict)
    numbers: Table | None = None
    origin: Origin | None = None
    kind: str = "chart"


@dataclass(frozen=True)
class Prose:
    """A paragraph. `quiet` is for the small print; with a `summary` it is folded away and its line breaks are kept."""

    text: str
    quiet: bool = False
    summary: str = ""
    title: str = ""
    origin: Origin | None = None
    kind: str = "prose"


@dataclass(frozen=True)
class Rival:
    """What a hypothesis has to beat: a baseline's AUROC on the same held-out authors, or why there is none."""

    name: str
    value: float | None
    about: str = ""


@dataclass(frozen=True)
class Gate:
    """One check of a hypothesis: passed, failed or missing."""

    number: int
    name: str
    state: str
    reason: str


@dataclass(frozen=True)
class Curve:
    """A small line: values from 0 to 1 at equal steps (None: not measured), its name, and what it shows."""

    name: str
    heights: Sequence[float | None]
    about: str


@dataclass(frozen=True)
class Score:
    """How well a label predicts where its latent fires, and how well another latent's label does on the same questions.

    Balanced accuracies over `n` answered examples, `low` to `high` the 95 % interval; 0.5 is guessing, None where there
    was too little to ask.
    """

    task: str
    value: float | None
    low: float | None
    high: float | None
    shuffled: float | None
    n: int


@dataclass(frozen=True)
class Label:
    """What a labeler called a latent. No verdict rests on it.

    Attributes:
        name, description: empty where it gave none that can be read.
        by: the labeler.
        shuffled_with: the latent whose label it is held against.
        asked_about: what the labeler had not seen any of: `works`, or `passages` where a latent fires in too few works.
        holds: in one of its tasks at least it does clearly better than that label.
        doubt: what speaks against it, as a sentence; empty where nothing does.
    """

    name: str
    description: str
    by: str
    scores: Sequence[Score]
    shuffled_with: int | None
    asked_about: str
    holds: bool
    doubt: str
    origin: Origin | None = None


@dataclass(frozen=True)
class Hypothesis:
    """A concept and a latent: what may be said of them, the baselines beside the number, and every check.

    `value` with `low` and `high` is the AUROC on held-out units (authors, or subjects where all texts have one author);
    `doses` say what more and more of the latent does; `name` is a label that holds, else its tokens.
    """

    concept: str
    latent: int
    name: str
    units: str
    verdict: str
    claim: str
    reason: str
    facts: Sequence[tuple[str, Cell]]
    value: float | None
    low: float | None
    high: float | None
    rivals: Sequence[Rival]
    gate: Sequence[Gate]
    doses: Sequence[Sequence[Cell]] = ()
    label: Label | None = None
    has_page: bool = False
    open: bool = False
    origin: Origin | None = None
    kind: str = "hypothesis"


@dataclass(frozen=True)
class Example:
    """A passage in which a latent fires: tokens with their strength (0 to 1), and where it stands."""

    tokens: Sequence[str]
    strengths: Sequence[float]
    activation: float
    source: str


@dataclass(frozen=True)
class Share:
    """One bar of a facet: its mean activation, with an interval where there is one, and what it counts."""

    name: str
    role: str
    value: float
    low: float | None = None
    high: float | None = None
    about: str = ""


@dataclass(frozen=True)
class Facet:
    """How strongly a latent fires by author, work, era or role; `words` say what a bar and its interval are."""

    name: str
    words: str
    shares: Sequence[Share]


@dataclass(frozen=True)
class Latent:
    """A latent's page. `name` is a label that holds, else its tokens; `more` are further passages, folded away."""

    latent: int
    name: str
    verdicts: Sequence[tuple[str, str]]
    reason: str
    facts: Sequence[tuple[str, Cell]]
    up: Sequence[str]
    down: Sequence[str]
    examples: Sequence[Example]
    facets: Sequence[Facet]
    spread: Curve | None = None
    along: Sequence[Curve] = ()
    more: Sequence[tuple[str, Sequence[Example]]] = ()
    near: Sequence[tuple[str, Sequence[tuple[int, float]]]] = ()
    label: Label | None = None
    open: bool = False
    origin: Origin | None = None
    kind: str = "latent"


@dataclass(frozen=True)
class Index:
    """Latents to search and sort on the page.

    Attributes:
        columns: name -> a value for each latent.
        judged: concept -> the same for what its test says.
        pages: for each latent `{"p": passages, "u": [[unit, mean], …]}`, or None where the page has no room for one.
            A passage is [tokens, a digit 0-9 of heat for each token, activation, place].
        units: [name, role] of each unit; places: name of each source.
        labels: latent -> what a labeler called it, for those that it was asked about.
        n_all: how many latents there are; n_pages: how many have passages here.
    """

    columns: Mapping[str, Sequence[object]]
    judged: Mapping[str, Mapping[str, Sequence[object]]]
    pages: Sequence[Mapping | None]
    units: Sequence[Sequence[str]]
    places: Sequence[str]
    n_all: int
    n_pages: int
    words: str
    labels: Mapping[int, Label] = field(default_factory=dict)
    origin: Origin | None = None
    kind: str = "index"


@dataclass(frozen=True)
class Line:
    """A line of a drawing, from below to above; `slot` says what is read (q, k, v, mlp, logits), `about` on hover."""

    x1: int
    y1: int
    x2: int
    y2: int
    width: float
    slot: str
    about: str


@dataclass(frozen=True)
class Box:
    """A labelled box of a drawing around x, y; `strength` (0 to 1) fills it."""

    x: int
    y: int
    label: str
    about: str
    strength: float


@dataclass(frozen=True)
class Drawing:
    """A graph as lines and boxes in pixels, with the same thing said in words."""

    title: str
    width: int
    height: int
    lines: Sequence[Line]
    boxes: Sequence[Box]
    words: str
    origin: Origin | None = None
    kind: str = "drawing"


@dataclass(frozen=True)
class Record:
    """An artifact: what was asked for, from what, and the files with their hashes."""

    stage: str
    path: str
    fingerprint: str
    facts: Sequence[tuple[str, str]]
    settings: Sequence[tuple[str, str, str]]
    inputs: Sequence[tuple[str, str]]
    files: Sequence[tuple[str, int, str]]
    origin: Origin | None = None
    kind: str = "record"


Block = Table | Chart | Prose | Hypothesis | Latent | Index | Drawing | Record


@dataclass(frozen=True)
class Finding:
    """A sentence with numbers, the section that shows them, and where they come from."""

    text: str
    section: str
    origin: Origin | None = None


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
    findings: Sequence[Finding]
    sections: Sequence[Section] = field(default_factory=list)

    @property
    def records(self) -> dict[str, Record]:
        """The artifacts that the page tells of, by fingerprint."""
        return {b.fingerprint: b for s in self.sections for b in s.blocks if isinstance(b, Record)}

    def to_json(self) -> dict:
        """The view as strict JSON values."""
        return clean(asdict(self))  # type: ignore[return-value]


class _Sealed(Protocol):
    @property
    def fingerprint(self) -> str: ...


def read_from(artifact: _Sealed, file: str, blocks: Iterable[Block]) -> list[Block]:
    """The blocks, each marked as read from a file of an artifact; those that are marked already stay as they are."""
    origin = Origin(artifact.fingerprint, file)
    return [block if block.origin else replace(block, origin=origin) for block in blocks]
