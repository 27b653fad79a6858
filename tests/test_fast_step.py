"""The sparse step is the plain step: losses, gradients and updated weights, held against the plain formula in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from greatctl.events import Run
from greatctl.sae.batchtopk import BatchTopK
from greatctl.sae.coder import Coder
from greatctl.sae.fast import SparseStep, choose, fits
from greatctl.sae.jumprelu import JumpRelu
from greatctl.sae.matryoshka import Matryoshka
from greatctl.sae.setup import build
from greatctl.sae.step import PlainStep
from greatctl.sae.topk import TopK
from greatctl.sae.transcoder import Transcoder

CPU = torch.device("cpu")
ARCHITECTURES = [TopK, BatchTopK, Matryoshka, Transcoder]
D, F, K, N = 24, 160, 6, 96


def coder_of(cls: type[Coder], **more: object) -> Coder:
    options = {"d_in": D, "d_sae": F, "k": K, **({"d_out": 20} if cls is Transcoder else {}), **more}
    coder = build(cls, cls.Config(**options), 0).train()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # no parameter is where symmetry puts it
        coder.W_enc += 0.1 * torch.randn(coder.W_enc.shape, generator=generator)
        coder.b_enc += 0.05 * torch.randn(coder.b_enc.shape, generator=generator)
        coder.b_dec += 0.2 * torch.randn(coder.b_dec.shape, generator=generator)
    return coder


def batch(cls: type[Coder], seed: int) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=generator)
    return x, torch.randn(N, 20, generator=generator) if cls.reads_target else None


def no_dead() -> Tensor:
    return torch.zeros(F, dtype=torch.bool)


def some_dead(n: int = 30) -> Tensor:
    return torch.arange(F) % (F // n) == 0


def apart(ours: Tensor, truth: Tensor) -> float:
    """Relative distance."""
    return float((ours.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-12))


def both(cls: type[Coder], dead: Tensor, steps: int = 3, lr: float = 1e-3, **more: object) -> tuple[Coder, Coder, list]:
    """The coder after some sparse steps, after plain ones in float64, and both kinds of `Taken`."""
    ours, truth = coder_of(cls, **more), coder_of(cls, **more).double()
    sparse, plain = SparseStep(ours, lr, Run("train")), PlainStep(truth, lr, Run("train"))
    taken = []
    for step in range(steps):
        x, y = batch(cls, step)
        wide = None if y is None else y.double()
        a = sparse.gradients(x, y, dead=dead, step=step, seed=step)
        b = plain.gradients(x.double(), wide, dead=dead, step=step, seed=step)
        gradients = [
            (name, p.grad.clone(), dict(truth.named_parameters())[name].grad.clone())
            for name, p in ours.named_parameters()
        ]
        taken.append((a, b, gradients))
        sparse.update(lr)
        plain.update(lr)
    return ours, truth, taken


@pytest.mark.parametrize("dead", [no_dead(), some_dead(), some_dead(5)], ids=["none dead", "30 dead", "5 dead"])
@pytest.mark.parametrize("cls", ARCHITECTURES)
def test_losses_gradients_and_weights_are_those_of_the_plain_formula(cls: type[Coder], dead: Tensor) -> None:
    ours, truth, taken = both(cls, dead)
    for a, b, gradients in taken:
        assert set(a.terms) == set(b.terms)
        for name, term in a.terms.items():
            assert float(term) == pytest.approx(float(b.terms[name]), rel=1e-5, abs=1e-9)
        assert float(a.norm) == pytest.approx(float(b.norm), rel=1e-4)
        assert torch.equal(a.fired, b.fired)
        for name, mine, true in gradients:
            assert apart(mine, true) < 1e-4, name
    for name, value in ours.state_dict().items():
        assert apart(value, truth.state_dict()[name]) < 1e-4, name
    assert torch.allclose(ours.W_dec.norm(dim=1), torch.ones(F), atol=1e-6)


def test_dead_latents_get_a_gradient_and_living_ones_without_a_token_get_none() -> None:
    coder, dead = coder_of(TopK), no_dead()
    dead[7] = True
    with torch.no_grad():
        coder.b_enc[:] = torch.where(torch.arange(F) < F // 2, 0.0, -50.0)
        coder.b_enc[7] = -0.2
    x, _ = batch(TopK, 0)
    taken = SparseStep(coder, 1e-3, Run("train")).gradients(x, None, dead=dead, step=0, seed=0)
    assert float(taken.terms["auxk"]) > 0
    assert float(coder.W_enc.grad[:, 7].norm()) > 0
    assert float(coder.W_enc.grad[:, F // 2 :].norm()) == 0


@pytest.mark.parametrize("cls", ARCHITECTURES)
def test_a_gradient_that_is_too_long_is_clipped(cls: type[Coder]) -> None:
    ours, truth = coder_of(cls), coder_of(cls).double()
    x, y = batch(cls, 1)
    taken = []
    for coder, kind in ((ours, SparseStep), (truth, PlainStep)):
        scaled = [None if t is None else (100 * t).to(coder.b_dec.dtype) for t in (x, y)]
        taken.append(kind(coder, 1e-3, Run("train")).gradients(*scaled, dead=no_dead(), step=0, seed=0))
    assert float(taken[1].norm) > 10
    for name, parameter in ours.named_parameters():
        assert apart(parameter.grad, dict(truth.named_parameters())[name].grad) < 1e-4, name


def test_it_is_taken_where_its_formulas_are_the_coders_own() -> None:
    class Other(TopK):
        """A subclass may mean something else."""

    frozen = coder_of(TopK)
    frozen.frozen_decoder = True
    for coder, name in (
        *((coder_of(cls), "sparse") for cls in ARCHITECTURES),
        (coder_of(Other), "plain"),
        (frozen, "plain"),
        (coder_of(TopK, k=F // 2), "plain"),
        (build(JumpRelu, JumpRelu.Config(d_in=D, d_sae=F), 0), "plain"),
    ):
        assert choose(coder, 1e-3, Run("train"), CPU).name == name
        assert fits(coder) == (name == "sparse")


def test_a_plain_step_goes_on_from_its_state_and_the_other_way_round() -> None:
    x, _ = batch(BatchTopK, 0)
    ends = []
    for first, then in ((SparseStep, PlainStep), (PlainStep, SparseStep)):
        coder = coder_of(BatchTopK)
        one = first(coder, 1e-3, Run("train"))
        one(x, None, dead=no_dead(), step=0, lr=1e-3, seed=0)
        other = coder_of(BatchTopK)
        two = then(other, 1e-3, Run("train"))
        two.restore({k: v.clone() for k, v in one.state().items()})
        two(x, None, dead=no_dead(), step=1, lr=1e-3, seed=1)
        ends.append(copy.deepcopy(other.state_dict()))
    for name, value in ends[0].items():
        assert torch.allclose(value, ends[1][name], atol=1e-5), name


def test_memory_that_runs_out_sends_the_batch_to_the_plain_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from greatctl.sae import sparse

    def full(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    coder, reference = coder_of(TopK), coder_of(TopK)
    x, _ = batch(TopK, 0)
    PlainStep(reference, 1e-3, Run("train"))(x, None, dead=no_dead(), step=0, lr=1e-3, seed=0)
    monkeypatch.setattr(sparse, "residuals", full)
    SparseStep(coder, 1e-3, Run("train"))(x, None, dead=no_dead(), step=0, lr=1e-3, seed=0)
    assert torch.equal(coder.W_dec, reference.W_dec) and torch.equal(coder.W_enc, reference.W_enc)
