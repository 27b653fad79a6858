"""What `tokenize` reads: the works of the manifest that are on disk, or a folder of text files from elsewhere.

Both are a number of parts, one a work or a file, that know what pins their content.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..errors import InputError
from ..store.artifact import Artifact, load
from ..store.files import canonical_json, sha256_bytes
from .context import Context
from .models import slug

if TYPE_CHECKING:
    from ..corpus.overlap import Leak
    from ..corpus.parts import Part, Text
    from ..corpus.texts import TextFile
    from ..manifest import Entry

__all__ = ["Corpus", "Files", "Works", "files_in", "works_on_disk"]

_FACTS = ("character", "author", "role", "era", "genre", "topic", "translated", "split", "year", "unit")
_FACTS += ("confound", "hard")


class Corpus(Protocol):
    """Parts of text."""

    @property
    def label(self) -> str:
        """A word for the folder's name; empty for everything that is on disk."""
        ...

    @property
    def identity(self) -> Mapping[str, object]:
        """What pins the content, besides `inputs`."""
        ...

    @property
    def inputs(self) -> Mapping[str, str]:
        """Fingerprints of the artifacts that are read."""
        ...

    def sizes(self) -> list[int]:
        """Bytes of each part."""
        ...

    def leaks(self) -> list[Leak]:
        """What later works repeat of earlier ones, word for word."""
        ...

    def parts(self, numbers: Sequence[int], leaks: Sequence[Leak]) -> Iterator[Part]:
        """Those parts, read when it is their turn, without the passages of `leaks`."""
        ...

    def stems(self) -> Mapping[str, str]:
        """source id -> how its exports are named."""
        ...


@dataclass(frozen=True)
class Works:
    """Manifest entries with their sealed texts, in manifest order."""

    works: Sequence[tuple[Entry, Artifact]]
    characters: Sequence[str]

    @property
    def label(self) -> str:
        """The characters, where not all are read."""
        subset = "-".join(sorted(self.characters))
        return subset if len(subset) <= 60 else sha256_bytes(subset.encode())[:12]

    @property
    def identity(self) -> Mapping[str, object]:
        """Which characters, and what the manifest says of each work."""
        rows = {e.id: sha256_bytes(canonical_json(_facts(e)).encode())[:16] for e, _ in self.works}
        return {"character": sorted(self.characters), "documents": rows}

    @property
    def inputs(self) -> Mapping[str, str]:
        """Fingerprints of the texts."""
        return {entry.id: artifact.fingerprint for entry, artifact in self.works}

    def sizes(self) -> list[int]:
        """Bytes of each clean text."""
        return [next(int(row["bytes"]) for row in a.outputs if row["path"] == "text.txt") for _, a in self.works]

    def leaks(self) -> list[Leak]:
        """Passages of 13 words and more that an earlier work has already."""
        from ..corpus.overlap import leaks

        return leaks({entry.id: _text(artifact) for entry, artifact in self.works})

    def parts(self, numbers: Sequence[int], leaks: Sequence[Leak]) -> Iterator[Part]:
        """One document a part."""
        from ..corpus.parts import Part

        for number in numbers:
            entry, artifact = self.works[number]
            without = [span for leak in leaks if leak.loser == entry.id for span in leak.spans]
            yield Part(number, _documents(entry, artifact, without))

    def stems(self) -> Mapping[str, str]:
        """`gutenberg_17976`, or the id."""
        return {e.id: f"gutenberg_{e.pg}" if e.pg else e.id.replace("-", "_") for e, _ in self.works}


@dataclass(frozen=True)
class Files:
    """Files of a folder from elsewhere."""

    folder: Path
    files: list[TextFile]

    @property
    def label(self) -> str:
        """The folder's name."""
        return slug(self.folder.absolute().name)

    @property
    def identity(self) -> Mapping[str, object]:
        """A thumbprint of each file."""
        from ..corpus.texts import thumbprint

        return {"texts": thumbprint(self.files)}

    @property
    def inputs(self) -> Mapping[str, str]:
        """None: the files are no artifacts."""
        return {}

    def sizes(self) -> list[int]:
        """Bytes of each file, packed as it is."""
        return [file.path.stat().st_size for file in self.files]

    def leaks(self) -> list[Leak]:
        """None are looked for: that takes all texts in memory at once."""
        return []

    def parts(self, numbers: Sequence[int], leaks: Sequence[Leak]) -> Iterator[Part]:
        """One file a part."""
        from ..corpus.parts import Part
        from ..corpus.texts import read

        return (Part(number, read(self.files[number])) for number in numbers)

    def stems(self) -> Mapping[str, str]:
        """Each source is named by its id, the file's name."""
        return {}


def works_on_disk(ctx: Context, characters: Sequence[str]) -> Works:
    """Manifest entries that are on disk, each checked against its hashes.

    Raises:
        InputError: there is none.
        IntegrityError: a text is damaged.
    """
    manifest = ctx.project.manifest
    entries = manifest.select(characters=tuple(characters)) if characters else manifest.entries
    folders = [(entry, ctx.project.raw / entry.id) for entry in entries]
    found = [(entry, load(folder).check()) for entry, folder in folders if (folder / "artifact.json").exists()]
    if not found:
        what = f" of {', '.join(characters)}" if characters else ""
        flags = "".join(f" --character {c}" for c in characters)
        raise InputError(
            f"no text{what} is on disk",
            why=f"{ctx.project.raw} holds no finished source{what}",
            fix=f"run `greatctl fetch{flags}` first",
        )
    return Works(found, characters)


def files_in(folder: str) -> Files:
    """The text files of a folder.

    Raises:
        InputError: there is no such folder, or none in it.
    """
    from ..corpus.texts import find

    path = Path(folder).expanduser()
    return Files(path, find(path))


def _documents(entry: Entry, artifact: Artifact, without: Sequence[tuple[int, int]]) -> Iterable[Text]:
    from ..corpus.parts import Text

    yield Text(_facts(entry), _text(artifact), without)


def _text(artifact: Artifact) -> str:
    return (artifact.path / "text.txt").read_text(encoding="utf-8")


def _facts(entry: Entry) -> dict[str, object]:
    """The document's row: what the manifest knows of it (a control has no character)."""
    known = {key: getattr(entry, key) for key in _FACTS}
    return {"source_id": entry.id, "work": entry.title, **known, "matches": ", ".join(entry.matches)}
