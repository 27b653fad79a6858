"""Names for latents from a labeler, each with scores that say how much it may be believed.

    named = explain(ask, 118, exam)                     a name and a description, or the fallback
    found = score(ask, exam, description, "detection")  on passages that the labeler has not seen

A labeler is anything that answers messages with text (a hosted model, a local one, a stub). Its words are never used in
a verdict: they are how a person finds a latent again, and the numbers beside them say whether they fit it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from . import label_prompts as prompts
from .label_answers import read_choices, read_label
from .label_prompts import Message, Passage
from .label_scores import Exam, balanced_accuracy

__all__ = ["Ask", "Named", "Score", "explain", "passages_of", "score", "table_of"]

Ask = Callable[[Sequence[Message]], str]
"""Messages (role, content) to the text of an answer."""

Task = Literal["detection", "fuzzing"]
_TRIES = 3  # answers that cannot be read before a question is given up
_T = TypeVar("_T")
_SCHEMA = pa.schema(
    [
        ("latent", pa.int32()),
        ("name", pa.string()),
        ("description", pa.string()),
        ("source", pa.string()),
        ("labeler", pa.string()),
        ("shuffled_with", pa.int32()),
        *((f"{task}{end}", pa.float64()) for task in ("detection", "fuzzing") for end in ("", "_shuffled")),
        *((f"n_{task}{end}", pa.int32()) for task in ("detection", "fuzzing") for end in ("", "_shuffled")),
        ("problem", pa.string()),
    ]
)


@dataclass(frozen=True)
class Named:
    """What a labeler called a latent; empty with a `problem` where it gave no readable name."""

    name: str = ""
    description: str = ""
    problem: str = ""

    @property
    def words(self) -> str:
        """What the scoring questions are asked about."""
        return f"{self.name}: {self.description}" if self.description else self.name


@dataclass(frozen=True)
class Score:
    """Balanced accuracy over `n` examples; None where too few could be asked about, or no answer could be read."""

    value: float | None
    n: int


def passages_of(folder: Path, latent: int) -> tuple[list[Passage], list[Passage]]:
    """The passages of the tables in `folder` in which a latent fires, strongest first, and its near misses."""
    table = pq.read_table(
        folder / "examples.parquet",
        columns=["kind", "window", "pieces", "heat", "activation"],
        filters=pc.field("latent") == latent,
    )
    firing: dict[str, Passage] = {}
    near: list[Passage] = []
    for row in sorted(table.to_pylist(), key=lambda row: -row["activation"]):
        passage = Passage(row["window"], row["pieces"], row["heat"])
        if row["kind"] == "near":
            near.append(passage)
        elif passage.fires:
            firing.setdefault(passage.text, passage)
    return list(firing.values()), near


def explain(ask: Ask, exam: Exam) -> Named:
    """Ask for a name and a description; again where the answer cannot be read."""
    if not exam.shown:
        return Named(problem="it never fires")
    found, problem = _asked(ask, prompts.explanation(exam.shown), read_label)
    return Named(problem=problem) if found is None else Named(*found)


def score(ask: Ask, exam: Exam, description: str, task: Task) -> Score:
    """How well a description predicts where the latent of this exam fires."""
    truth: list[bool] = []
    answers: list[bool] = []
    for messages, right in _questions(exam, description, task):
        found, _ = _asked(ask, messages, partial(read_choices, count=len(right)))
        if found is not None:
            truth += right
            answers += found
    return Score(balanced_accuracy(truth, answers), len(truth))


def _questions(exam: Exam, description: str, task: Task) -> Iterator[tuple[list[Message], list[bool]]]:
    """Each question with the right answers."""
    if task == "detection":
        for rows in exam.detection:
            yield prompts.detection(description, [p for p, _ in rows]), [fires for _, fires in rows]
    else:
        for marks in exam.fuzzing:
            yield prompts.fuzzing(description, [text for text, _ in marks]), [rightly for _, rightly in marks]


def table_of(rows: Iterable[Mapping[str, object]]) -> pa.Table:
    """labels.parquet: one row a latent.

    name, description; source (`labeler`, or `fallback` with a problem); detection and fuzzing, each with the score of the
    label of the latent `shuffled_with` on the same questions; n_… the examples that were answered.
    """
    return pa.Table.from_pylist([dict(row) for row in rows], schema=_SCHEMA)


def _asked(ask: Ask, messages: list[Message], read: Callable[[str], _T]) -> tuple[_T | None, str]:
    """The answer as `read` understands it, or None and what was wrong with the last one."""
    problem = ""
    for _ in range(_TRIES):
        answer = ask(messages)
        try:
            return read(answer), ""
        except ValueError as error:
            problem = f"{_TRIES} answers could not be read ({error})"
            messages = prompts.ask_again(messages, answer, str(error))
    return None, problem
