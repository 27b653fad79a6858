"""Labels: a name and a description for the latents that are shown, from a labeler that a person asked for.

    greatctl interpret --labeler http://127.0.0.1:8000/v1 --labeler-model NAME

They lie in results/labels/<SAE>, an artifact of its own beside the feature tables, so that what a labeler says never
touches what was measured:

    labels.parquet     one row a latent: name, description, and scores beside those of a shuffled label
    exams.parquet      every example that was shown or asked about, with the right answer and what was answered
    answers.parquet    every answer as it came, by the hash of its question

Where text leaves the machine, how much and whereto is said before any is sent. An answer is kept from the moment that it
comes (a killed run asks only what is missing), and those of an earlier artifact are used again for the same questions;
`--force` asks all of them anew.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import GreatctlError, StageError
from ..events import Run
from ..store.artifact import Artifact, Identity, current, load, touch, work
from ..store.files import canonical_json, make_dir, sha256_bytes, write_json
from ..store.tables import read_rows, write_table
from .context import Context, Project
from .labelers import Labeler, open_labeler

if TYPE_CHECKING:
    from ..features.label_prompts import Message
    from ..features.label_scores import Exam
    from ..features.labels import Ask, Named, Score

__all__ = ["FOLDER", "STAGE", "Wanted", "label", "labels_by_latent", "labels_of"]

STAGE = "interpret --labeler"  # the command that makes it, which errors name
FOLDER = "labels"
_ANSWERS, _TABLE, _LABELS, _EXAMS = "answers", "answers.parquet", "labels.parquet", "exams.parquet"
_T = TypeVar("_T")

Exams = Callable[[Sequence[int]], Mapping[int, "Exam"]]
"""Latents to what is shown and asked of each."""


@dataclass(frozen=True)
class Wanted:
    """Who is asked about which latents."""

    labeler: str
    model: str | None
    latents: Sequence[int]
    seed: int


def labels_of(project: Project, features: Artifact) -> Artifact | None:
    """The labels of these very feature tables; None where there are none, or damaged ones."""
    try:
        artifact = load(project.results / FOLDER / features.path.name).check()
    except GreatctlError:
        return None
    made_from = dict(artifact.record["inputs"]).get("features")  # type: ignore[call-overload]
    return artifact if made_from == features.fingerprint else None


def labels_by_latent(project: Project, features: Artifact) -> dict[int, dict[str, Any]]:
    """The rows of `labels_of` by latent; empty where there is no such table."""
    labels = labels_of(project, features)
    return {row["latent"]: row for row in read_rows(labels.path / _LABELS)} if labels else {}


def label(ctx: Context, features: Artifact, wanted: Wanted, exams: Exams) -> Artifact:
    """The labels of these latents, asked for unless they are there already.

    Raises:
        NetworkError, AccessError, StageError: the labeler cannot be asked, or nothing that it said could be read; labels
            that were there stay.
        InterruptedRun: a stop was asked for; what was answered is kept.
    """
    labeler = open_labeler(ctx, wanted.labeler, wanted.model)
    final = ctx.project.results / FOLDER / features.path.name
    identity = _identity(features, wanted, labeler)
    artifact, reason = current(final, identity)
    if artifact is not None and not ctx.force:
        touch(artifact)
        ctx.run.notice(f"interpret: the labels are up to date{_left_over(artifact.summary)}")
        return artifact
    ctx.run.notice(f"interpret: {labeler.name} names {len(wanted.latents)} latents ({reason or 'forced'})")
    ctx.run.notice(f"interpret: {_what_is_sent(labeler, len(wanted.latents))}")
    labeler.reach()
    started = time.monotonic()
    earlier = {} if ctx.force else _earlier(final)
    with work(final, identity, origins=ctx.origins, fresh=ctx.force) as w:
        answers = _Answers(w.path / _ANSWERS, labeler, earlier, ctx.run)
        asked = exams(wanted.latents)
        rows, scores = _rows(ctx, features, labeler, answers.ask, asked, wanted.seed)
        _some_named(rows, labeler)
        _write(w.path, rows, asked, scores, answers)
        summary = _summary(rows, labeler, wanted.seed)
        sealed = w.seal(summary, discard=(_ANSWERS,), seconds=round(time.monotonic() - started, 3))
    for said in _gains(summary):
        ctx.run.notice(f"interpret: {said}")
    return sealed


def _what_is_sent(labeler: Labeler, count: int) -> str:
    """Which text goes where, said before any goes."""
    from ..features.label_scores import SHOWN, TESTED

    if not labeler.place:
        return "nothing leaves this machine"
    return f"up to {SHOWN + 2 * TESTED} passages of the corpus for each of {count} latents are sent to {labeler.place}"


def _some_named(rows: Sequence[Mapping[str, object]], labeler: Labeler) -> None:
    """Raises StageError where no latent got a name: that is a broken labeler, not a result that replaces another."""
    if rows and all(row["source"] != "labeler" for row in rows):
        raise StageError(
            f"{labeler.name} named none of {len(rows)} latents",
            why=str(rows[0]["problem"]),
            fix="name another --labeler-model; the tables stand, and latents keep the names that they had",
        )


def _left_over(summary: Mapping[str, Any]) -> str:
    """What to do about latents that an earlier run could not name."""
    missing = int(summary["n_latents"]) - int(summary["n_named"])
    return f" ({missing} of {summary['n_latents']} have none; --force asks again)" if missing else ""


def _identity(features: Artifact, wanted: Wanted, labeler: Labeler) -> Identity:
    from ..features.label_prompts import PROMPTS
    from ..features.label_scores import EXAMS

    config = {
        "sae": features.path.name,
        "labeler": labeler.name,
        "latents": list(wanted.latents),
        "seed": wanted.seed,
        "prompts": PROMPTS,
        "exams": EXAMS,
    }
    return Identity(STAGE, config, {"features": features.fingerprint}, model_revision=labeler.revision)


def _rows(
    ctx: Context, features: Artifact, labeler: Labeler, ask: Ask, exams: Mapping[int, Exam], seed: int
) -> tuple[list[dict[str, object]], dict[int, dict[str, Score]]]:
    """Ask for all names first, since a shuffled label is another latent's; then for all scores."""
    from ..features.label_scores import shift
    from ..features.labels import TASKS, explain, score
    from ..features.names import fallback_names

    latents = list(exams)
    named: dict[int, Named] = _all(ctx, labeler, "naming latents", latents, lambda latent: explain(ask, exams[latent]))
    known = [latent for latent in latents if named[latent].name]
    other = shift(known, seed)

    def scores(latent: int) -> dict[str, Score]:
        words = {"": named[latent].words, "_shuffled": named[other[latent]].words if latent in other else None}
        return {
            f"{task}{end}": score(ask, exams[latent], said, task)
            for end, said in words.items()
            if said
            for task in TASKS
        }

    scored = _all(ctx, labeler, "scoring the names", known, scores)
    fallback = fallback_names(features.path, latents)
    rows = []
    for latent in latents:
        one = named[latent]
        row = {"latent": latent, "name": one.name or fallback[latent], "description": one.description}
        row |= {"source": "labeler" if one.name else "fallback", "labeler": labeler.name, "problem": one.problem}
        row |= {"shuffled_with": other.get(latent), "split": exams[latent].split if one.name else None}
        rows.append(row | _numbers(scored.get(latent, {})))
    return rows, scored


