"""One small file per command. Importing them costs no torch: a command imports its stage when it runs."""

from __future__ import annotations

import importlib

import typer

__all__ = ["NAMES", "register"]

NAMES = (
    "fetch",
    "tokenize",
    "harvest",
    "train",
    "interpret",
    "patch",
    "report",
    "steer",
    "demo",
    "run",
    "init",
    "status",
    "verify",
    "plugins",
    "doctor",
)


def register(app: typer.Typer) -> None:
    """Add every command to the application, in the order in which people meet them."""
    for name in NAMES:
        importlib.import_module(f"{__name__}.{name}_").register(app)
