"""How long `greatctl --help` takes, beside a bare Typer program with as many commands.

    python tests/benchmarks/help_time.py [RUNS]

Whole processes, in turn, so that a drifting machine hits both alike. Goal: at most twice the bare program.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

BARE = """
import typer
app = typer.Typer()
def make(name):
    @app.command(name)
    def command(x: int = 1, y: str = "", z: bool = False) -> None:
        "A command."
for n in range(14):
    make(f"c{n}")
app()
"""
PROGRAMS = {
    "bare Typer --help": [sys.executable, "-c", BARE, "--help"],
    "greatctl --help": [sys.executable, "-m", "greatctl", "--help"],
    "greatctl train --help": [sys.executable, "-m", "greatctl", "train", "--help"],
    "greatctl --version": [sys.executable, "-m", "greatctl", "--version"],
}


def main() -> None:
    """Time each program `RUNS` times in turn and print medians and ratios."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    seconds: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for _ in range(runs + 1):
        for name, command in PROGRAMS.items():
            began = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - began)
    base = statistics.median(seconds["bare Typer --help"][1:])
    print(f"{'program':<24}{'median':>10}{'min':>10}{'x bare':>9}   ({runs} runs each, the first not counted)")
    for name, values in seconds.items():
        middle = statistics.median(values[1:])
        print(f"{name:<24}{middle:>8.3f} s{min(values[1:]):>8.3f} s{middle / base:>9.2f}")


if __name__ == "__main__":
    main()
