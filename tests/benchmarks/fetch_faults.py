"""The table of faults: what a server does -> exit code -> what lies on disk -> after the rerun.

    python tests/benchmarks/fetch_faults.py

Needs the mirror of real books beside this checkout (../shared/mirror). Waits that a server asks for are noted and not
waited.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.fetch_faults import FAULTS, odd_server, play  # noqa: E402
from tests.test_fetch import SERVE, Bench, Mirror  # noqa: E402


def main() -> None:
    """Play every fault and print a line for each."""
    process = subprocess.Popen([sys.executable, str(SERVE)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    mirror = Mirror(process.stdout.readline().strip())
    print(f"{'fault':44} {'code':>4}  {'on disk':28} {'rerun':28} {'s':>5}  why")
    wrong = 0
    try:
        with odd_server() as odd:
            for fault in FAULTS:
                with TemporaryDirectory() as folder:
                    begin = time.monotonic()
                    done = play(fault, Bench(Path(folder)), mirror, odd)
                state = (
                    "sealed" if done.folder else f"nothing, {done.waiting:,} B to resume" if done.waiting else "nothing"
                )
                how = f"{done.rerun}, {'from ' + done.range if done.range else 'whole'}"
                how += "" if done.same else ", the new version"
                good = done.code == fault.code and done.rerun == 0 and done.same == fault.same and not done.leftovers
                wrong += not good
                seconds = time.monotonic() - begin
                print(f"{fault.name:44} {done.code:>4}  {state:28} {how:28} {seconds:5.1f}  {done.reason[:70]}")
    finally:
        process.terminate()
        process.wait()
    print(f"{len(FAULTS)} faults, {wrong} ended otherwise than they should")
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
