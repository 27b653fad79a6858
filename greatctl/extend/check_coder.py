"""The conformance checks of an architecture; `greatctl.extend.testing.check_architecture` runs them.

A planted dictionary is the heart of it: inputs mix three of 24 known directions, so whether an architecture
learns is a fact and not an opinion. 16 dimensions and 48 latents keep it within two seconds on one CPU core.
A transcoder gets targets besides, the same mixtures of 24 other directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["check"]

_SCALE, _TARGET_SCALE = 1.7, 0.6  # any factors but 1: what `fold` has to undo


def check(architecture: type[Any], settings: Mapping[str, object], *, explained: float, steps: int) -> None:
    """All checks, in the order in which a beginner's mistakes show. Raises AssertionError."""
    torch.manual_seed(0)
    coder = architecture(architecture.Config(d_in=16, d_sae=48, **settings))
    truth = _Truth.drawn(coder)
    _shapes(coder, *truth.mixtures(64))
    _gradients(coder, *truth.mixtures(256))
    _parts(coder, *truth.mixtures(96))
    first, second = _trained(architecture, settings, truth, 12), _trained(architecture, settings, truth, 12)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), f"the same seed gives another {name!r}"
    learnt = _trained(architecture, settings, truth, steps)
    _learns(learnt, truth, explained)
    _round_trip(learnt, architecture(learnt.config), truth.mixtures(64)[0])
    _folds(learnt, truth.mixtures(64)[0])


@dataclass(frozen=True)
class _Truth:
    """The planted directions: read [24, 16], and write [24, d_out] (the same for an autoencoder)."""

    read: Tensor
    write: Tensor

    @classmethod
    def drawn(cls, coder: Any) -> _Truth:
        read = normalize(torch.randn(24, 16), dim=1)
        return cls(read, normalize(torch.randn(24, coder.d_out), dim=1) if coder.reads_target else read)

    def mixtures(self, n: int) -> tuple[Tensor, Tensor]:
        """n rows and what should become of them, each of three true directions with weights in [0.5, 1.5], of mean
        norm sqrt(width).
        """
        which = torch.rand(n, len(self.read)).topk(3, dim=1).indices
        weights = torch.zeros(n, len(self.read)).scatter(1, which, 0.5 + torch.rand(n, 3))
        x, y = weights @ self.read, weights @ self.write
        return tuple(rows * (rows.shape[1] ** 0.5 / rows.norm(dim=1).mean()) for rows in (x, y))  # type: ignore


def _shapes(coder: Any, x: Tensor, y: Tensor) -> None:
    for mode in (True, False):
        coder.train(mode)
        for rows in (x, x[:1], torch.zeros_like(x)):
            latents = coder.encode(rows)
            shape = list(latents.shape)
            assert shape == [len(rows), coder.config.d_sae], f"latents have shape {shape}, not [n, d_sae]"
            assert latents.dtype == x.dtype, f"latents are {latents.dtype} for {x.dtype} inputs"
            assert bool(torch.isfinite(latents).all()), "a latent is not finite"
            assert bool((latents >= 0).all()), "a latent is negative"
            width = "d_out" if coder.reads_target else "d_in"
            for out in (coder.decode(latents), coder.reconstruct(rows)):
                shape = list(out.shape)
                assert shape == [len(rows), y.shape[1]], f"the reconstruction has shape {shape}, not [n, {width}]"
                assert out.dtype == x.dtype, f"the reconstruction is {out.dtype} for {x.dtype} inputs"
                assert bool(torch.isfinite(out).all()), "the reconstruction is not finite"
    coder.train()
    for dead in _dead(coder):
        terms = _terms(coder, x, y, dead, 0)
        assert isinstance(terms, Mapping) and terms, "`losses` gives no mapping of named terms"
        for name, term in terms.items():
            scalar = isinstance(term, torch.Tensor) and term.ndim == 0
            assert scalar, f"loss term {name!r} is no scalar tensor"
            assert bool(torch.isfinite(term)), f"loss term {name!r} is not finite for ordinary rows"


def _dead(coder: Any) -> tuple[Tensor, Tensor]:
    """No latent dead, and all of them."""
    none = torch.zeros(coder.config.d_sae, dtype=torch.bool)
    return none, ~none


def _terms(coder: Any, x: Tensor, y: Tensor, dead: Tensor, step: int, **more: object) -> Mapping[str, Tensor]:
    return coder.losses(x, dead=dead, step=step, **({"target": y} if coder.reads_target else {}), **more)


