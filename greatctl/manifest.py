"""sources.toml, typed: who is studied, which texts are read, and the defaults of each stage.

Whatever is wrong with the file is said once, in the same form: what, why, what to do, and `file:line:column`
of the key that is to blame. A manifest may come from a stranger, so size, encoding, ids and addresses are
checked before anything else happens; nothing here touches the network or writes a file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from . import toml_file
from .entries import NEEDS, Character, Entry, slug_problem, suggest_slug
from .errors import ManifestError, UsageError, did_you_mean
from .toml_positions import Path as KeyPath
from .toml_positions import Positions, shown

__all__ = ["MODEL", "STAGES", "Character", "Entry", "Manifest", "because", "load", "packaged_path"]

MODEL = "meta-llama/Meta-Llama-3-8B"
STAGES = ("fetch", "tokenize", "harvest", "train", "interpret", "patch", "report")
_ROLES = {"seed": "seed", "source": "character", "control": "control"}
_TABLES = (*STAGES, "steer")  # defaults of each command that reads the manifest
_LISTS = ("character", *_ROLES)
_OWN_TABLES = {"model": ("name",), "project": ("data_dir", "results_dir")}
_ENTRY_KEYS = (frozenset(Entry.model_fields) - {"extra", "role"}) | {"options"}
_T = TypeVar("_T")


class Manifest(BaseModel):
    """A checked manifest.

    Attributes:
        path: the file.
        characters: in file order.
        entries: seed, sources and controls, in that order and in file order within each.
        tables: the plain tables (one a stage, `model`, `project`) as written; absent ones are empty.
        digest: sha256 of the content; comments, layout and line ends do not change it.
    """

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    path: Path
    characters: list[Character]
    entries: list[Entry]
    tables: dict[str, dict[str, Any]]
    digest: str
    positions: Positions | None = Field(default=None, repr=False, exclude=True)
    places: dict[str, KeyPath] = Field(default_factory=dict, repr=False, exclude=True)

    @property
    def model_name(self) -> str:
        """`name` of `[model]`: what is read when neither a flag nor an earlier stage says otherwise."""
        return self.tables.get("model", {}).get("name", MODEL)

    def character(self, id: str) -> Character:
        """The character with this id. Raises UsageError with the nearest ids."""
        return _pick(id, {c.id: c for c in self.characters}, "character")

    def entry(self, id: str) -> Entry:
        """The seed, source or control with this id. Raises UsageError with the nearest ids."""
        return _pick(id, {e.id: e for e in self.entries}, "source")

    def select(
        self, characters: Iterable[str] = (), controls: Iterable[str] = (), sources: Iterable[str] = ()
    ) -> list[Entry]:
        """Entries of these characters (or the seed's unit), controls and ids; all when none is named.

        Raises:
            UsageError: an id is unknown; the nearest are named.
        """
        units = {c.id: c.id for c in self.characters}
        units |= {e.unit: e.unit for e in self.entries if e.role == "seed"}
        of_controls = {e.id: e.id for e in self.entries if e.role == "control"}
        people = {_pick(id, units, "character") for id in characters}
        ids = {_pick(id, of_controls, "control") for id in controls} | {self.entry(id).id for id in sources}
        if not people and not ids:
            return list(self.entries)
        return [e for e in self.entries if e.id in ids or (e.role != "control" and e.unit in people)]

    def where(self, *path: str | int) -> str:
        """`file:line:column` of a key or table (`manifest.where("train", "k")`)."""
        line, column = self.positions.at(path) if self.positions else (1, 1)
        return f"{self.path}:{line}:{column}"

    def where_of(self, id: str, key: str = "") -> str:
        """`file:line:column` of an entry or character, or of one of its keys."""
        return self.where(*self.places.get(id, ()), *([key] if key else []))


def packaged_path() -> Path:
    """The manifest that greatctl carries: inside the installed package, or at the top of a checkout."""
    here = Path(__file__).resolve().parent
    inside = here / "sources.toml"
    return inside if inside.is_file() else here.parent / "sources.toml"


def load(path: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        ManifestError: the file cannot be read, is not TOML, or says what cannot be; `where` has the place.
    """
    return _Check(toml_file.read(Path(path))).manifest()


def because(message: str) -> str:
    """A pydantic message in greatctl's words: why a value is wrong."""
    message = message.removeprefix("Value error, ")
    return message.replace("Input should be", "it must be").replace("String should", "it must")


def _pick(id: str, known: Mapping[str, _T], noun: str) -> _T:
    if id in known:
        return known[id]
    message = f"{noun} '{shown(id)}' is not in the manifest"
    raise UsageError(message, why=f"no {noun} has this id", fix=did_you_mean(id, known))


class _Check:
    """One pass over a parsed file, from the outside in: tables, ids, rows, and then what refers to what."""

    def __init__(self, file: toml_file.TomlFile) -> None:
        self.file = file
        self.data = file.data

    def manifest(self) -> Manifest:
        self._shapes()
        self._ids()
        characters = [self._row(Character, path, row) for path, row in self._rows("character")]
        places: dict[str, KeyPath] = {c.id: ("character", n) for n, c in enumerate(characters)}
        entries: list[Entry] = []
        for kind in _ROLES:
            for path, row in self._rows(kind):
                entries.append(self._entry(path, row))
                places[entries[-1].id] = path
        for entry in entries:
            self._references(entry, places[entry.id], {c.id for c in characters}, entries)
        tables = {name: dict(self.data.get(name, {})) for name in (*_TABLES, *_OWN_TABLES)}
        return Manifest(
            path=self.file.path, characters=characters, entries=entries, tables=tables, digest=self._digest(),
            positions=self.file.positions, places=places,
        )  # fmt: skip

    def _digest(self) -> str:
        text = json.dumps(self.data, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=str)
        return hashlib.sha256(text.encode("ascii")).hexdigest()

    def _fail(self, message: str, why: str, fix: str, *path: str | int) -> NoReturn:
        raise ManifestError(message, why=why, fix=fix, where=self.file.where(*path))

    def _rows(self, name: str) -> Iterator[tuple[KeyPath, dict[str, Any]]]:
        for number, row in enumerate(self.data.get(name, [])):
            yield (name, number), row

    def _shapes(self) -> None:
        """Known tables only, `[[…]]` and `[…]` where they belong, known keys in `[model]` and `[project]`."""
        known = (*_LISTS, *_TABLES, *_OWN_TABLES)
        for name, value in self.data.items():
            if name not in known:
                why = "a manifest has these tables: " + ", ".join(known)
                self._fail(f"unknown table or key '{shown(name)}'", why, did_you_mean(name, known), name)
            rows = isinstance(value, list) and all(isinstance(row, dict) for row in value)
            if name in _LISTS and not rows:
                self._fail(f"'{name}' must be a list of tables", "each is a row", f"write [[{name}]]", name)
            if name not in _LISTS and not isinstance(value, dict):
                self._fail(f"'{name}' must be one table", "it holds defaults", f"write [{name}]", name)
        for name, keys in _OWN_TABLES.items():
            for key, value in self.data.get(name, {}).items():
                if key not in keys:
                    message, why = (
                        f"unknown key '{shown(key)}' in [{name}]",
                        "its keys are " + ", ".join(keys),
                    )
                    self._fail(message, why, did_you_mean(key, keys), name, key)
                if not (isinstance(value, str) and value and value.isprintable()):
                    message = f"{key} = {shown(repr(value))} in [{name}]"
                    self._fail(message, "it must be text on one line", "give a string", name, key)

    def _ids(self) -> None:
        """No two ids alike, even after case folding: they name folders, and some file systems fold case."""
        seen: dict[str, KeyPath] = {}
        for table in _LISTS:
            for path, row in self._rows(table):
                id = row.get("id")
                if not isinstance(id, str):
                    continue
                first = seen.setdefault(id.casefold(), path)
                if first is not path:
                    lines = [self.file.positions.at((*p, "id"))[0] for p in (first, path)]
                    why = f"it stands on lines {lines[0]} and {lines[1]}; upper and lower case count as equal"
                    self._fail(f"id '{shown(id)}' is used twice", why, "change one of them", *path, "id")
        for path in seen.values():
            id = str(self.data[str(path[0])][path[1]]["id"])
            if problem := slug_problem(id):
                fix = f'try id = "{suggest_slug(id)}"'
                self._fail(f"'{shown(id)}' cannot be an id", problem, fix, *path, "id")

    def _row(self, model: type[_T], path: KeyPath, row: dict[str, Any], known: Iterable[str] = ()) -> _T:
        """One row as a model. Unknown keys are told first: a misspelt key is usually also a missing one."""
        known = set(known) or set(model.model_fields)  # type: ignore[attr-defined]
        label = f"{path[0]} '{shown(row['id'])}'" if isinstance(row.get("id"), str) else f"[[{path[0]}]]"
        for key in row:
            if key not in known:
                message, why = f"unknown key '{shown(key)}' in {label}", f"[[{path[0]}]] has no such key"
                self._fail(message, why, did_you_mean(key, known), *path, key)
        values = {("extra" if key == "options" else key): value for key, value in row.items()}
        if path[0] in _ROLES:
            values["role"] = _ROLES[str(path[0])]
        try:
            return model(**values)
        except ValidationError as error:
            self._invalid(error, path, row, label)

    def _invalid(self, error: ValidationError, path: KeyPath, row: dict[str, Any], label: str) -> NoReturn:
        problem = error.errors(include_url=False)[0]
        key = "options" if problem["loc"][0] == "extra" else str(problem["loc"][0])
        if problem["type"] == "missing":
            self._fail(f"{label} has no {key}", f"every [[{path[0]}]] needs one", f"add {key} = …", *path)
        why = because(problem["msg"])
        self._fail(f"{key} = {shown(repr(row.get(key)))} in {label}", why, f"mend {key}", *path, key)

    def _entry(self, path: KeyPath, row: dict[str, Any]) -> Entry:
        """An entry with what its table and its kind ask for beyond the types."""
        row = dict(row)
        if path[0] == "control":
            if row.get("role", "control") not in ("control", "hard"):
                why, fix = "a control's role is control or hard", "leave it out, or write hard = true"
                self._fail(f"role = {shown(repr(row['role']))}", why, fix, *path, "role")
            if row.pop("role", "control") == "hard":
                row["hard"] = True
            if "character" in row:
                why, fix = "a control belongs to no character", "name whom it is compared with in matches"
                self._fail("a control has the key 'character'", why, fix, *path, "character")
        elif path[0] == "seed":
            row.setdefault("character", row.get("id"))
        entry = self._row(Entry, path, row, _ENTRY_KEYS)
        need = NEEDS.get(entry.kind)
        if need and not getattr(entry, need):
            why = f"a text of kind {entry.kind} cannot be found without it"
            self._fail(f"{path[0]} '{entry.id}' has no {need}", why, f"add {need} = …", *path)
        return entry

    def _references(self, entry: Entry, path: KeyPath, characters: set[str], entries: list[Entry]) -> None:
        """A source's character and a control's matches must exist."""
        if entry.role == "character" and entry.character is None:
            message, fix = f"source '{entry.id}' has no character", "add character = …"
            self._fail(message, "every [[source]] needs one", fix, *path)
        if entry.role == "character" and entry.character not in characters:
            fix = did_you_mean(str(entry.character), characters)
            message = f"source '{entry.id}' names an unknown character '{shown(entry.character)}'"
            self._fail(message, "no [[character]] has this id", fix, *path, "character")
        if entry.role == "seed" and (problem := slug_problem(str(entry.character))):
            message = f"'{shown(entry.character)}' cannot be an id"
            self._fail(message, problem, f"try {suggest_slug(str(entry.character))!r}", *path, "character")
        known = characters | {e.id for e in entries} | {e.unit for e in entries if e.role == "seed"}
        for name in entry.matches:
            if name not in known:
                message, why = f"'{entry.id}' matches an unknown '{shown(name)}'", "nothing here has this id"
                self._fail(message, why, did_you_mean(name, known), *path, "matches")
