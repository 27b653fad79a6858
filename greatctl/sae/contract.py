"""Does an architecture keep its word? Asked once, on a few made-up rows, before hours are spent on it.

A plugin's mistake (a wrong shape, NaN, another dtype, a loss that is no scalar) would otherwise surface somewhere in the
middle of training, as an error of greatctl's or as a wrong number.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import PluginError
from .coder import Coder

__all__ = ["check_contract"]

_ROWS = 8


def check_contract(coder: Coder) -> None:
    """Run `encode`, `decode` and `losses` of a copy of `coder` on 8 random rows; the generators stay as they were.

    Raises:
        PluginError: naming the architecture, what the contract says, and what came instead.
    """
    d_in, d_sae = coder.config.d_in, coder.config.d_sae
    probe = copy.deepcopy(coder).cpu()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.randn(_ROWS, d_in)
        try:
            latents = probe.encode(x)
            _tensor(coder, "encode", latents, (_ROWS, d_sae))
            _tensor(coder, "decode", probe.decode(latents), (_ROWS, d_in))
            terms = probe.losses(x, dead=torch.zeros(d_sae, dtype=torch.bool), step=0)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError) as error:
            raise _broken(
                coder, "encode, decode and losses run on [n, d_in]", f"{type(error).__name__}: {error}"
            ) from error
    if not isinstance(terms, Mapping) or not terms:
        raise _broken(coder, "losses gives named terms", repr(terms)[:80])
    for name, term in terms.items():
        _tensor(coder, f"losses[{name!r}]", term, ())


def _tensor(coder: Coder, what: str, value: object, shape: tuple[int, ...]) -> None:
    wanted = f"{what} gives a finite float tensor of shape {list(shape)}"
    if not isinstance(value, Tensor):
        raise _broken(coder, wanted, f"a {type(value).__name__}")
    if tuple(value.shape) != shape or not value.dtype.is_floating_point:
        raise _broken(coder, wanted, f"{list(value.shape)} of {value.dtype}")
    if not bool(torch.isfinite(value).all()):
        raise _broken(coder, wanted, "NaN or infinity")


def _broken(coder: Coder, contract: str, got: str) -> PluginError:
    return PluginError(
        f"architecture {coder.name!r} breaks its contract",
        why=f"{contract}; it gave {got}",
        fix="check the plugin with greatctl.extend.testing.check_architecture",
        code="contract",
    )
