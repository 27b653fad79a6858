"""The bundled reference: a small model that has read the books, sample texts to interpret, and pairs to
patch.

This is what `bundled` means as a model name. Nothing here loads a model; this module only knows where the
files are, so that it can be imported for nothing. `greatctl.reference.build` is the program that made the
model.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from greatctl.errors import UsageError, nearest

__all__ = ["PAIR_SETS", "SampleText", "model_dir", "pairs_path", "texts", "texts_dir"]

PAIR_SETS = ("greatness", "composure", "ambition")
_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class SampleText:
    """One of the texts written for this project: whom it is about, its labels, and where it lies."""

    id: str
    subject: str
    role: str
    era: str
    topic: str
    genre: str
    split: str
    path: Path


def model_dir() -> Path:
    """The folder of the bundled model and its tokenizer, for `from_pretrained`."""
    return _HERE / "model"


def texts_dir() -> Path:
    """The folder of the sample texts, with `texts.toml` that labels them."""
    return _HERE / "texts"


def texts() -> list[SampleText]:
    """The sample texts in the order of `texts.toml`; paths are absolute."""
    folder = texts_dir()
    rows = tomllib.loads((folder / "texts.toml").read_text(encoding="utf-8"))["text"]
    return [SampleText(**row, path=folder / f"{row['id']}.txt") for row in rows]


def pairs_path(name: str) -> Path:
    """The TOML file of one bundled set of prompt pairs; an unknown name is a `UsageError` with the nearest
    names.
    """
    if name not in PAIR_SETS:
        raise UsageError(
            f"no bundled pairs are called {name!r}",
            why=f"there are {', '.join(PAIR_SETS)}",
            fix=f"nearest: {', '.join(nearest(name, PAIR_SETS)) or PAIR_SETS[0]}",
        )
    return _HERE / "pairs" / f"{name}.toml"
