"""The fused step on a GPU: kernels and step against the plain formula in float64, in both dtypes."""

from __future__ import annotations

import pytest
import torch
from test_fast_step import ARCHITECTURES, apart
from torch import Tensor

from greatctl.events import Run
from greatctl.sae.coder import Coder
from greatctl.sae.fast import choose
from greatctl.sae.setup import build
from greatctl.sae.step import PlainStep
from greatctl.sae.topk import TopK
from greatctl.sae.transcoder import Transcoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
D, N, K = 80, 300, 7
SIZES = {"few latents": 1000, "groups": 12_000, "more than 2^16": 70_000}


def coder_of(cls: type[Coder], d_sae: int = 1000) -> Coder:
    options = {"d_in": D, "d_sae": d_sae, "k": K, **({"d_out": 72} if cls is Transcoder else {})}
    coder = build(cls, cls.Config(**options), 0).cuda().train()
    generator = torch.Generator("cuda").manual_seed(5)
    with torch.no_grad():
        for parameter in (coder.W_enc, coder.b_enc, coder.b_dec):
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, device="cuda")
    return coder


def batch(cls: type[Coder], seed: int) -> tuple[Tensor, Tensor | None]:
    """Rows of very different lengths: in a batch-wide choice some get many latents and most get few."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(N, D, generator=generator, device="cuda")
    x *= torch.linspace(0.3, 3, N, device="cuda")[:, None]
    return x, torch.randn(N, 72, generator=generator, device="cuda") if cls.reads_target else None


def some_dead(d_sae: int, n: int) -> Tensor:
    dead = torch.zeros(d_sae, dtype=torch.bool, device="cuda")
    dead[torch.randperm(d_sae, generator=torch.Generator().manual_seed(1))[:n]] = True
    return dead


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cls", ARCHITECTURES)
def test_in_float32_it_is_the_plain_formula(cls: type[Coder], size: str) -> None:
    from greatctl.sae.fused import FusedStep

    d_sae = SIZES[size]
    for n_dead, scale in ((0, 1.0), (37, 1.0), (200, 30.0)):
        ours, truth = coder_of(cls, d_sae), coder_of(cls, d_sae).double()
        fused = FusedStep(ours, 1e-3, Run("train"), dtype=torch.float32)
        plain, dead = PlainStep(truth, 1e-3, Run("train")), some_dead(d_sae, n_dead)
        for step in range(3):
            x, y = (None if t is None else t * scale for t in batch(cls, step))
            assert x is not None
            a = fused.gradients(x, y, dead=dead, step=step, seed=step)
            wide = None if y is None else y.double()
            b = plain.gradients(x.double(), wide, dead=dead, step=step, seed=step)
            for name, term in a.terms.items():
                assert float(term) == pytest.approx(float(b.terms[name]), rel=1e-4, abs=1e-9), name
            assert torch.equal(a.fired, b.fired)
            if float(b.norm) > 1:
                assert float(a.norm) == pytest.approx(float(b.norm), rel=1e-3)
            else:
                assert float(b.norm) <= float(a.norm) * 1.001
            fused.update(1e-3)
            plain.update(1e-3)
        for name, value in fused.state().items():
            assert apart(value, plain.state()[name]) < 2e-3, name
        assert torch.allclose(ours.W_dec.norm(dim=1), torch.ones(d_sae, device="cuda"), atol=1e-5)


@pytest.mark.parametrize("cls", ARCHITECTURES)
def test_in_bfloat16_losses_stay_within_its_rounding(cls: type[Coder]) -> None:
    """Where two latents are nearly equal, rounding decides which is chosen; over enough rows that evens out."""
    ours, truth = coder_of(cls, 12_000), coder_of(cls, 12_000)
    fused = choose(ours, 1e-3, Run("train"), torch.device("cuda"))
    plain, dead = PlainStep(truth, 1e-3, Run("train")), some_dead(12_000, 37)
    assert fused.name == "fused"
    losses: list[list[float]] = [[], []]
    for step in range(20):
        generator = torch.Generator("cuda").manual_seed(step)
        x = torch.randn(2048, D, generator=generator, device="cuda")
        y = torch.randn(2048, 72, generator=generator, device="cuda") if cls.reads_target else None
        for one, found in zip((fused, plain), losses, strict=True):
            taken = one.gradients(x, y, dead=dead, step=step, seed=step)
            found.append(float(taken.terms["mse"]))
            one.update(1e-3)
    assert losses[0][0] == pytest.approx(losses[1][0], rel=5e-3)
    assert losses[0] == pytest.approx(losses[1], rel=3e-2)
    assert sum(losses[0]) == pytest.approx(sum(losses[1]), rel=1e-2)


def test_what_is_chosen_is_what_torch_chooses() -> None:
    from greatctl.sae.kernels import choose_batch, choose_rows

    for dtype in (torch.float32, torch.bfloat16):
        for n, d_sae, k in ((50, 9000, 1), (33, 65_536, 64), (20, 100_000, 100), (7, 8200, 250), (40, 3000, 32)):
            pre = torch.randn(n, d_sae, device="cuda").to(dtype)
            best = pre.float().topk(k, dim=1).values.relu()
            codes = choose_rows(pre, k)
            assert torch.equal(codes.values.view(n, k).sort(dim=1, descending=True).values, best)
            assert torch.equal(pre.float()[codes.token.long(), codes.index.long()].relu(), codes.values)
            whole, lowest = choose_batch(pre, k)
            wanted = pre.float().flatten().topk(n * k).values
            assert float(lowest) == float(wanted[-1])
            assert torch.equal(whole.values.sort(descending=True).values, wanted)
            assert torch.equal(pre.float()[whole.token.long(), whole.index.long()], whole.values)
            assert len(set(zip(whole.token.tolist(), whole.index.tolist(), strict=True))) == n * k
    nothing, lowest = choose_batch(-torch.rand(4, 9000, device="cuda").bfloat16() - 1, 3)
    assert float(nothing.values.sum()) == 0 and 0 < float(lowest) < 1e-30


def test_its_state_is_that_of_the_plain_step() -> None:
    from greatctl.sae.fused import FusedStep

    x, _ = batch(TopK, 0)
    dead = some_dead(1000, 0)
    fused = FusedStep(coder_of(TopK), 1e-3, Run("train"), dtype=torch.float32)
    for step in range(3):
        fused(x, None, dead=dead, step=step, lr=1e-3, seed=step)
    state = {name: tensor.clone() for name, tensor in fused.state().items()}
    again = FusedStep(coder_of(TopK), 1e-3, Run("train"), dtype=torch.float32)
    again.restore(state)
    plain = PlainStep(coder_of(TopK), 1e-3, Run("train"))
    plain.restore(state)
    ends = []
    for one in (fused, again, plain):
        one(x, None, dead=dead, step=3, lr=1e-3, seed=3)
        ends.append(one.state())
    for name, tensor in ends[0].items():
        assert apart(tensor, ends[1][name]) < 1e-5, name
        assert apart(tensor, ends[2][name]) < 1e-3, name


def test_memory_that_runs_out_sends_it_to_the_plain_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from greatctl.sae import kernels

    x, _ = batch(TopK, 0)
    dead = some_dead(1000, 0)
    fused = choose(coder_of(TopK), 1e-3, Run("train"), torch.device("cuda"))
    fused(x, None, dead=dead, step=0, lr=1e-3, seed=0)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kernels, "residuals", full)
    plain = PlainStep(coder_of(TopK), 1e-3, Run("train"))
    plain.restore(fused.state())
    for one in (fused, plain):
        one(x, None, dead=dead, step=1, lr=1e-3, seed=1)
    assert torch.allclose(fused.coder.W_enc, plain.coder.W_enc, atol=1e-6)
    assert torch.allclose(fused.coder.W_dec, plain.coder.W_dec, atol=1e-6)


def test_nothing_in_a_step_waits_for_the_device() -> None:
    x, _ = batch(TopK, 0)
    for cls in ARCHITECTURES:
        step = choose(coder_of(cls, 12_000), 1e-3, Run("train"), torch.device("cuda"))
        y = batch(cls, 0)[1]
        dead = some_dead(12_000, 30)
        for at in range(4):
            if at == 3:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            try:
                step(x, y, dead=dead, step=at, lr=1e-3, seed=at)
            finally:
                torch.cuda.set_sync_debug_mode("default")
