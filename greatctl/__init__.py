"""greatctl: greatness as hypotheses that can fail.

Texts of fifteen historical characters and of matched controls are read with a frozen language model, sparse autoencoders
are trained on its residual stream, and the latents that seem to carry an idea are tested against the baselines that
could explain them away. The names below load on first use: `import greatctl` never imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .errors import GreatctlError
    from .extend.hookspecs import hookimpl
    from .notebook import open  # noqa: F401  (not in __all__: a star import must not hide the built-in)

__version__ = "0.1.0"
__all__ = ["GreatctlError", "__version__", "hookimpl"]

_WHERE = {
    "GreatctlError": "greatctl.errors",
    "hookimpl": "greatctl.extend.hookspecs",
    "open": "greatctl.notebook",
}


def __getattr__(name: str) -> object:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'greatctl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_WHERE})
