"""Folders of sharded text from elsewhere, read through `datasets`: what a corpus beyond the manifest looks like.

    texts/00000.parquet texts/00001.jsonl.gz texts/notes.txt …

Each file is one part. A row is a document; its text is the column `text`, and columns with the name of something that
the manifest knows of a work (author, role, era, split, …) are taken along. A .txt file is one document.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from .parts import FACTS, Text

__all__ = ["TextFile", "find", "read", "thumbprint"]

_FORMS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "txt"}
_PACKED = (".gz", ".zst", ".xz", ".bz2")
_ROWS = 1000
_BLOCK, _BLOCKS = 1 << 16, 64


@dataclass(frozen=True)
class TextFile:
    """One file of a folder: its name without endings, and its form."""

    path: Path
    form: str

    @property
    def name(self) -> str:
        """The file's name without its endings."""
        return self.path.name.split(".")[0] or self.path.name


def find(folder: Path) -> list[TextFile]:
    """The text files below `folder`, by path.

    Raises:
        InputError: there is no such folder, or no file in it that can be read.
    """
    found = []
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        endings = [s.lower() for s in path.suffixes]
        if endings and endings[-1] in _PACKED and path.suffix != ".txt":
            endings.pop()
        form = _FORMS.get(endings[-1]) if endings else None
        if form and path.is_file() and not path.name.startswith((".", "_")) and path.name != "dataset_info.json":
            found.append(TextFile(path, form))
    if not found:
        raise InputError(
            f"{folder} holds no text files",
            why="looked for " + ", ".join(sorted(_FORMS)) + (" in it" if folder.is_dir() else "; it is no folder"),
            fix="name a folder of Parquet, Arrow, JSON lines, CSV or text files",
            where=str(folder),
        )
    return [file for file in found if file.path.name != "state.json"]


def read(file: TextFile) -> Iterator[Text]:
    """The documents of a file, in order, a thousand rows in memory at a time.

    Raises:
        InputError: it cannot be read, or has no column `text`.
    """
    if file.form == "txt":
        yield Text(_facts(file, {}), _clean(file.path.read_bytes().decode("utf-8", "replace")))
        return
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        rows = datasets.load_dataset(file.form, data_files=str(file.path), split="train", streaming=True)
        for batch in rows.iter(batch_size=_ROWS):
            names = list(batch)
            if "text" not in names:
                raise InputError(f"{file.path} has no column `text`", why=f"its columns are {', '.join(names)}")
            for values in zip(*batch.values(), strict=True):
                row = dict(zip(names, values, strict=True))
                yield Text(_facts(file, row), _clean(str(row["text"] or "")))
    except (OSError, ValueError, DatasetsError) as error:
        raise InputError(
            f"{file.path} cannot be read", why=str(error).splitlines()[0][:200], where=str(file.path)
        ) from error


def thumbprint(files: list[TextFile]) -> dict[str, str]:
    """File name -> what stands for its content: its size and a hash over 64 blocks spread evenly.

    (Hashing all of 50 GB at every start would cost minutes; an edit that keeps the size and touches none of the blocks
    goes unseen, and `--force` is for that.)
    """
    found = {}
    for file in files:
        size = file.path.stat().st_size
        total = hashlib.sha256(str(size).encode())
        with file.path.open("rb") as stream:
            for number in range(_BLOCKS):
                stream.seek(max(0, size - _BLOCK) * number // (_BLOCKS - 1))
                total.update(stream.read(_BLOCK))
                if size <= _BLOCK:
                    break
        found[file.path.name] = total.hexdigest()
    return found


def _facts(file: TextFile, row: dict) -> dict[str, object]:
    """What the row says of itself; the file's name where it says nothing."""
    known: dict[str, object] = {"source_id": file.name, "unit": file.name, "work": file.name}
    known |= {"role": "text", "split": "train", "translated": False, "hard": False}
    casts = {"string": str, "bool": bool, "int64": int}
    for field in FACTS:
        if row.get(field.name) is not None:
            known[field.name] = casts[str(field.type)](row[field.name])
    return known


def _clean(text: str) -> str:
    """Without lone surrogates, which JSON may hold and no tokenizer reads."""
    return text.encode("utf-8", "replace").decode("utf-8")
