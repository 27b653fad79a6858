"""Each architecture against its formula: losses, gradients, parts of a batch, folding, thresholds, steering."""

from __future__ import annotations

import math
import re

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from greatctl.errors import PluginError
from greatctl.extend.testing import check_architecture
from greatctl.sae.auxk import auxk
from greatctl.sae.batchtopk import BatchTopK, kth_largest, lowest_kept
from greatctl.sae.coder import Coder
from greatctl.sae.contract import check_contract
from greatctl.sae.gated import Gated
from greatctl.sae.jumprelu import JumpRelu
from greatctl.sae.matryoshka import Matryoshka
from greatctl.sae.relu import Relu
from greatctl.sae.skip_transcoder import SkipTranscoder
from greatctl.sae.steering import Steering
from greatctl.sae.topk import TopK
from greatctl.sae.transcoder import Transcoder

D_IN, D_SAE, D_OUT = 12, 40, 9
EVERY: dict[str, tuple[type[Coder], dict]] = {
    "relu": (Relu, {"l1_coefficient": 0.1, "l1_warmup_steps": 20}),
    "relu-unit": (Relu, {"l1_coefficient": 0.1, "decoder_norm_weighted": False}),
    "relu-k": (Relu, {"k": 5}),
    "gated": (Gated, {"l1_coefficient": 0.3}),
    "topk": (TopK, {"k": 4}),
    "batchtopk": (BatchTopK, {"k": 4}),
    "jumprelu": (JumpRelu, {"l0_coefficient": 0.3, "l0_warmup_steps": 20}),
    "jumprelu-k": (JumpRelu, {"k": 4}),
    "matryoshka": (Matryoshka, {"k": 4, "widths": (3, 11, 40)}),
    "transcoder": (Transcoder, {"k": 4, "d_out": D_OUT}),
    "skip-transcoder": (SkipTranscoder, {"k": 4, "d_out": D_OUT}),
}
TOPK_FAMILY = ["topk", "batchtopk", "matryoshka", "transcoder", "skip-transcoder"]
each = pytest.mark.parametrize("name", EVERY)


def coder_of(name: str, *, seed: int = 3) -> Coder:
    """A coder in fp64 and away from its initialisation, so that nothing is accidentally zero or tied."""
    cls, options = EVERY[name]
    torch.manual_seed(seed)
    coder = cls(cls.Config(d_in=D_IN, d_sae=D_SAE, **options)).double()
    g = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=g)
    if isinstance(coder, JumpRelu):
        coder.begun.fill_(True)
    coder.after_step()
    return coder


