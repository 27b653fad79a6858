"""The frozen model: load it, look inside, edit a site, go on from a layer.

Two engines behind one interface (`FrozenModel`): `lean` walks the Hugging Face decoder itself and is used for
everything hot; `transformer-lens` knows every site and is what tests hold lean against. Names are imported on
first use, so that `import greatctl.model` loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .interface import FrozenModel as FrozenModel
    from .interface import Intervention as Intervention
    from .loading import ModelInfo as ModelInfo
    from .loading import choose_engine as choose_engine
    from .loading import describe as describe
    from .loading import load as load
    from .loading import revision_of as revision_of
    from .loading import weight_bytes as weight_bytes
    from .tokenizer import encode as encode
    from .tokenizer import load_tokenizer as load_tokenizer

__all__ = [
    "FrozenModel",
    "Intervention",
    "ModelInfo",
    "choose_engine",
    "describe",
    "encode",
    "load",
    "load_tokenizer",
    "revision_of",
    "weight_bytes",
]

_HOME = {
    "FrozenModel": "interface",
    "Intervention": "interface",
    "ModelInfo": "loading",
    "choose_engine": "loading",
    "describe": "loading",
    "load": "loading",
    "revision_of": "loading",
    "weight_bytes": "loading",
    "encode": "tokenizer",
    "load_tokenizer": "tokenizer",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
