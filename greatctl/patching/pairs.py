"""Prompt pairs: a clean prompt, a corrupted one of the same length, and the answers that tell them apart.

A pair file is TOML (`concept = "…"` and one `[[pair]]` table each) or JSON lines (one pair a line). Whether
a pair can be patched depends on the tokenizer in use: position 7 of both prompts must be the same place,
and each answer must be one token. What does not fit is refused and listed with its reason; nothing is
padded, cut or guessed. Answers are tokenised after their prompt, because " great" alone and " great" after
a word need not be the same token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import tomli

from ..errors import InputError, ManifestError, did_you_mean
from ..toml_positions import Positions

__all__ = ["EncodedPair", "Pair", "Refusal", "encode_pairs", "read_pairs"]

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Pair:
    """One pair of prompts.

    Attributes:
        id: unique in its file.
        clean: the prompt after which `answer` is the right continuation.
        corrupted: its counterpart, of as many tokens.
        answer: text of one token after `clean`, leading space included.
        wrong_answer: the token that `corrupted` calls for.
        heldout: kept apart from exploration.
        why: what the pair tests, in words.
        concept: the file's concept.
    """

    id: str
    clean: str
    corrupted: str
    answer: str
    wrong_answer: str
    heldout: bool = False
    why: str = ""
    concept: str = ""


@dataclass(frozen=True)
class EncodedPair:
    """A pair that can be patched: two prompts of equal length, BOS first, and one id an answer."""

    pair: Pair
    clean_ids: tuple[int, ...]
    corrupted_ids: tuple[int, ...]
    answer_id: int
    wrong_answer_id: int

    @property
    def length(self) -> int:
        """Tokens of either prompt, BOS included."""
        return len(self.clean_ids)

    @property
    def first_difference(self) -> int:
        """The first position whose tokens differ."""
        both = zip(self.clean_ids, self.corrupted_ids, strict=True)
        return next(i for i, (a, b) in enumerate(both) if a != b)


@dataclass(frozen=True)
class Refusal:
    """A pair that was not executed, and why."""

    pair: Pair
    reason: str


def read_pairs(path: Path) -> list[Pair]:
    """Read a pair file (`.toml`, or JSON lines with any other ending).

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
        raise _malformed(path, 1, "it is not UTF-8", str(error)) from None
    pairs = _from_toml(path, text) if path.suffix == ".toml" else _from_lines(path, text)
    if not pairs:
        raise InputError(
            f"the pair file {path} holds no pair",
            why="it has no [[pair]] table",
            fix="add one",
            where=str(path),
        )
    return pairs


def encode_pairs(
    pairs: Sequence[Pair], encode: Encode, *, n_ctx: int | None = None
) -> tuple[list[EncodedPair], list[Refusal]]:
    """Encode every pair, or say why it cannot be used; the order of `pairs` is kept in both lists.

    Args:
        pairs: the pairs.
        encode: text -> token ids with exactly one BOS in front.
        n_ctx: the model's context; longer prompts are refused.
    """
    encoded: list[EncodedPair] = []
    refused: list[Refusal] = []
    for pair in pairs:
        result = _encode(pair, encode, n_ctx)
        if isinstance(result, str):
            refused.append(Refusal(pair, result))
        else:
            encoded.append(result)
    return encoded, refused


def _encode(pair: Pair, encode: Encode, n_ctx: int | None) -> EncodedPair | str:
    clean, corrupted = tuple(encode(pair.clean)), tuple(encode(pair.corrupted))
    if len(clean) != len(corrupted):
        return f"unequal lengths: the clean prompt has {len(clean)} tokens, the corrupted one {len(corrupted)}"
    if clean == corrupted:
        return "the clean and the corrupted prompt are the same tokens"
    if n_ctx is not None and len(clean) > n_ctx:
        return f"{len(clean)} tokens do not fit into the model's context of {n_ctx}"
    found: dict[str, int] = {}
    for name, word in (("answer", pair.answer), ("wrong answer", pair.wrong_answer)):
        after_clean = _continuation(clean, tuple(encode(pair.clean + word)))
        after_corrupted = _continuation(corrupted, tuple(encode(pair.corrupted + word)))
        if after_clean is None or after_corrupted is None:
            return f"the {name} {word!r} merges with the end of the prompt (does the prompt end in a space?)"
        if len(after_clean) != 1 or len(after_corrupted) != 1:
            return f"the {name} {word!r} is {max(len(after_clean), len(after_corrupted))} tokens, not one"
        if after_clean != after_corrupted:
            return f"the {name} {word!r} is another token after the corrupted prompt"
        found[name] = after_clean[0]
    if found["answer"] == found["wrong answer"]:
        return f"both answers are token {found['answer']}"
    return EncodedPair(pair, clean, corrupted, found["answer"], found["wrong answer"])


def _continuation(prompt: tuple[int, ...], whole: tuple[int, ...]) -> tuple[int, ...] | None:
    """What follows `prompt` in `whole`, or None where `whole` does not begin with it."""
    return whole[len(prompt) :] if whole[: len(prompt)] == prompt else None


def _from_toml(path: Path, text: str) -> list[Pair]:
    try:
        table = tomli.loads(text.replace("\r\n", "\n"))
    except tomli.TOMLDecodeError as error:
        raise _malformed(path, error.lineno, "it is not valid TOML", str(error)) from None
    positions = Positions(text.replace("\r\n", "\n"))
    for key in table:
        if key not in ("concept", "pair"):
            line = positions.at((key,))[0]
            raise _malformed(path, line, f"unknown key {key!r}", did_you_mean(key, ("concept", "pair")))
    concept, rows = table.get("concept", ""), table.get("pair", [])
    if not isinstance(concept, str) or not isinstance(rows, list):
        raise _malformed(path, 1, "concept must be text and pair a list of tables", "write [[pair]]")
    return _checked(path, [(row, positions.at(("pair", i))[0]) for i, row in enumerate(rows)], concept)


def _from_lines(path: Path, text: str) -> list[Pair]:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append((json.loads(line), number))
            except (ValueError, RecursionError) as error:
                raise _malformed(path, number, "the line is not JSON", str(error)) from None
    return _checked(path, rows, "")


def _checked(path: Path, rows: Sequence[tuple[object, int]], concept: str) -> list[Pair]:
    """Pairs from rows with their line numbers; every key known, every needed one there, ids unique."""
    known = {f.name: str(f.type) for f in fields(Pair)}
    pairs: dict[str, Pair] = {}
    for row, line in rows:
        if not isinstance(row, dict):
            raise _malformed(path, line, "a pair must be a table of names and values", f"found {row!r:.60}")
        for key, value in row.items():
            if key not in known:
                raise _malformed(path, line, f"unknown key {key!r}", did_you_mean(key, known))
            if type(value).__name__ != known[key]:
                raise _malformed(path, line, f"{key} must be {known[key]}", f"found {value!r:.60}")
        for key in ("id", "clean", "corrupted", "answer", "wrong_answer"):
            if not row.get(key):
                raise _malformed(path, line, f"a pair has no {key}", f"pair {row.get('id', '')!r}")
        if row["id"] in pairs:
            raise _malformed(path, line, f"the id {row['id']!r} is used twice", "ids must be unique")
        pairs[row["id"]] = Pair(**{"concept": concept, **row})
    return list(pairs.values())


def _malformed(path: Path, line: int, what: str, detail: str) -> ManifestError:
    return ManifestError(
        f"the pair file {path.name} is malformed: {what}",
        why=detail,
        fix=f"edit line {line} of {path}",
        where=f"{path}:{line}",
    )
