"""Labels: a name and a description for the latents that are shown, from a labeler that a person asked for.

    greatctl interpret --labeler http://127.0.0.1:8000/v1 --labeler-model NAME

They lie in results/labels/<SAE>, an artifact of its own beside the feature tables, so that what a labeler says never
touches what was measured:

    labels.parquet     one row a latent: name, description, and scores beside those of a shuffled label
    answers.parquet    every answer as it came, by the hash of its question

An answer is kept from the moment that it comes (a killed run asks only what is missing), and those of an earlier artifact
are used again for the same questions; `--force` asks all of them anew.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import GreatctlError
from ..events import Run
from ..store.artifact import Artifact, Identity, current, load, touch, work
from ..store.files import canonical_json, make_dir, sha256_bytes, write_json
from ..store.tables import read_rows, write_table
from .context import Context, Project
from .labelers import Labeler, open_labeler

if TYPE_CHECKING:
    from ..features.label_prompts import Message
    from ..features.label_scores import Exam
    from ..features.labels import Ask, Named

__all__ = ["FOLDER", "STAGE", "Wanted", "label", "labels_by_latent", "labels_of"]

STAGE = "interpret --labeler"  # the command that makes it, which errors name
FOLDER = "labels"
_ANSWERS, _TABLE, _LABELS = "answers", "answers.parquet", "labels.parquet"
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
        NetworkError, AccessError, StageError: the labeler cannot be asked.
        InterruptedRun: a stop was asked for; what was answered is kept.
    """
    labeler = open_labeler(ctx, wanted.labeler, wanted.model)
    final = ctx.project.results / FOLDER / features.path.name
    identity = _identity(features, wanted, labeler)
    artifact, reason = current(final, identity)
    if artifact is not None and not ctx.force:
        touch(artifact)
        ctx.run.notice("interpret: the labels are up to date")
        return artifact
    ctx.run.notice(f"interpret: {labeler.name} names {len(wanted.latents)} latents ({reason or 'forced'})")
    started = time.monotonic()
    earlier = {} if ctx.force else _earlier(final)
    with work(final, identity, origins=ctx.origins, fresh=ctx.force) as w:
        answers = _Answers(w.path / _ANSWERS, labeler, earlier, ctx.run)
        rows = _rows(ctx, features, labeler, answers.ask, exams(wanted.latents), wanted.seed)
        _write(w.path, rows, answers)
        return w.seal(_summary(rows, labeler), discard=(_ANSWERS,), seconds=round(time.monotonic() - started, 3))


def _identity(features: Artifact, wanted: Wanted, labeler: Labeler) -> Identity:
    from ..features.label_prompts import PROMPTS

    config = {
        "sae": features.path.name,
        "labeler": labeler.name,
        "latents": list(wanted.latents),
        "seed": wanted.seed,
        "prompts": PROMPTS,
    }
    return Identity(STAGE, config, {"features": features.fingerprint}, model_revision=labeler.revision)


def _rows(
    ctx: Context, features: Artifact, labeler: Labeler, ask: Ask, exams: Mapping[int, Exam], seed: int
) -> list[dict[str, object]]:
    """Ask for all names first, since a shuffled label is another latent's; then for all scores."""
    from ..features.label_scores import shift
    from ..features.labels import explain, score
    from ..features.names import fallback_names

    latents, tasks = list(exams), ("detection", "fuzzing")
    named: dict[int, Named] = _all(ctx, labeler, "naming latents", latents, lambda latent: explain(ask, exams[latent]))
    known = [latent for latent in latents if named[latent].name]
    other = shift(known, seed)

    def scores(latent: int) -> dict[str, object]:
        row: dict[str, object] = {"shuffled_with": other.get(latent)}
        for end, owner in (("", latent), ("_shuffled", other.get(latent))):
            for task in tasks if owner is not None else ():
                found = score(ask, exams[latent], named[owner].words, task)  # type: ignore[arg-type]
                row |= {f"{task}{end}": found.value, f"n_{task}{end}": found.n}
        return row

    scored = _all(ctx, labeler, "scoring the names", known, scores)
    fallback = fallback_names(features.path, latents)
    rows = []
    for latent in latents:
        one = named[latent]
        row = {"latent": latent, "name": one.name or fallback[latent], "description": one.description}
        row |= {"source": "labeler" if one.name else "fallback", "labeler": labeler.name, "problem": one.problem}
        rows.append(row | scored.get(latent, {}))
    return rows


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


def _write(folder: Path, rows: Sequence[Mapping[str, object]], answers: _Answers) -> None:
    import pyarrow as pa

    from ..features.labels import table_of

    write_table(folder / _LABELS, table_of(rows))
    schema = pa.schema([("question", pa.string()), ("answer", pa.string())])
    write_table(folder / _TABLE, pa.Table.from_pylist(answers.rows(), schema=schema))


def _summary(rows: Sequence[Mapping[str, object]], labeler: Labeler) -> dict[str, object]:
    """Means over the latents that were named, each beside that of shuffled labels."""
    means: dict[str, object] = {}
    for name in (f"{task}{end}" for task in ("detection", "fuzzing") for end in ("", "_shuffled")):
        values = [float(row[name]) for row in rows if row.get(name) is not None]  # type: ignore[arg-type]
        means[name] = sum(values) / len(values) if values else None
    n_named = sum(row["source"] == "labeler" for row in rows)
    return {"labeler": labeler.name, "n_latents": len(rows), "n_named": n_named, **means}