def batch(n: int = 16, *, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Rows and targets."""
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, width, generator=g, dtype=torch.float64) for width in (D_IN, D_OUT))
    return x, y


def terms_of(coder: Coder, x: Tensor, y: Tensor, dead: Tensor, step: int, **more: object) -> dict[str, Tensor]:
    """`losses`, with the target where it is read."""
    return dict(coder.losses(x, dead=dead, step=step, **({"target": y} if coder.reads_target else {}), **more))


def some_dead() -> Tensor:
    """Every third latent."""
    return torch.arange(D_SAE) % 3 == 0


# ---------------------------------------------------------------- the formulas, written a second time


def naive(coder: Coder, x: Tensor, y: Tensor, dead: Tensor, step: int) -> dict[str, Tensor]:
    """The docstrings' formulas, row by row, with nothing in common with the code under test."""
    if isinstance(coder, Relu):
        return naive_relu(coder, x, step)
    if isinstance(coder, Gated):
        return naive_gated(coder, x)
    if isinstance(coder, JumpRelu):
        return naive_jumprelu(coder, x, step)
    return naive_topk(coder, x, y if coder.reads_target else x, dead)


def naive_relu(coder: Relu, x: Tensor, step: int) -> dict[str, Tensor]:
    config = coder.config
    latents = torch.stack([((row - coder.b_dec) @ coder.W_enc + coder.b_enc).clamp_min(0) for row in x])
    norms = torch.stack([(w * w).sum() ** 0.5 if config.decoder_norm_weighted else w.new_ones(()) for w in coder.W_dec])
    error = sum(((row - a @ coder.W_dec - coder.b_dec) ** 2).sum() for row, a in zip(x, latents, strict=True))
    warm = min(1, (step + 1) / config.l1_warmup_steps) if config.l1_warmup_steps else 1
    l1 = config.l1_coefficient * warm * sum((a * norms).sum() for a in latents) / math.sqrt(D_IN)
    return {"mse": error / len(x) / D_IN, "l1": l1 / len(x)}


def naive_gated(coder: Gated, x: Tensor) -> dict[str, Tensor]:
    n, total = len(x), {"mse": 0.0, "l1": 0.0, "gate": 0.0}
    still_W, still_b = coder.W_dec.detach().clone(), coder.b_dec.detach().clone()
    for row in x:
        h = (row - coder.b_dec) @ coder.W_enc
        magnitude = (h * torch.exp(coder.r_mag) + coder.b_mag).clamp_min(0)
        gate = (h + coder.b_gate).clamp_min(0)
        a = magnitude * (h.detach() + coder.b_gate.detach() > 0)
        total["mse"] += ((row - a @ coder.W_dec - coder.b_dec) ** 2).sum() / n / D_IN
        total["l1"] += coder.config.l1_coefficient * gate.sum() / n / math.sqrt(D_IN)
        total["gate"] += ((row - gate @ still_W - still_b) ** 2).sum() / n / D_IN
    return total  # type: ignore[return-value]


def naive_jumprelu(coder: JumpRelu, x: Tensor, step: int) -> dict[str, Tensor]:
    """Values, and gradients in all but the threshold (see the test of the straight-through estimate)."""
    config, theta = coder.config, torch.exp(coder.log_threshold.detach())
    pre = torch.stack([(row - coder.b_dec) @ coder.W_enc + coder.b_enc for row in x])
    open_ = (pre.detach() > theta).double()
    residual = x - ((pre * open_) @ coder.W_dec + coder.b_dec)
    l0 = open_.sum() / len(x)
    if config.k:
        return {"mse": (residual**2).sum() / len(x) / D_IN, "l0": config.target_coefficient * (l0 / config.k - 1) ** 2}
    warm = min(1, (step + 1) / config.l0_warmup_steps)
    return {"mse": (residual**2).sum() / len(x) / D_IN, "l0": config.l0_coefficient * warm * l0 / D_IN}


def naive_topk(coder: TopK, x: Tensor, y: Tensor, dead: Tensor) -> dict[str, Tensor]:
    n, k = len(x), coder.config.k
    shift = 0 if coder.reads_target else coder.b_dec
    pre = torch.stack([(row - shift) @ coder.W_enc + coder.b_enc for row in x])
    keep = torch.zeros_like(pre)
    if isinstance(coder, BatchTopK):
        keep.view(-1)[pre.detach().flatten().sort(descending=True).indices[: n * k]] = 1
    else:
        for i, row in enumerate(pre.detach()):
            keep[i, row.sort(descending=True).indices[:k]] = 1
    latents = (pre * keep).clamp_min(0)
    skip = x @ coder.W_skip.T if isinstance(coder, SkipTranscoder) else 0
    widths = coder.config.widths if isinstance(coder, Matryoshka) else (D_SAE,)
    residuals = [y - (latents[:, :m] @ coder.W_dec[:m] + coder.b_dec + skip) for m in widths]
    d = y.shape[1]
    mse = sum((r**2).sum() for r in residuals) / len(widths) / n / d
    error = residuals[-1].detach()
    index = [i for i in range(D_SAE) if dead[i]]
    rebuilt = []
    for row in pre:
        best = sorted(index, key=lambda i: -row[i].item())[: min(d // 2, len(index))]
        rebuilt.append(sum((row[i].clamp_min(0) * coder.W_dec[i] for i in best), torch.zeros(d, dtype=x.dtype)))
    share = ((error - torch.stack(rebuilt)) ** 2).sum() / ((error - error.mean(dim=0)) ** 2).sum()
    return {"mse": mse, "auxk": coder.config.aux_coefficient * share}


@each
def test_each_loss_term_has_the_value_and_the_gradient_of_its_formula(name: str) -> None:
    coder, (x, y), dead = coder_of(name), batch(), some_dead()
    expected, found = naive(coder, x, y, dead, 7), terms_of(coder, x, y, dead, 7)
    assert set(found) == set(expected)
    parameters = {n: p for n, p in coder.named_parameters() if n != "log_threshold"}  # that one is estimated
    for term, value in found.items():
        assert value.item() == pytest.approx(torch.as_tensor(expected[term]).item(), rel=1e-10), term
        ours = torch.autograd.grad(value, list(parameters.values()), retain_graph=True, allow_unused=True)
        theirs: tuple[Tensor | None, ...] = (None,) * len(ours)
        if expected[term].requires_grad:
            theirs = torch.autograd.grad(
                expected[term], list(parameters.values()), retain_graph=True, allow_unused=True
            )
        for parameter, a, b in zip(parameters, ours, theirs, strict=True):
            zero = torch.zeros((), dtype=torch.float64)
            assert torch.allclose(zero if a is None else a, zero if b is None else b, atol=1e-10), (term, parameter)


# ---------------------------------------------------------------- JumpReLU's estimate


@pytest.mark.parametrize("name", ["jumprelu", "jumprelu-k"])
def test_the_thresholds_gradient_is_the_straight_through_estimate_in_closed_form(name: str) -> None:
    coder, (x, y) = coder_of(name), batch(64)
    config, theta = coder.config, coder.threshold.detach()
    with torch.no_grad():
        pre = coder.pre_acts(x)
        near = ((pre - theta) / config.bandwidth).abs() < 0.5
        residual = x - coder.reconstruct(x)
        d_latents = -2 * residual @ coder.W_dec.T / len(x) / D_IN  # d mse / d latents
        l0 = (pre > theta).double().sum() / len(x)
        slope = 2 * config.target_coefficient * (l0 / config.k - 1) / config.k if config.k else None
        slope = config.l0_coefficient * (8 / 20) / D_IN if slope is None else slope
        wanted = {
            "mse": (d_latents * -(theta / config.bandwidth) * near).sum(dim=0) * theta,
            "l0": slope * -(near.double().sum(dim=0) / config.bandwidth) / len(x) * theta,
        }
    found = terms_of(coder, x, y, some_dead(), 7)
    for term, value in found.items():
        (grad,) = torch.autograd.grad(value, coder.log_threshold, retain_graph=True)
        assert float(grad.norm()) > 1e-6 and torch.allclose(grad, wanted[term], atol=1e-12), term


def test_the_estimate_is_the_derivative_of_the_mean_over_many_tokens() -> None:
    torch.manual_seed(0)
    coder = JumpRelu(JumpRelu.Config(d_in=1, d_sae=1, l0_coefficient=1.0, bandwidth=0.1)).double()
    with torch.no_grad():
        coder.W_enc.fill_(1)
        coder.W_dec.fill_(0.5)
        coder.log_threshold.fill_(math.log(0.4))
    x = torch.randn(400_000, 1, dtype=torch.float64)

    def means(theta: float) -> dict[str, float]:
        with torch.no_grad():
            coder.log_threshold.fill_(math.log(theta))
            return {k: v.item() for k, v in coder.losses(x, dead=torch.zeros(1, dtype=torch.bool), step=0).items()}

    high, low = means(0.45), means(0.35)
    means(0.4)
    for term, value in coder.losses(x, dead=torch.zeros(1, dtype=torch.bool), step=0).items():
        (grad,) = torch.autograd.grad(value, coder.log_threshold, retain_graph=True)
        assert float(grad) / 0.4 == pytest.approx((high[term] - low[term]) / 0.1, rel=0.05), term


def test_with_k_the_thresholds_start_where_the_first_batch_has_that_l0() -> None:
    torch.manual_seed(0)
    coder = JumpRelu(JumpRelu.Config(d_in=D_IN, d_sae=D_SAE, k=6))
    x = torch.randn(500, D_IN)
    coder.losses(x, dead=some_dead(), step=0)
    assert float((coder.encode(x) > 0).sum()) / 500 == pytest.approx(6, abs=0.01)
    before = coder.threshold.clone()
    coder.losses(x + 1, dead=some_dead(), step=1)
    assert torch.equal(coder.threshold, before) and bool(coder.state_dict()["begun"])


# ---------------------------------------------------------------- AuxK, projection, a frozen decoder


@pytest.mark.parametrize("name", TOPK_FAMILY)
def test_auxk_moves_the_encoders_of_dead_latents_and_of_no_others(name: str) -> None:
    coder, (x, y), dead = coder_of(name), batch(32), torch.arange(D_SAE) < 8
    auxiliary = terms_of(coder, x, y, dead, 0)["auxk"]
    (encoder, decoder) = torch.autograd.grad(auxiliary, [coder.W_enc, coder.W_dec])
    assert float(encoder[:, :8].norm()) > 1e-3 and float(encoder[:, 8:].norm()) == 0
    assert float(decoder[:8].norm()) > 1e-3 and float(decoder[8:].norm()) == 0
    nothing = terms_of(coder, x, y, torch.zeros(D_SAE, dtype=torch.bool), 0)["auxk"]
    assert nothing.item() == 0.0


def test_auxk_without_variance_counts_as_zero_and_is_counted() -> None:
    coder, (x, y) = coder_of("topk"), batch(1)  # one row has no variance to explain
    assert terms_of(coder, x, y, some_dead(), 0)["auxk"].item() == 0.0 and coder.counts["auxk_not_finite"] == 1
    nothing = torch.zeros(1, D_IN, dtype=torch.float64)
    assert auxk(torch.zeros(1, D_SAE, dtype=torch.float64), nothing, coder.W_dec, some_dead()) is None


@each
def test_the_gradient_along_unit_rows_is_removed_and_free_rows_keep_theirs(name: str) -> None:
    coder, (x, y) = coder_of(name), batch()
    sum(terms_of(coder, x, y, some_dead(), 0).values()).backward()  # type: ignore[union-attr]
    across = coder.W_dec.grad - (coder.W_dec.grad * coder.W_dec).sum(1, keepdim=True) * coder.W_dec.detach()
    coder.project_gradients()
    if isinstance(coder, Relu | Gated):
        coder.W_dec.grad /= D_IN  # see `even_steps`
    along = float((coder.W_dec.grad * coder.W_dec.detach()).sum(dim=1).abs().max())
    assert coder.unit_decoder is (name not in ("relu", "relu-k"))
    assert (along < 1e-12) is coder.unit_decoder
    assert torch.allclose(coder.W_dec.grad, across) is coder.unit_decoder


@each
def test_a_frozen_decoder_stays_as_it_was_drawn_while_the_rest_learns(name: str) -> None:
    coder, (x, y) = coder_of(name), batch()
    coder.frozen_decoder = True
    before = {n: p.clone() for n, p in coder.named_parameters()}
    adam = torch.optim.Adam(coder.parameters(), lr=1e-2)
    for step in range(3):
        adam.zero_grad()
        sum(terms_of(coder, x, y, some_dead(), step).values()).backward()  # type: ignore[union-attr]
        coder.project_gradients()
        adam.step()
        coder.after_step()
    after = dict(coder.named_parameters())
    assert torch.equal(after["W_dec"], before["W_dec"])
    assert not torch.equal(after["W_enc"], before["W_enc"]) and not torch.equal(after["b_dec"], before["b_dec"])


# ---------------------------------------------------------------- a batch in parts


@each
@pytest.mark.parametrize("begun", [True, False])
def test_a_batch_in_parts_has_the_losses_and_gradients_of_the_whole(name: str, begun: bool) -> None:
    x, y = batch(50)
    whole, split = coder_of(name), coder_of(name)
    for coder in (whole, split):
        if isinstance(coder, JumpRelu) and coder.config.k:
            coder.begun.fill_(begun)
    terms = terms_of(whole, x, y, some_dead(), 9)
    sum(terms.values()).backward()  # type: ignore[union-attr]
    xs, ys = x.split(17), y.split(17)
    with torch.no_grad():
        targets = {"targets": ys} if split.reads_target else {}
        more = {} if split.separable else {"shared": split.prepare(xs, dead=some_dead(), **targets)}
    total = dict.fromkeys(terms, 0.0)
    for a, b in zip(xs, ys, strict=True):
        for term, value in terms_of(split, a, b, some_dead(), 9, **more).items():
            total[term] += value.item() * len(a) / 50
            (value * len(a) / 50).backward(retain_graph=True)
    assert total == pytest.approx({k: v.item() for k, v in terms.items()}, rel=1e-9)
    for (parameter, a), b in zip(whole.named_parameters(), split.parameters(), strict=True):
        assert a.grad is not None and torch.allclose(a.grad, b.grad, atol=1e-11), parameter
    assert torch.equal(whole.take_fired(x), split.take_fired(x))
    whole.after_step()
    split.after_step()
    for (buffer, a), b in zip(whole.named_buffers(), split.buffers(), strict=True):
        assert torch.equal(a, b), buffer


def test_the_kth_largest_is_exact_whole_and_in_parts() -> None:
    g = torch.Generator().manual_seed(1)
    for rows, width, k in ((500, 512, 8), (7, 9, 2), (300, 256, 1), (64, 30, 29)):
        values = torch.randn(rows, width, generator=g)
        expected = values.flatten().sort(descending=True).values[rows * k - 1]
        if expected > 0:
            assert kth_largest(values, rows * k) == expected
        assert lowest_kept(lambda v=values: iter(v.split(101)), k) == kth_largest(values, rows * k)
    few = torch.tensor([[-1.0, 2.0], [3.0, -4.0]])
    assert kth_largest(few, 3) == 2.0 and kth_largest(-few.abs(), 3) > 0
    assert lowest_kept(lambda: iter([-torch.ones(4, 8)] * 2), 2) > 0  # nothing is positive in any part


def test_reading_in_training_mode_changes_no_state() -> None:
    for name in EVERY:
        coder, (x, _) = coder_of(name), batch()
        before = {k: v.clone() for k, v in coder.state_dict().items()}
        coder.encode(x)
        assert all(torch.equal(before[k], v) for k, v in coder.state_dict().items()), name


# ---------------------------------------------------------------- folding, thresholds, steering


@each
def test_folded_it_reads_and_writes_raw_rows(name: str) -> None:
    coder, (x, _) = coder_of(name).eval(), batch(200)
    if isinstance(coder, BatchTopK):
        coder.threshold.fill_(0.4)
    scale, out = 3.7, 0.21 if coder.reads_target else 3.7
    twin = coder.folded(scale, out)
    with torch.no_grad():
        assert torch.allclose(twin.reconstruct(x), coder.reconstruct(scale * x) / out, atol=1e-12)
        latents, raw = coder.encode(scale * x), twin.encode(x)
        assert torch.equal(raw > 0, latents > 0)
        assert torch.allclose(raw[:, :, None] * twin.W_dec, latents[:, :, None] * coder.W_dec / out, atol=1e-12)
        assert torch.allclose(twin.W_dec.norm(dim=1), torch.ones(D_SAE, dtype=torch.float64))


@pytest.mark.parametrize("name", [n for n in TOPK_FAMILY if n != "topk"])
def test_the_threshold_is_calibrated_so_that_other_rows_have_l0_k(name: str) -> None:
    coder = coder_of(name)
    coder.calibrate(batch(20_000, seed=1)[0])
    coder.eval()
    with torch.no_grad():
        l0 = float((coder.encode(batch(20_000, seed=2)[0]) > 0).sum()) / 20_000
    assert l0 == pytest.approx(4, rel=0.02)


def test_a_transcoder_starts_at_the_targets_mean_and_centres_its_input() -> None:
    coder, (x, y) = coder_of("transcoder"), batch(300)
    x, y = x + 5, y - 3
    coder.start(x.mean(dim=0), y.mean(dim=0))
    assert torch.allclose(coder.b_dec, y.mean(dim=0))
    assert torch.allclose(coder.pre_acts(x).mean(dim=0), torch.zeros((), dtype=torch.float64), atol=1e-9)
    other = coder_of("topk")
    other.start(x.mean(dim=0))
    assert torch.allclose(other.b_dec, x.mean(dim=0))


def test_steering_finds_the_coefficient_of_a_wanted_l0_and_its_state_is_in_buffers() -> None:
    def l0_at(factor: float) -> float:
        return 100 * factor**-0.7

    def run(steering: Steering, steps: int) -> None:
        for _ in range(steps):
            count = round(1000 * l0_at(float(steering.factor)))
            steering.note(torch.ones(1, count), first=True)
            steering.note(torch.zeros(999, 1), first=False)
            steering.step()

    steering = Steering(10)
    run(steering, 1400)
    assert l0_at(float(steering.factor)) == pytest.approx(10, rel=0.02)
    again = Steering(10)
    run(again, 300)
    resumed = Steering(10)
    resumed.load_state_dict(again.state_dict())
    run(resumed, 1100)
    assert torch.equal(resumed.exponent, steering.exponent) and torch.equal(resumed.integral, steering.integral)
    resting = Steering(10, rest=100)
    run(resting, 100)
    assert float(resting.factor) == 1
    run(resting, 2400)
    assert l0_at(float(resting.factor)) == pytest.approx(10, rel=0.02)
    still = Steering(None)
    run(still, 5)
    assert float(still.factor) == 1


@pytest.mark.parametrize("name", ["relu", "relu-k", "gated"])
def test_a_penalty_s_gradients_are_those_of_the_summed_error(name: str) -> None:
    coder, (x, y) = coder_of(name), batch()
    sum(terms_of(coder, x, y, some_dead(), 0).values()).backward()  # type: ignore[union-attr]
    before = {n: p.grad.clone() for n, p in coder.named_parameters() if n != "W_dec"}
    coder.project_gradients()
    after = dict(coder.named_parameters())
    assert all(torch.allclose(after[n].grad, D_IN * grad) for n, grad in before.items())
    coder.W_dec.grad = None  # a frozen decoder has none
    coder.project_gradients()


def test_matryoshka_s_widths_default_to_the_published_groups_and_must_rise_to_d_sae() -> None:
    def widths(d_sae: int, given: object = None) -> tuple[int, ...]:
        return Matryoshka(Matryoshka.Config(d_in=4, d_sae=d_sae, k=1, widths=given)).widths

    assert widths(2048) == (64, 192, 448, 960, 2048) and widths(4) == (1, 4)
    assert widths(64, "8, 32 64") == (8, 32, 64)
    for wrong in ((8, 32), (32, 8, 64), (0, 64), (8, 8, 64)):
        with pytest.raises(ValidationError, match="do not rise"):
            widths(64, wrong)
    with pytest.raises(ValidationError, match="k = 41 is above d_sae = 40"):
        TopK.Config(d_in=12, d_sae=40, k=41)


# ---------------------------------------------------------------- the contract


def test_the_contract_covers_targets_and_what_is_written() -> None:
    class Wide(Transcoder):
        def reconstruct(self, x: Tensor) -> Tensor:
            return super().reconstruct(x).repeat(1, 2)

    class Deaf(Transcoder):
        def losses(self, x: Tensor, *, dead: Tensor, step: int) -> dict[str, Tensor]:  # type: ignore[override]
            return {}

    class Half(Relu):
        def decode(self, latents: Tensor) -> Tensor:
            return super().decode(latents).half()

    def config(cls: type[Coder], **more: object) -> Coder:
        return cls(cls.Config(d_in=6, d_sae=10, **more))

    for name, (cls, options) in EVERY.items():
        torch.manual_seed(0)
        assert check_contract(cls(cls.Config(d_in=D_IN, d_sae=D_SAE, **options))) is None, name
    for coder, words in (
        (config(Wide, k=2, d_out=5), r"reconstruct gives .*\[8, 5\].* \[8, 10\]"),
        (config(Deaf, k=2, d_out=5), "target"),
        (config(Half), "float16"),
    ):
        with pytest.raises(PluginError) as caught:
            check_contract(coder)
        assert caught.value.exit_code == 8 and re.search(words, caught.value.why)


def test_a_loss_that_is_no_mean_over_rows_must_say_so() -> None:
    class Tangled(Relu):
        def losses(self, x: Tensor, *, dead: Tensor, step: int) -> dict[str, Tensor]:
            terms = dict(super().losses(x, dead=dead, step=step))
            return {**terms, "mse": terms["mse"] / x.var()}

    with pytest.raises(AssertionError, match="separable"):
        check_architecture(Tangled)
