"""The command line: the only code that prints or exits.

`main` is light on purpose: `--help` and `--version` load neither torch nor any plugin.
"""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Entry point of the `greatctl` console script."""
    from .app import run

    run()
