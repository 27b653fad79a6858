"""Reading pair files: TOML with `[[pair]]` and `[[template]]` tables, or JSON lines.

Everything that can be wrong without a tokenizer is found here and named with file and line: unknown keys
(with the nearest known one), wrong types, missing or empty texts, ids used twice, spans that mark nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import tomli

from ..errors import InputError, ManifestError, did_you_mean
from ..toml_positions import Positions
from .spans import unfit
from .templates import expand

__all__ = ["Pair", "read_pairs"]

_NEEDED = ("id", "clean", "corrupted", "answer", "wrong_answer")


@dataclass(frozen=True)
class Pair:
    """One pair of prompts.

    Attributes:
        id: unique in its file.
        clean: the prompt after which `answer` is the right continuation.
        corrupted: its counterpart, of as many tokens unless spans are marked.
        answer: text that follows `clean`, leading space included; or several, any of which is right.
        wrong_answer: what `corrupted` calls for, likewise.
        heldout: kept apart from exploration.
        why: what the pair tests, in words.
        concept: the file's concept.
        cluster: pairs of one cluster resemble each other and are resampled together; default the pair's id.
        spans: name -> (text in `clean`, its counterpart in `corrupted`), or None.
    """

    id: str
    clean: str
    corrupted: str
    answer: str | tuple[str, ...]
    wrong_answer: str | tuple[str, ...]
    heldout: bool = False
    why: str = ""
    concept: str = ""
    cluster: str = ""
    spans: Mapping[str, tuple[str, str]] | None = None

    def __post_init__(self) -> None:
        if not self.cluster:
            object.__setattr__(self, "cluster", self.id)

    @property
    def answers(self) -> tuple[str, ...]:
        """All right answers."""
        return (self.answer,) if isinstance(self.answer, str) else self.answer

    @property
    def wrong_answers(self) -> tuple[str, ...]:
        """All wrong answers."""
        return (self.wrong_answer,) if isinstance(self.wrong_answer, str) else self.wrong_answer

    def row(self) -> dict[str, object]:
        """For tables: the same columns and types for every pair; alternatives are joined by " | "."""
        values = {name: value for name, value in vars(self).items() if name != "spans"}
        texts = {"answer": " | ".join(self.answers), "wrong_answer": " | ".join(self.wrong_answers)}
        spans = [{"name": name, "clean": a, "corrupted": b} for name, (a, b) in (self.spans or {}).items()]
        return {**values, **texts, "spans": json.dumps(spans, ensure_ascii=False) if spans else None}


def read_pairs(path: Path) -> list[Pair]:
    """Read a pair file (`.toml`, or JSON lines with any other ending); templates are expanded.

    Raises:
        InputError: there is no such file, or it holds no pair.
        ManifestError: the file is malformed; names file, line, and the nearest known key.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        fix = "name a pair file with --pairs, or use --pairs greatness"
        raise InputError(f"the pair file {path} cannot be read", why=error.strerror or str(error), fix=fix) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise _malformed(path, line, "it is not UTF-8", str(error)) from None
    text = text.replace("\r\n", "\n")
    pairs = _from_toml(path, text) if path.suffix == ".toml" else _from_lines(path, text)
    if not pairs:
        raise InputError(
            f"the pair file {path} holds no pair",
            why="it has neither a [[pair]] nor a [[template]] table",
            fix="add one",
            where=str(path),
        )
    return pairs


def _from_toml(path: Path, text: str) -> list[Pair]:
    try:
        table = tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        raise _malformed(path, error.lineno, "it is not valid TOML", str(error)) from None
    except RecursionError:
        raise _malformed(path, 1, "it is not valid TOML", "it is nested too deeply") from None
    positions = Positions(text)
    known = ("concept", "pair", "template")
    for key in table:
        if key not in known:
            raise _malformed(path, positions.at((key,))[0], f"unknown key {key!r}", did_you_mean(key, known))
    concept = table.get("concept", "")
    if not isinstance(concept, str):
        raise _malformed(path, positions.at(("concept",))[0], "concept must be text", f"found {concept!r:.60}")
    rows: list[tuple[object, int]] = []
    for kind in ("pair", "template"):
        if not isinstance(table.get(kind, []), list):
            raise _malformed(path, positions.at((kind,))[0], f"{kind} must be a list of tables", f"write [[{kind}]]")
        for i, row in enumerate(table.get(kind, [])):
            line = positions.at((kind, i))[0]
            if isinstance(row, dict) and ("slots" in row) != (kind == "template"):
                raise _malformed(path, line, f"this is no [[{kind}]]", "a template has slots, a pair has none")
            rows.append((row, line))
    return _checked(path, rows, concept)


