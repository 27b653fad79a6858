"""What a manifest lists: characters, and the entries (seed, sources, controls) whose texts are read.

Ids become folder names, so they are plain slugs: nothing that a file system, a shell or a reader could take
for another thing. Values are strict: `pg = "1228"` is an error and not a guess.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from .urls import url_problem

__all__ = ["NEEDS", "Character", "Entry", "slug_problem", "suggest_slug"]

NEEDS = {"gutenberg": "pg", "archive": "ia", "manual": "where"}
"""The key that a kind cannot do without. Kinds of plugins check their own under `options`."""

_SLUG = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?")
_RESERVED = re.compile(r"con|prn|aux|nul|com[0-9]|lpt[0-9]")
_SLUG_LIMIT = 64


def slug_problem(text: str) -> str | None:
    """Why `text` cannot be an id, or None when it can."""
    if not text:
        return "an id must not be empty"
    if len(text) > _SLUG_LIMIT:
        return f"an id has at most {_SLUG_LIMIT} characters, and this one has {len(text)}"
    if not _SLUG.fullmatch(text):
        return "an id names a folder: only a-z, 0-9 and inner hyphens are allowed"
    if _RESERVED.fullmatch(text):
        return "this is a device name on Windows and cannot be a folder there"
    return None


def suggest_slug(text: str) -> str:
    """The valid id nearest to `text`."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii").lower()
    slug = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:_SLUG_LIMIT].rstrip("-")
    return slug if slug and not _RESERVED.fullmatch(slug) else f"work-{slug}".rstrip("-")


def _slug(text: str) -> str:
    if problem := slug_problem(text):
        raise ValueError(f"{problem}; try {suggest_slug(text)!r}")
    return text


def _url(text: str) -> str:
    if problem := url_problem(text):
        raise ValueError(problem)
    return text


def _inside(text: str) -> str:
    if "\\" in text or not text.isprintable() or any(part in (".", "..") for part in text.split("/")):
        raise ValueError("a path must stay inside its server: no '.', '..', backslash or invisible character")
    return text


def _options(options: dict[str, Any]) -> dict[str, Any]:
    """Addresses that plugins are handed keep the same rules as `url`."""
    for key, value in options.items():
        if isinstance(value, str) and "://" in value and (problem := url_problem(value)):
            raise ValueError(f"options.{key}: {problem}")
    return options


Slug = Annotated[str, AfterValidator(_slug)]
Url = Annotated[str, AfterValidator(_url)]
ServerPath = Annotated[str, AfterValidator(_inside)]


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Character(_Row):
    """One of the people whose greatness is asked about; `died` is None for the living."""

    id: Slug
    name: str = Field(min_length=1)
    born: int | None = None
    died: int | None = None
    why: str = ""


class Entry(_Row):
    """One work: where its text comes from, whose it is, and what it is compared with.

    Attributes:
        role: `seed`, `character` or `control`, after the table that it stands in.
        character: a character's id, the seed's own unit, None for controls.
        year: when it was written (the middle year of a span); absent, the first year in `first_published`.
        own_bytes: size of the author's own text in bytes, once counted.
        tokens_llama3: size of the whole text in tokens of Llama 3, once counted.
        text_from, text_to: the author's text runs from the nth line that begins with one (`text_from_nth`)
            up to, and not with, the nth line that begins with the other (`text_to_nth`).
        matches: ids of the sources or characters that a control is compared with.
        hard: a control that shares the praise, the names or the vocabulary, and not the voice.
        extra: the `options` table, for kinds that plugins bring.
    """

    id: Slug
    kind: Slug
    role: Literal["seed", "character", "control"]
    character: str | None = None
    title: str = Field(min_length=1)
    author: str = Field(min_length=1)
    year: int | None = Field(default=None, ge=-3000, le=2200)
    first_published: str = ""
    edition: str = ""
    edition_year: str = ""
    rights: str = ""
    rights_note: str = ""
    why: str = ""
    what: str = ""
    confound: str = ""
    contamination: str = ""
    url: Url | None = None
    pg: int | None = Field(default=None, ge=1, le=10_000_000)
    ia: ServerPath | None = None
    file: ServerPath | None = None
    fallback: str = ""
    mirror_path: ServerPath | None = None
    bytes: int | None = Field(default=None, ge=0)
    bytes_estimate: int | None = Field(default=None, ge=0)
    encoding: str = ""
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    own_bytes: int | None = Field(default=None, ge=0)
    tokens_llama3: int | None = Field(default=None, ge=0)
    text_from: str | None = Field(default=None, min_length=1)
    text_from_nth: int = Field(default=1, ge=1)
    text_to: str | None = Field(default=None, min_length=1)
    text_to_nth: int = Field(default=1, ge=1)
    where: str = ""
    era: str = ""
    genre: str = ""
    topic: str = ""
    translated: bool = False
    split: Literal["train", "heldout-work", "heldout-author"] = "train"
    matches: list[str] = Field(default_factory=list)
    hard: bool = False
    verified: bool | None = None
    verified_how: str = ""
    extra: Annotated[dict[str, Any], AfterValidator(_options)] = Field(default_factory=dict)

    @property
    def unit(self) -> str:
        """The author as the unit of statistics: a character's id, the seed's unit, a control's own id."""
        return self.character or self.id

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, row: dict[str, Any]) -> dict[str, Any]:
        """Fill in what follows from other keys: the year, the century, the address of a Gutenberg text."""
        row = dict(row)
        published = row.get("first_published")
        if "year" not in row and isinstance(published, str) and (found := re.search(r"\d{4}", published)):
            row["year"] = int(found.group())
        if "era" not in row and isinstance(row.get("year"), int):
            row["era"] = f"{(row['year'] - 1) // 100 + 1}c"
        if row.get("kind") == "gutenberg" and "url" not in row and isinstance(row.get("pg"), int):
            row["url"] = f"https://www.gutenberg.org/cache/epub/{row['pg']}/pg{row['pg']}.txt"
        return row
