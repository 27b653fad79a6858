"""Corpora of numbers for the tests of `judge`: the real table of documents and made-up ones, null and planted."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from greatctl import manifest

BETWEEN, WORK, NOISE = 0.6, 0.3, 1.0  # standard deviations of authors, of works inside authors, of windows
COLUMNS = ("author", "character", "role", "era", "genre", "topic", "translated", "split", "matches", "hard")


@functools.cache
def real_table(windows: int = 6) -> tuple[dict, ...]:
    """Everything of the packaged manifest that can be fetched without hands, one row a window."""
    entries = [e for e in manifest.load(manifest.packaged_path()).entries if e.kind == "gutenberg"]
    rows = [{name: getattr(e, name) for name in COLUMNS} | {"work": e.id} for e in entries]
    return tuple(row for row in rows for _ in range(windows))


def made_up_table(seed: int) -> tuple[dict, ...]:
    """12 to 18 authors a side, one to three works, 8 to 40 windows each; era and genre lean towards one role."""
    rng = np.random.default_rng(seed)
    rows = []
    for role, lean in (("character", (0.4, 0.3, 0.2, 0.1)), ("control", (0.1, 0.2, 0.3, 0.4))):
        n = int(rng.integers(12, 19))
        for author in range(n):
            era = str(rng.choice(["18c", "19c", "20c", "17c"], p=lean))
            for work in range(int(rng.integers(1, 4))):
                row = {
                    "author": f"{role} {author}",
                    "role": role,
                    "era": era,
                    "genre": str(rng.choice(["letters", "memoir", "essay", "manual"], p=lean)),
                    "topic": str(rng.choice(["war", "state", "home", "science"], p=lean)),
                    "split": "heldout-author" if author < max(4, n // 3) else "train",
                    "work": f"{role} {author} {work}",
                }
                rows += [row] * int(rng.integers(8, 41))
    return tuple(rows)


def unequal_table(*, characters_have_much: bool) -> tuple[dict, ...]:
    """12 characters and 18 controls; one role has one work of 8 windows an author, the other three of 30."""
    much, little = (3, 30), (1, 8)
    sizes = {"character": (12, much if characters_have_much else little)}
    sizes["control"] = (18, little if characters_have_much else much)
    return tuple(
        {"author": f"{role} {author}", "work": f"{role} {author} {work}", "role": role}
        for role, (n, (works, windows)) in sizes.items()
        for author in range(n)
        for work in range(works)
        for _ in range(windows)
    )


def column(rows: Sequence[dict], name: str, value: object) -> np.ndarray:
    """1 where a row has the value [n_rows]."""
    return np.array([row[name] == value for row in rows], dtype=float)


def characters(rows: Sequence[dict]) -> np.ndarray:
    """1 where a row is a character's or the seed's [n_rows]."""
    return 1 - column(rows, "role", "control")


def null_corpus(rows: Sequence[dict], seed: int, n_latents: int = 20) -> np.ndarray:
    """Windows [n_rows, n_latents] with random effects of author and work, and nothing else."""
    rng = np.random.default_rng(seed)
    found = rng.normal(scale=NOISE, size=(len(rows), n_latents))
    for name, size in (("author", BETWEEN), ("work", WORK)):
        keys, place = np.unique([row[name] for row in rows], return_inverse=True)
        found += rng.normal(scale=size, size=(len(keys), n_latents))[place]
    return found


def sparse(x: np.ndarray) -> np.ndarray:
    """The same latents silent in about nine of ten windows."""
    return np.maximum(x - 1.5, 0)


def between_authors(rows: Sequence[dict]) -> float:
    """The standard deviation between authors' means in `null_corpus`, on average over authors."""
    works: dict[object, dict[object, int]] = {}
    for row in rows:
        of = works.setdefault(row["author"], {})
        of[row["work"]] = of.get(row["work"], 0) + 1
    noise = [sum(WORK**2 + NOISE**2 / n for n in of.values()) / len(of) ** 2 for of in works.values()]
    return float(np.sqrt(BETWEEN**2 + np.mean(noise)))
