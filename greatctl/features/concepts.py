"""Concepts: which texts should show a thing, and which should not.

A concept is a written-down contrast: documents that show it, documents that do not, hard controls that share the
subject and not the thing itself, prompt pairs for the causal half, and words whose latents would be words. Three come
with greatctl (`greatness`, `ambition`, `composure`); others are TOML files of the same form:

    name = "patience"
    description = "waiting well"
    pairs = "composure"                  # a bundled set, or a pair file beside this one; may be left out
    leave_out = ["patience", "patient"]  # may be left out

    [positive]
    character = ["darwin"]               # any of role, character, source, kind; a document in any of them is taken
    [control]
    role = ["control"]
    [hard_control]                       # may be left out
    character = ["tolstoy"]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from ..errors import ManifestError, UsageError, did_you_mean
from ..store.files import canonical_json, sha256_bytes
from ..toml_file import TomlFile, read

__all__ = ["BUNDLED", "Concept", "Selection", "concepts_named", "read_concept", "select"]

BUNDLED = ("greatness", "ambition", "composure")
_FOLDER = Path(__file__).resolve().parent / "concept_files"
_COLUMNS = {"role": "role", "character": "character", "source": "source_id", "kind": "kind"}
_ROLES = ("character", "seed", "control", "text")
_TEXTS = ("name", "description", "pairs")
_SIDES = ("positive", "control", "hard_control")
_KEYS = (*_TEXTS, "leave_out", *_SIDES)

Side = Literal["positive", "control", "hard"]


@dataclass(frozen=True)
class Selection:
    """Documents by column: those whose value is listed under any column are selected."""

    by: Mapping[str, tuple[str, ...]]

    def __contains__(self, document: object) -> bool:
        assert isinstance(document, Mapping)
        return any(str(document.get(_COLUMNS[key])) in values for key, values in self.by.items())


@dataclass(frozen=True)
class Concept:
    """A contrast that was written down.

    Attributes:
        positive, control, hard_control: which documents stand on which side; a document named as hard control is one
            even where `control` names it too. A positive document that is also a control is left out.
        pairs: name of a bundled pair set or path of a pair file, "" for none.
        leave_out: words, lower case; a latent that fires mostly on them is a word and no candidate.
        path: the file that it was read from.
    """

    name: str
    description: str
    positive: Selection
    control: Selection
    hard_control: Selection
    pairs: str = ""
    leave_out: tuple[str, ...] = ()
    path: Path | None = None

    @property
    def digest(self) -> str:
        """What the concept says, as one hash: not where its file lies."""
        sides = {side: {k: list(v) for k, v in getattr(self, side).by.items()} for side in _SIDES}
        pairs = Path(self.pairs).read_text(encoding="utf-8") if Path(self.pairs).suffix else self.pairs
        said = {"name": self.name, "pairs": pairs, "leave_out": list(self.leave_out), **sides}
        return sha256_bytes(canonical_json(said).encode())


def concepts_named(names: Sequence[str]) -> list[Concept]:
    """The concepts that a person asks for: bundled names, paths of TOML files, or `all` for all bundled ones.

    Raises:
        UsageError: an unknown name, or two concepts of one name.
        ManifestError: a file is missing or malformed; names file, line and column.
    """
    found: dict[str, Concept] = {}
    wanted = [one for name in names for one in (BUNDLED if name == "all" else (name,))]
    for name in dict.fromkeys(wanted):
        is_path = name.endswith(".toml") or "/" in name
        if not is_path and name not in BUNDLED:
            raise UsageError(
                f"the concept {name!r} is not defined",
                why="a concept needs texts that show it and texts that do not: a bundled name, or a .toml file",
                fix=did_you_mean(name, BUNDLED),
            )
        concept = read_concept(Path(name).expanduser() if is_path else _FOLDER / f"{name}.toml")
        if concept.name in found:
            raise UsageError(
                f"two concepts are called {concept.name!r}",
                why="tables tell concepts apart by name",
                fix=f"change `name` in {concept.path}",
            )
        found[concept.name] = concept
    return list(found.values())


def read_concept(path: Path) -> Concept:
    """Read a concept file.

    Raises:
        ManifestError: it is missing, no TOML, or a key is unknown, missing or of the wrong type; `where` is
            file:line:column.
    """
    file = read(path)
    for key in file.data:
        if key not in _KEYS:
            _malformed(file, (key,), f"unknown key {key!r}", "a concept has other keys", did_you_mean(key, _KEYS))
    texts = {key: file.data.get(key, "") for key in _TEXTS}
    for key, value in texts.items():
        if not isinstance(value, str):
            _malformed(file, (key,), f"{key} must be text", f"found {value!r:.60}", f'write {key} = "…"')
    if not texts["name"].strip():
        _malformed(file, ("name",), "a concept needs a name", "tables tell concepts apart by it", 'add name = "…"')
    sides = {side: _selection(file, side) for side in _SIDES}
    words = _texts(file, ("leave_out",), file.data.get("leave_out", []))
    pairs = _pairs(file, texts["pairs"])
    return Concept(
        texts["name"].strip(),
        texts["description"],
        **sides,
        pairs=pairs,
        leave_out=tuple(word.lower() for word in words),
        path=path,
    )


def _selection(file: TomlFile, side: str) -> Selection:
    table = file.data.get(side, {})
    if not isinstance(table, dict):
        _malformed(file, (side,), f"{side} must be a table", f"found {table!r:.60}", f"write [{side}] and lists below")
    for key in table:
        if key not in _COLUMNS:
            fix = did_you_mean(key, _COLUMNS)
            _malformed(file, (side, key), f"unknown key {key!r} in [{side}]", "documents are not chosen by it", fix)
    by = {key: tuple(_texts(file, (side, key), values)) for key, values in table.items()}
    for role in by.get("role", ()):
        if role not in _ROLES:
            _malformed(file, (side, "role"), f"unknown role {role!r}", "no document has it", did_you_mean(role, _ROLES))
    if side != "hard_control" and not any(by.values()):
        fix = f'add [{side}] with one of {", ".join(_COLUMNS)}, as in role = ["control"]'
        _malformed(file, (side,), f"{side} names no documents", "a contrast needs two sides", fix)
    return Selection(by)


def _texts(file: TomlFile, at: tuple[str, ...], values: object) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        _malformed(file, at, f"{at[-1]} must be a list of texts", f"found {values!r:.60}", f'write {at[-1]} = ["…"]')
    return values


def _pairs(file: TomlFile, name: str) -> str:
    """A bundled name as it is; a file beside the concept as an absolute path."""
    if not name or name in BUNDLED:
        return name
    path = file.path.absolute().parent / Path(name).expanduser()
    if not path.is_file():
        fix = f"use one of {', '.join(BUNDLED)}, or the path of a pair file"
        _malformed(file, ("pairs",), f"there are no pairs {name!r}", f"{path} is not a file", fix)
    return str(path)


def _malformed(file: TomlFile, at: tuple[str, ...], message: str, why: str, fix: str) -> NoReturn:
    where = file.where(*at)
    line = where.removeprefix(f"{file.path}:").split(":")[0]
    raise ManifestError(f"{file.path.name}, line {line}: {message}", why=why, fix=fix, where=where)


def select(concept: Concept, documents: Sequence[Mapping[str, object]]) -> list[Side | None]:
    """The side of each document; None where the concept says nothing of it, or contradicts itself."""
    return [_side(concept, document) for document in documents]


def _side(concept: Concept, document: Mapping[str, object]) -> Side | None:
    positive, hard = document in concept.positive, document in concept.hard_control
    control = document in concept.control
    if positive:
        return None if control or hard else "positive"
    # a control that its manifest calls hard is hard for every concept that uses it
    if hard or (control and document.get("hard") is True):
        return "hard"
    return "control" if control else None
