"""What results look like in a terminal: one small file a kind of picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ...stages.context import Result

__all__ = ["render"]


def render(result: Result) -> RenderableType:
    """The view of a stage's result for people."""
    from . import stages

    return stages.VIEWS[result.stage](result)