def _loss(coder: Any, x: Tensor, y: Tensor, dead: Tensor, step: int, **more: object) -> Tensor:
    return torch.stack(list(_terms(coder, x, y, dead, step, **more).values())).sum()


def _gradients(coder: Any, x: Tensor, y: Tensor) -> None:
    coder.train()
    coder.zero_grad()
    for dead in _dead(coder):
        _loss(coder, x, y, dead, 0).backward()
    parameters = dict(coder.named_parameters())
    assert parameters, "it has no parameters"
    for name, parameter in parameters.items():
        assert parameter.grad is not None, f"no gradient reaches parameter {name!r}"
        assert bool(torch.isfinite(parameter.grad).all()), f"the gradient of {name!r} is not finite"
        assert bool(parameter.grad.any()), f"the gradient of {name!r} is zero everywhere"
    coder.zero_grad()


def _parts(coder: Any, x: Tensor, y: Tensor) -> None:
    """A batch given in two unequal parts has the loss of the whole (not asked of losses that draw random numbers)."""
    coder.train()
    _, dead = _dead(coder)
    with torch.no_grad():
        whole, again = (_loss(coder, x, y, dead, 1) for _ in range(2))
        if not torch.equal(whole, again):
            return
        xs, ys = x.split(64), y.split(64)
        targets = {"targets": ys} if coder.reads_target else {}
        more = {} if coder.separable else {"shared": coder.prepare(xs, dead=dead, **targets)}
        parts = [_loss(coder, a, b, dead, 1, **more) * len(a) / len(x) for a, b in zip(xs, ys, strict=True)]
    words = "a batch in two parts has another loss than the whole: set `separable = False` and write `prepare`"
    assert torch.allclose(torch.stack(parts).sum(), whole, rtol=1e-4), words


def _trained(architecture: type[Any], settings: Mapping[str, object], truth: _Truth, steps: int) -> Any:
    torch.manual_seed(1)
    coder = architecture(architecture.Config(d_in=16, d_sae=48, **settings))
    coder.start(*(rows.mean(dim=0) for rows in truth.mixtures(1024)))
    adam = torch.optim.Adam(coder.parameters(), lr=5e-3)
    dead = torch.zeros(48, dtype=torch.bool)
    for step in range(steps):
        adam.zero_grad()
        loss = _loss(coder, *truth.mixtures(256), dead, step)
        assert bool(torch.isfinite(loss)), f"the loss is not finite at step {step}"
        loss.backward()
        adam.step()
        coder.after_step()
    return coder


def _learns(coder: Any, truth: _Truth, explained: float) -> None:
    coder.eval()
    with torch.no_grad():
        x, y = truth.mixtures(2048)
        latents = coder.encode(x)
        rebuilt = coder.reconstruct(x)
        residual = (y - rebuilt).square().sum()
        share = 1 - float(residual / (y - y.mean(dim=0)).square().sum())
        one = torch.eye(coder.config.d_sae)
        rows = normalize(coder.decode(one) - coder.decode(torch.zeros_like(one)), dim=1)
        found = float((truth.write @ rows.T).max(dim=1).values.mean())
    assert share >= explained, f"after training it explains {share:.2f} of the variance, not {explained}"
    density = float((latents > 0).float().mean())
    assert density < 0.5, f"{density:.0%} of the latents are active at once: this is not sparse"
    if torch.allclose(rebuilt, coder.decode(latents), atol=1e-4):  # else a way past the latents takes its share
        assert found >= 0.75, f"the planted directions are not found: mean best cosine {found:.2f}, not 0.75"


def _round_trip(coder: Any, fresh: Any, x: Tensor) -> None:
    state = {name: value.contiguous() for name, value in coder.state_dict().items()}
    fresh.load_state_dict(load(save(state)))
    with torch.no_grad():
        before, after = coder.eval().encode(x), fresh.eval().encode(x)
    assert torch.equal(before, after), "saved and read again, it gives other latents: some state is no tensor"


def _folds(coder: Any, x: Tensor) -> None:
    out = _TARGET_SCALE if coder.reads_target else _SCALE
    with torch.no_grad():
        wanted, given = coder.eval().reconstruct(_SCALE * x) / out, coder.folded(_SCALE, out).reconstruct(x)
    words = "after `fold(s)` it does not read x as it read s * x before: override `fold` for its own state"
    assert torch.allclose(wanted, given, atol=1e-3), words
