"""What a run begins with: a fresh coder and its optimiser."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import PluginError
from .coder import Coder, CoderConfig
from .rows import derive

__all__ = ["adam", "build"]


def build(cls: type[Coder], config: CoderConfig, seed: int) -> Coder:
    """A freshly initialised coder; torch's global generator is left as it was.

    Raises:
        PluginError: the class does not make a `Coder`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "init"))
        coder = cls(config)
    if not isinstance(coder, Coder):
        raise PluginError(
            f"architecture {getattr(cls, 'name', cls.__name__)!r} is not a Coder",
            why="training needs the parameters and hooks of greatctl.sae.coder.Coder",
            fix="derive the class from greatctl.sae.coder.Coder",
        )
    return coder


def adam(parameters: Sequence[torch.nn.Parameter], lr: float) -> torch.optim.Adam:
    """Fused Adam with its moments in place: what does not fit the memory fails here, and a resume finds tensors to
    fill.
    """
    optimiser = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.999), eps=1e-8, fused=True)
    for parameter in parameters:
        optimiser.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimiser
