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
    """Run `encode`, `decode`, `reconstruct` and `losses` of a copy of `coder` on 8 random rows (and random targets,
    where it reads them); the generators stay as they were.

    Raises:
        PluginError: naming the architecture, what the contract says, and what came instead.
    """
    d_in, d_sae, d_out = coder.config.d_in, coder.config.d_sae, coder.d_out
    _tensor(coder, "W_dec", coder.W_dec, (d_sae, d_out))
    probe = copy.deepcopy(coder).cpu()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x, target = torch.randn(_ROWS, d_in), torch.randn(_ROWS, d_out)
        more = {"target": target} if coder.reads_target else {}
        try:
            latents = probe.encode(x)
            _tensor(coder, "encode", latents, (_ROWS, d_sae))
            _tensor(coder, "decode", probe.decode(latents), (_ROWS, d_out))
            _tensor(coder, "reconstruct", probe.reconstruct(x), (_ROWS, d_out))
            terms = probe.losses(x, dead=torch.zeros(d_sae, dtype=torch.bool), step=0, **more)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError) as error:
            arguments = "[n, d_in] and a target [n, d_out]" if coder.reads_target else "[n, d_in]"
            raise _broken(
                coder, f"encode, decode, reconstruct and losses run on {arguments}", f"{type(error).__name__}: {error}"
            ) from error
    if not isinstance(terms, Mapping) or not terms:
        raise _broken(coder, "losses gives named terms", repr(terms)[:80])
    for name, term in terms.items():
        _tensor(coder, f"losses[{name!r}]", term, ())


def _tensor(coder: Coder, what: str, value: object, shape: tuple[int, ...]) -> None:
    wanted = f"{what} gives a finite float32 tensor of shape {list(shape)} where its input is"
    if not isinstance(value, Tensor):
        raise _broken(coder, wanted, f"a {type(value).__name__}")
    if tuple(value.shape) != shape or value.dtype != torch.float32:
        raise _broken(coder, wanted, f"{list(value.shape)} of {value.dtype}")
    if what != "W_dec" and value.device.type != "cpu":
        raise _broken(coder, wanted, f"a tensor on {value.device}")
    if not bool(torch.isfinite(value).all()):
        raise _broken(coder, wanted, "NaN or infinity")


def _broken(coder: Coder, contract: str, got: str) -> PluginError:
    return PluginError(
        f"architecture {coder.name!r} breaks its contract",
        why=f"{contract}; it gave {got}",
        fix="check the plugin with greatctl.extend.testing.check_architecture",
        code="contract",
    )