def _from_lines(path: Path, text: str) -> list[Pair]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would cut texts at U+2028 too
        if line.strip():
            try:
                rows.append((json.loads(line, object_pairs_hook=_table), number))
            except (ValueError, RecursionError) as error:
                raise _malformed(path, number, "the line is not a JSON table", str(error)) from None
    return _checked(path, rows, "")


def _table(items: Sequence[tuple[str, object]]) -> dict[str, object]:
    """A JSON table whose names are there once; null means "not given"."""
    names = [name for name, _ in items]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"the key {twice!r} is there twice")
    return {name: value for name, value in items if value is not None}


def _checked(path: Path, rows: Sequence[tuple[object, int]], concept: str) -> list[Pair]:
    """Pairs from rows with their line numbers; every key known, every needed one there, ids unique."""
    pairs: dict[str, Pair] = {}
    for row, line in rows:
        try:
            if not isinstance(row, dict):
                raise _Fault("a pair must be a table of names and values", f"found {row!r:.60}")
            for key in row:
                names = (*(f.name for f in fields(Pair)), "slots")
                if key not in names:
                    raise _Fault(f"unknown key {key!r}", did_you_mean(key, names))
            for made in _expanded(row):
                pair = _pair({"concept": concept, **made})
                if pair.id in pairs:
                    raise _Fault(f"the id {pair.id!r} is used twice", "ids must be unique")
                pairs[pair.id] = pair
        except _Fault as fault:
            raise _malformed(path, line, *fault.args) from None
    return list(pairs.values())


class _Fault(Exception):
    """What is wrong with a row, and its detail; the caller knows the line."""


def _expanded(row: dict[str, object]) -> list[dict[str, object]]:
    if "slots" not in row:
        return [row]
    try:
        return expand(row)
    except ValueError as error:
        raise _Fault("the template cannot be used", str(error)) from None


def _pair(row: Mapping[str, object]) -> Pair:
    """One pair from its checked keys."""
    values = dict(row)
    for f in fields(Pair):
        if f.name in values:
            values[f.name] = _typed(f.name, values[f.name])
    for key in _NEEDED:
        if not values.get(key):
            raise _Fault(f"a pair has no {key}", f"pair {row.get('id', '')!r}")
    pair = Pair(**values)  # type: ignore[arg-type]
    why = unfit(pair.clean, pair.corrupted, pair.spans or {})
    if why:
        raise _Fault(f"the spans of pair {pair.id!r} mark nothing", why)
    return pair


def _typed(key: str, value: object) -> object:
    """The value in the type that `Pair` has for it."""
    if key == "heldout":
        if not isinstance(value, bool):
            raise _Fault("heldout must be bool", f"found {value!r:.60}")
        return value
    if key == "spans":
        good = isinstance(value, dict) and all(isinstance(b, list) and len(b) == 2 for b in value.values())
        if not good:
            raise _Fault("spans must be a table: name = [text in clean, text in corrupted]", f"found {value!r:.60}")
        return {name: (_text(key, both[0]), _text(key, both[1])) for name, both in value.items()}  # type: ignore[union-attr]
    if key in ("answer", "wrong_answer") and isinstance(value, list):
        texts = [_text(key, text) for text in value]
        if len(set(texts)) != len(texts) or not all(texts):
            raise _Fault(f"{key} must be a list of different texts, none empty", f"found {value!r:.60}")
        return tuple(texts)
    return _text(key, value)


def _text(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise _Fault(f"{key} must be str", f"found {value!r:.60}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _Fault(f"{key} is no text", "it holds half of a surrogate pair") from None
    return value


def _malformed(path: Path, line: int, what: str, detail: str) -> ManifestError:
    return ManifestError(
        f"the pair file {path.name} is malformed: {what}",
        why=detail,
        fix=f"edit line {line} of {path}",
        where=f"{path}:{line}",
    )
