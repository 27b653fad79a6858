"""The maps of a hand-built induction circuit, beside those of one plain Hugging Face forward a cell.

    python tests/benchmarks/induction_maps.py [--variant NAME] [--pairs 2]

Prints every map in percent of the distance between the corrupted (0) and the clean run (100): all sites, both
directions, both corruptions, positions from left to right, and after each map the largest difference from the
plain forwards, in percent. The last line is the largest of all; the program fails above 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from induction_circuit import VARIANTS  # noqa: E402
from test_induction_circuit import SITES, Ground  # noqa: E402


def show(ground: Ground, site: str, direction: str) -> float:
    """Print the map of the first pair; returns the largest difference over all pairs, in percent."""
    ours = 100 * ground.normalised(ground.ours(site, direction))
    off = float((ours - 100 * ground.normalised(ground.plain(site, direction))).abs().max())
    for layer, units in enumerate(ours[0]):
        for unit, row in enumerate(units):
            name = f"L{layer}" + (f"H{unit}" if site in ("z", "q", "k", "v", "pattern") else "")
            print(f"  {site:>10} {name:<6}" + "".join(f"{round(float(value)) or '.':>5}" for value in row))
    print(f"  {'':>10} off by {off:.4f}")
    return off


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="default: the first")
    parser.add_argument("--pairs", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    worst = 0.0
    for name in options.variant or [next(iter(VARIANTS))]:
        for corruption in ("A", "B"):
            for direction in ("denoising", "noising"):
                ground = Ground(name, corruption, options.pairs)
                print(f"{name}; corruption {corruption} of the token at {ground.places[0]}; {direction}")
                worst = max([worst, *(show(ground, site, direction) for site in SITES)])
    print(f"largest difference from plain forwards: {worst:.4f} % of the gap")
    sys.exit(worst > 1)


if __name__ == "__main__":
    main()
