"""How often a test that counts passages finds an effect where there is none, and how often `judge` does.

    python tests/benchmarks/false_positives.py [--repetitions 1000]

15 great and 15 control authors, three works each, 40 passages a work, no effect; normal random effects of author and
work of a given share of the variance (ICC). Every repetition is one latent. A row prints the share of latents called
significant at .05 by a t test over passages, over works' means and over authors' means, by a permutation of the
authors' labels, and the share that `judge` supports, one latent alone and ten together.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
from scipy import stats

from greatctl.features import judge
from greatctl.stats import label_permutation

AUTHORS, WORKS, PASSAGES = 15, 3, 40
ICCS = (0.0, 0.02, 0.05, 0.1, 0.2)
TOGETHER = 10
LEVEL = 0.05


def corpora(icc: float, n: int, seed: int) -> Iterator[np.ndarray]:
    """Null latents [2 * AUTHORS, WORKS, PASSAGES], ten at a time [..., TOGETHER]; ICC `icc` for author and for work."""
    rng = np.random.default_rng(seed)
    shape = (2 * AUTHORS, WORKS, PASSAGES, TOGETHER)
    for _ in range(n // TOGETHER):
        author = rng.normal(scale=np.sqrt(icc), size=(shape[0], 1, 1, TOGETHER))
        work = rng.normal(scale=np.sqrt(icc), size=(shape[0], WORKS, 1, TOGETHER))
        yield author + work + rng.normal(scale=np.sqrt(1 - 2 * icc), size=shape)


def rates(icc: float, n: int, seed: int = 0) -> dict[str, float]:
    """The share of null latents that each test calls significant."""
    hits = dict.fromkeys(
        ("passage t", "work-mean t", "author-mean t", "author permutation", "judge, 1", "judge, 10"), 0
    )
    great = np.arange(2 * AUTHORS) < AUTHORS
    rows = [
        {"author": f"a{a}", "work": f"a{a} w{w}", "role": "character" if great[a] else "control"}
        for a in range(2 * AUTHORS)
        for w in range(WORKS)
    ]
    for x in corpora(icc, n, seed):
        for name, values in (
            ("passage t", x.reshape(2 * AUTHORS, -1, TOGETHER)),
            ("work-mean t", x.mean(axis=2)),
            ("author-mean t", x.mean(axis=(1, 2))[:, None]),
        ):
            one, other = values[great].reshape(-1, TOGETHER), values[~great].reshape(-1, TOGETHER)
            hits[name] += int((stats.ttest_ind(one, other).pvalue < LEVEL).sum())
        found = label_permutation(x.mean(axis=(1, 2)), great, draws=200, seed=seed)
        hits["author permutation"] += int((found.p <= LEVEL).sum())
        works = x.mean(axis=2).reshape(-1, TOGETHER)  # a work's mean: `judge` would average its windows all the same
        together = judge(works, rows, seed=seed)
        hits["judge, 10"] += sum(row["verdict"] == "supported" for row in together)
        hits["judge, 1"] += judge(works[:, :1], rows, seed=seed)[0]["verdict"] == "supported"
    total = n // TOGETHER * TOGETHER
    return {name: count / (total // TOGETHER if name == "judge, 1" else total) for name, count in hits.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=1000)
    n = parser.parse_args().repetitions
    print("false positives at level .05, no effect at all")
    for number, icc in enumerate(ICCS):
        found = rates(icc, n)
        if not number:
            print("ICC author + work  " + "  ".join(found))
        print(f"{f'{icc:g} + {icc:g}':17}  " + "  ".join(f"{rate:{len(name)}.3f}" for name, rate in found.items()))


if __name__ == "__main__":
    main()
