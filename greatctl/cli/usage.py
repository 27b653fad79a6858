"""What Typer refuses, in the words of every other error: what, why, and a fix that can be copied.

The commonest slips are a flag on the wrong side of the command and a letter too few; both are told apart here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ..errors import UsageError, did_you_mean, nearest

__all__ = ["explained"]

_COMMAND = re.compile(r"No such command '(.*?)'\.", re.DOTALL)
_KINDS = {"valid integer": "a whole number", "valid number": "a number", "valid boolean": "yes or no"}


def explained(problem: Any) -> UsageError:
    """The error of a `typer.TyperException`; what is not known better keeps Typer's own words."""
    context = getattr(problem, "ctx", None)
    said = problem.format_message() or "no command was given"
    if "requires an argument" in said:
        option = str(getattr(problem, "option_name", "the option"))
        return UsageError(f"{option} needs a value", why=said, fix=f"write it behind the flag: {option} VALUE")
    if context is None:
        return UsageError(said, fix="`greatctl --help` lists what can be said")
    command = _path(context)
    if option := getattr(problem, "option_name", None):
        return _option(said, option, context, command)
    if found := _COMMAND.match(said):
        names = context.command.commands
        return UsageError(
            f"there is no command {found[1]!r}", why="`greatctl --help` lists them", fix=did_you_mean(found[1], names)
        )
    if getattr(problem, "param", None) is not None and (kind := _kind(said)):
        flag = problem.param.opts[0]
        return UsageError(f"{flag} takes {kind}", why=said, fix=f"`{command} --help` says what {flag} is")
    return UsageError(said, fix=f"`{command} --help` lists what can be said")


def _option(said: str, option: str, context: Any, command: str) -> UsageError:
    """A flag that is not known here: it may belong to the other side of the command, or be misspelt."""
    if "No such option" not in said:
        return UsageError(said, fix=f"`{command} --help` says what {option} takes")
    what = f"`{command}` has no option {option}"
    root = context.find_root().command
    if context.parent is not None and option in _flags(root):
        inside = command.removeprefix("greatctl ")
        return UsageError(what, why="it belongs before the command", fix=f"greatctl {option} … {inside}")
    if context.parent is None:
        owners = [name for name, sub in root.commands.items() if option in _flags(sub)]
        if owners:
            example = next((name for name in owners if name == "status"), owners[0])
            return UsageError(what, why="it belongs behind the command", fix=f"greatctl {example} {option}")
    close = nearest(option, _flags(context.command))
    meant = f"did you mean {close[0]}? " if close else ""
    return UsageError(what, why="it is not among its flags", fix=f"{meant}`{command} --help` lists all")


def _path(context: Any) -> str:
    """`greatctl` and the command, however the program was started."""
    return "greatctl" if context.parent is None else f"greatctl {context.info_name}"


def _flags(command: Any) -> list[str]:
    found: Iterable[str] = (flag for param in command.params for flag in param.opts if flag.startswith("-"))
    return [*found, "--help"]


def _kind(said: str) -> str | None:
    return next((kind for words, kind in _KINDS.items() if words in said), None)