def _numbers(scores: Mapping[str, Score]) -> dict[str, object]:
    """The columns of labels.parquet for these scores."""
    row: dict[str, object] = {}
    for name, found in scores.items():
        row |= {name: found.value, f"n_{name}": found.n}
        if found.interval and not name.endswith("_shuffled"):
            row |= dict(zip((f"{name}_low", f"{name}_high"), found.interval, strict=True))
    return row


def _all(ctx: Context, labeler: Labeler, task: str, latents: Sequence[int], do: Callable[[int], _T]) -> dict[int, _T]:
    """`do` for every latent, a few at once, in the order of the latents whatever comes first."""
    found: dict[int, _T] = {}
    pool = ThreadPoolExecutor(labeler.workers, "labelling")
    try:
        open_ones = {pool.submit(do, latent): latent for latent in latents}
        while open_ones:
            ctx.run.stop_here()
            done, _ = wait(open_ones, timeout=0.25, return_when=FIRST_COMPLETED)
            for future in done:
                found[open_ones.pop(future)] = future.result()
            ctx.run.progress(task, len(found), len(latents), "latents")
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return {latent: found[latent] for latent in latents}


class _Answers:
    """Asks, and keeps every answer in a file named after its question."""

    def __init__(self, folder: Path, labeler: Labeler, earlier: Mapping[str, str], run: Run) -> None:
        make_dir(folder)
        self._folder, self._labeler, self._earlier, self._run = folder, labeler, earlier, run

    def ask(self, messages: Sequence[Message]) -> str:
        """The answer to these messages, asked for only if nobody did before."""
        from ..features.label_answers import LONGEST

        question = {"labeler": self._labeler.name, "revision": self._labeler.revision, "messages": list(messages)}
        key = sha256_bytes(canonical_json(question).encode())
        path = self._folder / f"{key}.json"
        try:
            return str(json.loads(path.read_bytes())["answer"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        answer = self._earlier.get(key)
        if answer is None:
            self._run.stop_here()
            answer = self._labeler.ask(messages)[-LONGEST:].encode("utf-8", "replace").decode()
        if answer:  # no words are no answer: a server that was out of order is asked again by the next run
            write_json(path, {"answer": answer})
        return answer

    def rows(self) -> list[dict[str, str]]:
        """Every answer with the hash of its question, in the order of the hashes."""
        return [{"question": p.stem, **json.loads(p.read_bytes())} for p in sorted(self._folder.glob("*.json"))]


def _earlier(final: Path) -> dict[str, str]:
    """The answers of the artifact that is there now, if it is whole."""
    try:
        artifact = load(final).check()
    except GreatctlError:
        return {}
    return {row["question"]: row["answer"] for row in read_rows(artifact.path / _TABLE)}


def _write(
    folder: Path,
    rows: Sequence[Mapping[str, object]],
    exams: Mapping[int, Exam],
    scores: Mapping[int, Mapping[str, Score]],
    answers: _Answers,
) -> None:
    import pyarrow as pa

    from ..features.labels import exams_table, table_of

    write_table(folder / _LABELS, table_of(rows))
    write_table(folder / _EXAMS, exams_table(exams, scores))
    schema = pa.schema([("question", pa.string()), ("answer", pa.string())])
    write_table(folder / _TABLE, pa.Table.from_pylist(answers.rows(), schema=schema))


def _summary(rows: Sequence[Mapping[str, object]], labeler: Labeler, seed: int) -> dict[str, object]:
    """Means over the latents that were named, each beside that of shuffled labels.

    detection_gain and fuzzing_gain are [mean, low, high] of a label's score minus that of another latent's label on the
    same questions, the latent being the unit (percentile bootstrap, 95 %); n_works counts the latents whose questions come
    from works of which nothing was shown.
    """
    from ..features.labels import TASKS
    from ..stats import bootstrap_interval

    found: dict[str, Any] = {}
    for task in TASKS:
        for name in (task, f"{task}_shuffled"):
            values = [float(row[name]) for row in rows if row.get(name) is not None]  # type: ignore[arg-type]
            found[name] = sum(values) / len(values) if values else None
        both = [(row.get(task), row.get(f"{task}_shuffled")) for row in rows]
        gains = [float(own) - float(other) for own, other in both if own is not None and other is not None]  # type: ignore[arg-type]
        gain = bootstrap_interval(gains, seed=seed) if len(gains) > 1 else None
        found[f"{task}_gain"] = [float(v[0]) for v in (gain.mean, gain.low, gain.high)] if gain else None
    n_named = sum(row["source"] == "labeler" for row in rows)
    n_works = sum(row["split"] == "works" for row in rows)
    return {"labeler": labeler.name, "n_latents": len(rows), "n_named": n_named, "n_works": n_works, **found}


def _gains(summary: Mapping[str, Any]) -> list[str]:
    """What a label tells beyond any other latent's, as sentences; none where nothing was scored."""
    found = [
        f"{task} {gain[0]:+.2f} (95 % {gain[1]:+.2f} to {gain[2]:+.2f})"
        for task in ("detection", "fuzzing")
        if (gain := summary[f"{task}_gain"]) is not None
    ]
    if not found:
        return []
    unseen = f"{summary['n_works']} of {summary['n_named']} on works of which nothing was shown"
    return [f"labels above another latent's on the same questions: {', '.join(found)}; {unseen}"]
