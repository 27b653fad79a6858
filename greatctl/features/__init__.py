"""What latents mean: where they fire, what they write, and whether that follows greatness or something
simpler.

`tables` reads all activations once; `examples` and `logits` turn numbers into text; `units`, `adjust`, `agreement` and
`judgement` weigh the evidence; `concepts` say which texts are compared; `baselines` and `gate` say what a latent has to
beat, and what may be said of it then. `judge` is the public door. Names load on first use.
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
