"""Help pages that say what was written: nothing in square brackets is taken for markup, and examples can be copied.

Typer reads help as Rich markup, in which `[train]` is a style that is not shown, and joins the lines of an epilog. Here
the words are escaped, a switch is not said to take a `<bool>`, and a long example is broken with a backslash.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

__all__ = ["Command", "Group", "copyable"]

_WORD = re.compile(r"""(?:[^\s"']|"[^"]*"|'[^']*')+""")
_TAG = re.compile(r"(\\*)(\[[a-z#/@].*?\])", re.IGNORECASE)
_INDENT = 2


class Command(TyperCommand):
    """A command; its `epilog` is its examples, a line each."""

    def __init__(self, *args: Any, epilog: str | None = None, **more: Any) -> None:
        super().__init__(*args, **more)
        self.examples = (epilog or "").splitlines()
        self.help = _escaped(self.help)
        _plain(self.params)

    def get_params(self, ctx: typer.Context) -> list[Any]:  # type: ignore[override]
        """The parameters, `--help` included."""
        return _switches(super().get_params(ctx))

    def format_help(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        """Print the page, then the examples."""
        super().format_help(ctx, formatter)
        from rich.console import Console

        console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        console.print(" Examples:", style="bold")
        for line in (line for example in self.examples for line in copyable(example, console.width - _INDENT)):
            console.print(" " * _INDENT + line, markup=False)


class Group(TyperGroup):
    """The application itself."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.help = _escaped(self.help)
        _plain(self.params)

    def get_params(self, ctx: typer.Context) -> list[Any]:  # type: ignore[override]
        """The parameters, `--help` included."""
        return _switches(super().get_params(ctx))


def copyable(example: str, width: int) -> list[str]:
    """A command line in lines of at most `width` characters where its words allow, which a shell reads as one."""
    lines = [""]
    for words in _phrases(_WORD.findall(example)):
        longer = f"{lines[-1]} {words}".lstrip(" ") if len(lines) == 1 else f"{lines[-1]} {words}"
        if lines[-1].strip() and len(longer) > width - 2:
            lines[-1] += " \\"
            lines.append(f"    {words}")
        else:
            lines[-1] = longer
    return lines


def _phrases(words: Sequence[str]) -> list[str]:
    """An option and its value are one phrase, and so is what stands before the first option."""
    phrases: list[str] = []
    for word in words:
        if phrases and not word.startswith("--"):
            phrases[-1] += f" {word}"
        else:
            phrases.append(word)
    return phrases


def _plain(params: Sequence[Any]) -> None:
    for param in params:
        param.help = _escaped(getattr(param, "help", None))


def _switches(params: list[Any]) -> list[Any]:
    """A switch takes no value, so none is shown."""
    for param in params:
        if isinstance(param, TyperOption) and param.is_flag and param.metavar is None:
            param.metavar = ""
    return params


def _escaped(text: str | None) -> str | None:
    """As `rich.markup.escape`, which takes 20 ms to import, also where nobody asks for help."""
    return text and _TAG.sub(lambda tag: f"{tag[1]}{tag[1]}\\{tag[2]}", text)
