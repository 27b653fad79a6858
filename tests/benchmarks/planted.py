"""How much of a planted dictionary each architecture finds.

    python tests/benchmarks/planted.py                     # every architecture, both fixtures: about forty minutes of a core
    python tests/benchmarks/planted.py --arch topk batchtopk --steps 1500

Columns: mean max cosine to the truth (`mmcs`) beside that of a decoder frozen as it was drawn, the share of features
above 0.9, the mean of the best one-to-one matching, the mean F1 of each feature's latent, fraction of variance
unexplained, L0 (4 are wanted), the share of silent latents, seconds. A skip-transcoder's latents need not find what its
linear path explains.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from planted_fixtures import Found, Planted, measured, trained

from greatctl.extend.manager import load_plugins

CASES = {"E, 1x": ("E", 128, 5000), "E, 2x": ("E", 256, 5000), "H": ("H", 512, 3000)}
GOALS = {"E, 1x": 0.93, "E, 2x": 0.98, "H": 0.85}
COLUMNS = ("mmcs", "over_09", "matched", "f1", "fvu", "l0", "silent")


def one(cls: type, case: str, steps: int | None, seed: int, *, frozen: bool = False) -> Found:
    """Train and measure; a frozen decoder needs no long run."""
    fixture, d_sae, usual = CASES[case]
    rows = Planted(fixture, targets=cls.reads_target)
    length = 300 if frozen else steps or usual
    return measured(rows, *trained(rows, cls, d_sae=d_sae, steps=length, seed=seed, frozen=frozen))


def main() -> None:
    """Print a line a case and architecture."""
    registry = load_plugins(folder=None).registry
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=registry.names("architectures"))
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--steps", type=int, help="instead of 5000 (E) and 3000 (H)")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    print(f"{'case':6} {'architecture':16} " + " ".join(f"{c:>8}" for c in (*COLUMNS, "frozen", "goal", "seconds")))
    for case in a.case:
        for name in a.arch:
            cls, began = registry.get("architectures", name), time.monotonic()
            frozen = one(cls, case, a.steps, a.seed, frozen=True)
            learnt = one(cls, case, a.steps, a.seed)
            numbers = [getattr(learnt, c) for c in COLUMNS] + [frozen.mmcs, GOALS[case]]
            line = " ".join(f"{n:8.3f}" for n in numbers)
            print(f"{case:6} {name:16} {line} {time.monotonic() - began:8.0f}", flush=True)


if __name__ == "__main__":
    main()
