"""Names for latents from a labeler, each with scores that say how much it may be believed.

    named = explain(ask, 118, exam)                     a name and a description, or the fallback
    found = score(ask, exam, description, "detection")  on passages that the labeler has not seen

A labeler is anything that answers messages with text (a hosted model, a local one, a stub). Its words are never used in
a verdict: they are how a person finds a latent again, and the numbers beside them say whether they fit it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
from .label_scores import Asked, Exam, accuracy_interval, balanced_accuracy

__all__ = ["TASKS", "Ask", "Named", "Score", "Task", "exams_table", "explain", "passages_of", "score", "table_of"]

Ask = Callable[[Sequence[Message]], str]
"""Messages (role, content) to the text of an answer."""

Task = Literal["detection", "fuzzing"]
TASKS: tuple[Task, ...] = ("detection", "fuzzing")
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
        *((f"{task}{end}", pa.float64()) for task in TASKS for end in ("", "_low", "_high", "_shuffled")),
        *((f"n_{task}{end}", pa.int32()) for task in TASKS for end in ("", "_shuffled")),
        ("split", pa.string()),
        ("problem", pa.string()),
    ]
)
_EXAMS = pa.schema(
    [
        ("latent", pa.int32()),
        ("task", pa.string()),
        ("text", pa.string()),
        ("window", pa.int32()),
        ("source_id", pa.string()),
        ("right", pa.bool_()),
        ("answered", pa.bool_()),
        ("answered_shuffled", pa.bool_()),
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
    """Balanced accuracy over `n` examples; None where too few could be asked about, or no answer could be read.

    `interval` is the 95 % one; `answers` are in the order of the exam's examples, None where none could be read.
    """

    value: float | None
    n: int
    interval: tuple[float, float] | None = None
    answers: tuple[bool | None, ...] = ()


def passages_of(folder: Path, latent: int) -> tuple[list[Passage], list[Passage]]:
    """The passages of the tables in `folder` in which a latent fires, strongest first, and its near misses."""
    table = pq.read_table(
        folder / "examples.parquet",
        columns=["kind", "window", "pieces", "heat", "activation", "source_id"],
        filters=pc.field("latent") == latent,
    )
    firing: dict[str, Passage] = {}
    near: list[Passage] = []
    for row in sorted(table.to_pylist(), key=lambda row: -row["activation"]):
        passage = Passage(row["window"], row["pieces"], row["heat"], row["source_id"] or "")
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
    questions, put = (exam.detection, prompts.detection) if task == "detection" else (exam.fuzzing, prompts.fuzzing)
    answers: list[bool | None] = []
    for rows in questions:
        found, _ = _asked(ask, put(description, [row.text for row in rows]), partial(read_choices, count=len(rows)))
        answers += [None] * len(rows) if found is None else found
    known = [(row.right, said) for row, said in zip(_flat(questions), answers, strict=True) if said is not None]
    truth, said = [right for right, _ in known], [answer for _, answer in known]
    return Score(balanced_accuracy(truth, said), len(known), accuracy_interval(truth, said), tuple(answers))


def _flat(questions: Sequence[Sequence[Asked]]) -> list[Asked]:
    """The examples of all questions, in their order."""
    return [row for rows in questions for row in rows]


def table_of(rows: Iterable[Mapping[str, object]]) -> pa.Table:
    """labels.parquet: one row a latent.

    name, description; source (`labeler`, or `fallback` with a problem); detection and fuzzing with their 95 % intervals
    (…_low, …_high), each with the score of the label of the latent `shuffled_with` on the same questions; n_… the
    examples that were answered; split, what shown and asked examples share none of (`works` or `passages`).
    """
    return pa.Table.from_pylist([dict(row) for row in rows], schema=_SCHEMA)


def exams_table(exams: Mapping[int, Exam], scores: Mapping[int, Mapping[str, Score]]) -> pa.Table:
    """exams.parquet: every example with the right answer and what was answered, so that a score can be counted again.

    task is `shown` (no answer), `detection` or `fuzzing`; answered is None where no answer could be read.

    Args:
        scores: of the named latents: `detection`, `fuzzing` and the same with `_shuffled`.
    """
    rows: list[dict[str, object]] = []
    for latent, exam in exams.items():
        rows += [{**_place(p), "latent": latent, "task": "shown", "text": p.text} for p in exam.shown]
        for task, questions in zip(TASKS, (exam.detection, exam.fuzzing), strict=True):
            examples, of = _flat(questions), scores.get(latent, {})
            columns = [of[name].answers if name in of else () for name in (task, f"{task}_shuffled")]
            own, other = (given or (None,) * len(examples) for given in columns)
            for row, said, shuffled in zip(examples, own, other, strict=True):
                asked = {"latent": latent, "task": task, "text": row.text, "right": row.right}
                rows.append({**_place(row.passage), **asked, "answered": said, "answered_shuffled": shuffled})
    return pa.Table.from_pylist(rows, schema=_EXAMS)


def _place(passage: Passage) -> dict[str, object]:
    return {"window": passage.window, "source_id": passage.source}


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
