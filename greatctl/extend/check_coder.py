"""The conformance checks of an architecture; `greatctl.extend.testing.check_architecture` runs them.

A planted dictionary is the heart of it: inputs mix three of 24 known directions, so whether an architecture
learns is a fact and not an opinion. 16 dimensions and 48 latents keep it within two seconds on one CPU core.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

__all__ = ["check"]

_SCALE = 1.7  # any factor but 1: what `fold` has to undo


def check(architecture: type[Any], settings: Mapping[str, object], *, explained: float, steps: int) -> None:
    """All checks, in the order in which a beginner's mistakes show. Raises AssertionError."""
    torch.manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(24, 16), dim=1)
    coder = architecture(architecture.Config(d_in=16, d_sae=48, **settings))
    _shapes(coder, _mixtures(truth, 64))
    _gradients(coder, _mixtures(truth, 256))
    first, second = _trained(architecture, settings, truth, 12), _trained(architecture, settings, truth, 12)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), f"the same seed gives another {name!r}"
    learnt = _trained(architecture, settings, truth, steps)
    _learns(learnt, truth, explained)
    _round_trip(learnt, architecture(learnt.config), _mixtures(truth, 64))
    _folds(learnt, _mixtures(truth, 64))


def _mixtures(truth: Tensor, n: int) -> Tensor:
    """n rows, each three true directions with weights in [0.5, 1.5], of mean norm sqrt(d_in)."""
    which = torch.rand(n, len(truth)).topk(3, dim=1).indices
    weights = torch.zeros(n, len(truth)).scatter(1, which, 0.5 + torch.rand(n, 3))
    x = weights @ truth
    return x * (truth.shape[1] ** 0.5 / x.norm(dim=1).mean())


def _shapes(coder: Any, x: Tensor) -> None:
    for mode in (True, False):
        coder.train(mode)
        for rows in (x, x[:1], torch.zeros_like(x)):
            latents = coder.encode(rows)
            shape = list(latents.shape)
            assert shape == [len(rows), coder.config.d_sae], f"latents have shape {shape}, not [n, d_sae]"
            assert latents.dtype == x.dtype, f"latents are {latents.dtype} for {x.dtype} inputs"
            assert bool(torch.isfinite(latents).all()), "a latent is not finite"
            assert bool((latents >= 0).all()), "a latent is negative"
            out = coder.decode(latents)
            assert out.shape == rows.shape, f"the reconstruction has shape {list(out.shape)}, not [n, d_in]"
            assert out.dtype == x.dtype, f"the reconstruction is {out.dtype} for {x.dtype} inputs"
            assert bool(torch.isfinite(out).all()), "the reconstruction is not finite"
    coder.train()
    for dead in _dead(coder):
        terms = coder.losses(x, dead=dead, step=0)
        assert isinstance(terms, Mapping) and terms, "`losses` gives no mapping of named terms"
        for name, term in terms.items():
            scalar = isinstance(term, torch.Tensor) and term.ndim == 0
            assert scalar, f"loss term {name!r} is no scalar tensor"
            assert bool(torch.isfinite(term)), f"loss term {name!r} is not finite for ordinary rows"


def _dead(coder: Any) -> tuple[Tensor, Tensor]:
    """No latent dead, and all of them."""
    none = torch.zeros(coder.config.d_sae, dtype=torch.bool)
    return none, ~none


def _loss(coder: Any, x: Tensor, dead: Tensor, step: int) -> Tensor:
    return torch.stack(list(coder.losses(x, dead=dead, step=step).values())).sum()


def _gradients(coder: Any, x: Tensor) -> None:
    coder.train()
    coder.zero_grad()
    for dead in _dead(coder):
        _loss(coder, x, dead, 0).backward()
    parameters = dict(coder.named_parameters())
    assert parameters, "it has no parameters"
    for name, parameter in parameters.items():
        assert parameter.grad is not None, f"no gradient reaches parameter {name!r}"
        assert bool(torch.isfinite(parameter.grad).all()), f"the gradient of {name!r} is not finite"
        assert bool(parameter.grad.any()), f"the gradient of {name!r} is zero everywhere"
    coder.zero_grad()


def _trained(architecture: type[Any], settings: Mapping[str, object], truth: Tensor, steps: int) -> Any:
    torch.manual_seed(1)
    coder = architecture(architecture.Config(d_in=16, d_sae=48, **settings))
    adam = torch.optim.Adam(coder.parameters(), lr=5e-3)
    dead = torch.zeros(48, dtype=torch.bool)
    for step in range(steps):
        adam.zero_grad()
        loss = _loss(coder, _mixtures(truth, 256), dead, step)
        assert bool(torch.isfinite(loss)), f"the loss is not finite at step {step}"
        loss.backward()
        adam.step()
        coder.after_step()
    return coder


def _learns(coder: Any, truth: Tensor, explained: float) -> None:
    coder.eval()
    with torch.no_grad():
        x = _mixtures(truth, 2048)
        latents = coder.encode(x)
        residual = (x - coder.decode(latents)).square().sum()
        share = 1 - float(residual / (x - x.mean(dim=0)).square().sum())
        one = torch.eye(coder.config.d_sae)
        rows = torch.nn.functional.normalize(coder.decode(one) - coder.decode(torch.zeros_like(one)), dim=1)
        found = float((truth @ rows.T).max(dim=1).values.mean())
    assert share >= explained, f"after training it explains {share:.2f} of the variance, not {explained}"
    density = float((latents > 0).float().mean())
    assert density < 0.5, f"{density:.0%} of the latents are active at once: this is not sparse"
    assert found >= 0.75, f"the planted directions are not found: mean best cosine {found:.2f}, not 0.75"


def _round_trip(coder: Any, fresh: Any, x: Tensor) -> None:
    state = {name: value.contiguous() for name, value in coder.state_dict().items()}
    fresh.load_state_dict(load(save(state)))
    with torch.no_grad():
        before, after = coder.eval().encode(x), fresh.eval().encode(x)
    assert torch.equal(before, after), "saved and read again, it gives other latents: some state is no tensor"


def _folds(coder: Any, x: Tensor) -> None:
    with torch.no_grad():
        wanted, given = coder.eval()(_SCALE * x) / _SCALE, coder.folded(_SCALE)(x)
    words = "after `fold(s)` it does not read x as it read s * x before: override `fold` for its own state"
    assert torch.allclose(wanted, given, atol=1e-3), words
