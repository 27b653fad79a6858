"""How large a difference between the roles must be before `judge` supports it, over the real table of documents.

    python tests/benchmarks/power.py [--corpora 50] [--latents 100] [--table "real table"]

The other tables are made up: one with all that makes authors differ, and two of sparse latents in which one role has a
tenth of the other's text. Prints the share of corpora in which a planted latent is supported, by size of the effect
(standard deviations between authors' means), beside what the test alone would give; the other verdicts that took it
away; and how many null corpora contain a supported latent (at most 16 of 200 are allowed).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from judge_tables import (
    between_authors,
    characters,
    made_up_table,
    null_corpus,
    real_table,
    sparse,
    unequal_table,
)

from greatctl.features import judge

EFFECTS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
TABLES: dict[str, Callable[[int], Sequence[dict]]] = {
    "real table": lambda seed: real_table(),
    "made-up tables": made_up_table,
    "sparse, characters with little text": lambda seed: unequal_table(characters_have_much=False),
    "sparse, characters with much text": lambda seed: unequal_table(characters_have_much=True),
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--corpora", type=int, default=50, help="planted corpora an effect; four times as many null ones"
    )
    parser.add_argument("--latents", type=int, default=100)
    parser.add_argument("--table", nargs="+", choices=TABLES, default=list(TABLES))
    asked = parser.parse_args()
    for name in asked.table:
        started = time.monotonic()
        print(f"{name}, {asked.latents} latents\neffect (sd)   supported   q <= .05   otherwise")
        for effect in EFFECTS:
            print(_line(name, effect, asked.corpora, asked.latents), flush=True)
        false = sum(_null(name, seed, asked.latents) for seed in range(4 * asked.corpora))
        print(f"null corpora with a supported latent: {false} of {4 * asked.corpora}")
        print(f"{time.monotonic() - started:.0f} s\n")


def _corpus(
    name: str, seed: int, latents: int, effect: float = 0.0, *, first: int = 0
) -> tuple[np.ndarray, Sequence[dict]]:
    """Windows and their documents; latent 7 is higher in characters by `effect` deviations between authors."""
    rows = TABLES[name](seed)
    x = null_corpus(rows, first + seed, latents)
    x[:, 7] += effect * between_authors(rows) * characters(rows)
    return (sparse(x) if name.startswith("sparse") else x), rows


def _line(name: str, effect: float, corpora: int, latents: int) -> str:
    found: Counter[str] = Counter()
    passed = 0
    for seed in range(corpora):
        row = judge(*_corpus(name, seed, latents, effect, first=1000), seed=seed)[7]
        found[str(row["verdict"])] += 1
        passed += float(str(row["q_value"])) <= 0.05
    others = ", ".join(f"{verdict} {n}" for verdict, n in found.most_common() if verdict != "supported")
    return f"{effect:11.1f} {found['supported'] / corpora:11.0%} {passed / corpora:10.0%}   {others}"


def _null(name: str, seed: int, latents: int) -> bool:
    return any(row["verdict"] == "supported" for row in judge(*_corpus(name, seed, latents), seed=seed))


if __name__ == "__main__":
    main()
