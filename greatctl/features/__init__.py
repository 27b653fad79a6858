"""What latents mean: where they fire, what they write, and whether that follows greatness or something
simpler.

`tables` reads all activations once; `examples` and `logits` turn numbers into text; `units`, `adjust` and
`judgement` weigh the evidence. `judge` is the public door to the last. Names load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .judgement import VERDICTS as VERDICTS
    from .judgement import judge as judge

__all__ = ["VERDICTS", "judge"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".judgement", __name__), name)
