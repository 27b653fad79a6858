"""The training loop: resuming, divergence, memory, dead latents, schedules."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import pytest
import torch
from planted import dictionary, planted, rows_of
from small_training import AUTOENCODERS, Soft, settings, trained
from torch import Tensor

from greatctl.errors import ResourceError, StageError
from greatctl.events import Run
from greatctl.sae import walk
from greatctl.sae.batchtopk import BatchTopK
from greatctl.sae.checkpoints import Checkpoints
from greatctl.sae.coder import Coder
from greatctl.sae.data import ActivationRows
from greatctl.sae.rows import Cursor
from greatctl.sae.schedule import default_batch_size, default_dead_window, default_lr
from greatctl.sae.setup import build
from greatctl.sae.step import quick_products
from greatctl.sae.topk import TopK
from greatctl.sae.trainer import Trainer

COULD_RESUME = {**AUTOENCODERS, "plugin": (Soft, {})}


def test_fault_56_fewer_rows_than_a_batch_and_constant_rows_train_without_nan(tmp_path: Path) -> None:
    few = trained(tmp_path / "few", TopK, torch.randn(40, 8), d_sae=16, options={"k": 2}, steps=5, batch_size=4096)
    assert few.tokens == 5 * few.rows.counts.train and math.isfinite(few.log[-1]["loss"])
    flat = trained(tmp_path / "flat", BatchTopK, torch.ones(100, 8), d_sae=16, options={"k": 2}, steps=5)
    assert all(math.isfinite(v) for row in flat.log for v in row.values())


@pytest.mark.parametrize(("cls", "options"), COULD_RESUME.values(), ids=COULD_RESUME)
def test_fault_53_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, cls: type[Coder], options: dict) -> None:
    acts = planted(3000, dictionary(32, 16))
    whole = trained(tmp_path / "whole", cls, acts, d_sae=32, options=options, steps=41, dead_window=300)
    rows = rows_of(tmp_path / "halves", acts)
    checkpoints = Checkpoints(tmp_path / "saved")
    rules = settings(steps=41, dead_window=300, checkpoint_every=7)
    coder = build(cls, cls.Config(d_in=16, d_sae=32, **options), 0)
    first = Trainer(coder, rows, rules, checkpoints, Run("train"))
    first.run.stop.request(15)
    for _ in range(2):  # stops after one step each time
        with pytest.raises(Exception, match="stopped on request"):
            Trainer(build(cls, cls.Config(d_in=16, d_sae=32, **options), 0), rows, rules, checkpoints, first.run).fit()
    last = Trainer(build(cls, cls.Config(d_in=16, d_sae=32, **options), 0), rows, rules, checkpoints, Run("train"))
    assert last.resumed_at == 2
    torch.rand(5)  # someone else's use of the global generator must not matter
    last.fit()
    for (name, a), b in zip(whole.coder.state_dict().items(), last.coder.state_dict().values(), strict=True):
        assert a.numpy().tobytes() == b.numpy().tobytes(), name
    assert whole.log == last.log and torch.equal(whole.since_fired, last.since_fired)


def poisoned(after: int, factor: float) -> type[TopK]:
    """TopK whose loss is multiplied from step `after` on."""

    class Poisoned(TopK):
        def losses(self, x: Tensor, *, dead: Tensor, step: int, **more) -> dict[str, Tensor]:
            terms = dict(super().losses(x, dead=dead, step=step, **more))
            return {**terms, "mse": terms["mse"] * (factor if step >= after else 1.0)}

    return Poisoned


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_fault_50_a_loss_that_is_not_finite_stops_at_the_last_good_checkpoint(tmp_path: Path, bad: float) -> None:
    acts = planted(2000, dictionary(32, 16))
    with pytest.raises(StageError, match="diverged at step 12") as caught:
        trained(tmp_path, poisoned(12, bad), acts, d_sae=32, options={"k": 2}, checkpoint_every=5)
    assert caught.value.exit_code == 1 and "--lr" in caught.value.fix
    assert "'batch'" in caught.value.why and "step 10" in caught.value.why
    tensors, state = Checkpoints(tmp_path / "checkpoints").latest()  # type: ignore[misc]
    assert state["step"] == 10
    assert all(bool(torch.isfinite(t).all()) for t in tensors.values())


def test_fault_50_an_exploding_loss_stops_and_a_single_bad_batch_does_not(tmp_path: Path) -> None:
    acts = planted(3000, dictionary(32, 16))
    more = {"d_sae": 32, "options": {"k": 2}, "steps": 90}
    with pytest.raises(StageError, match="diverged at step 7") as caught:
        trained(tmp_path / "explodes", poisoned(70, 100.0), acts, **more)
    assert "above 10 times its usual" in caught.value.why

    class Spike(TopK):
        def losses(self, x: Tensor, *, dead: Tensor, step: int, **more) -> dict[str, Tensor]:
            terms = dict(super().losses(x, dead=dead, step=step, **more))
            return {**terms, "mse": terms["mse"] * (100.0 if step in (60, 61, 75) else 1.0)}

    assert trained(tmp_path / "spikes", Spike, acts, **more).step == 90


def test_fit_says_how_many_tokens_a_second_it_took(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "shards", planted(2000, dictionary(32, 16)))
    coder = build(TopK, TopK.Config(d_in=16, d_sae=32, k=2), 0)
    trainer = Trainer(coder, rows, settings(), Checkpoints(tmp_path / "kept"), Run("train"))
    assert trainer.fit() > 0 and trainer.tokens > 0


def test_fault_50_losses_that_are_looked_at_late_are_still_looked_at_before_a_checkpoint(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "shards", planted(2000, dictionary(32, 16)))
    cls = poisoned(12, float("nan"))
    coder = build(cls, cls.Config(d_in=16, d_sae=32, k=2), 0)
    rules = settings(checkpoint_every=20, log_every=10**6)
    trainer = Trainer(coder, rows, rules, Checkpoints(tmp_path / "kept"), Run("train"))
    trainer.watch.every = 50  # as on a GPU
    with pytest.raises(StageError, match="diverged at step 12"):
        trainer.fit()
    assert trainer.step == 20 and Checkpoints(tmp_path / "kept").latest() is None


def tight(cls: type[Coder], most: int) -> type[Coder]:
    """The architecture on a machine whose memory holds `most` rows."""

    class Tight(cls):  # type: ignore[misc, valid-type]
        def losses(self, x: Tensor, **more) -> dict[str, Tensor]:
            if x.shape[0] > most:
                raise torch.OutOfMemoryError("made up")
            return super().losses(x, **more)

    return Tight


@pytest.mark.parametrize(("cls", "options"), AUTOENCODERS.values(), ids=AUTOENCODERS)
def test_fault_51_a_batch_that_does_not_fit_is_cut_and_gives_the_same_result(
    tmp_path: Path, cls: type[Coder], options: dict
) -> None:
    acts = planted(3000, dictionary(32, 16))
    more = {"d_sae": 32, "options": options, "steps": 25, "batch_size": 200, "dead_window": 400}
    whole = trained(tmp_path / "whole", cls, acts, **more)
    cut = trained(tmp_path / "cut", tight(cls, 60), acts, **more)
    assert (whole.parts.count, cut.parts.count) == (1, 4)
    for name, value in whole.coder.state_dict().items():
        assert torch.allclose(value, cut.coder.state_dict()[name], atol=2e-4, equal_nan=True), name
    for one, other in zip(whole.log, cut.log, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
    assert torch.equal(whole.since_fired, cut.since_fired)


def test_fault_51_parts_that_cannot_be_cut_further_are_exit_9(tmp_path: Path) -> None:
    said = []
    rows = rows_of(tmp_path / "shards", planted(2000, dictionary(32, 16)))
    cls = tight(TopK, 8)
    trainer = Trainer(
        build(cls, cls.Config(d_in=16, d_sae=32, k=2), 0),
        rows,
        settings(batch_size=128),
        Checkpoints(tmp_path / "kept"),
        Run("train", lambda event: said.append(event.message)),
    )
    with pytest.raises(ResourceError, match="does not fit") as caught:
        trainer.fit()
    assert caught.value.exit_code == 9 and "--batch-size" in caught.value.fix
    assert any("in 2 parts" in message for message in said)


def test_a_frozen_decoder_stays_as_it_was_drawn(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "shards", planted(2000, dictionary(32, 16)))
    coder = build(TopK, TopK.Config(d_in=16, d_sae=32, k=2), 0)
    coder.frozen_decoder = True
    before = {name: value.clone() for name, value in coder.state_dict().items()}
    trainer = Trainer(coder, rows, settings(steps=20, checkpoint_every=5), Checkpoints(tmp_path / "kept"), Run("train"))
    trainer.fit()
    assert torch.equal(before["W_dec"], coder.W_dec) and not torch.equal(before["W_enc"], coder.W_enc)


def test_a_torn_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (5, 10, 15):
        checkpoints.write(step, {"a": torch.tensor(float(step))}, {"step": step})
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["step-000000010.safetensors", "step-000000015.safetensors"]
    (tmp_path / names[1]).write_bytes(b"torn")
    assert checkpoints.latest() == ({"a": torch.tensor(10.0)}, {"step": 10})


def test_the_rate_warms_up_stays_and_falls_to_zero_over_the_last_fifth() -> None:
    rules = settings(steps=100, lr=1.0, warmup_steps=10)
    assert [rules.lr_at(s) for s in (0, 9, 50, 79, 80, 90, 99)] == pytest.approx([0.1, 1, 1, 1, 1, 0.5, 0.05])
    assert default_lr(32768, 50_000) == pytest.approx(4e-4 / math.sqrt(2)) and default_lr(64, 100) == 1e-2
    assert default_lr(64, 100, reads_target=True) == 2e-3
    assert default_lr(32768, 2500) == pytest.approx(4 * default_lr(32768, 10_000))
    assert default_dead_window(10**9, 4096) == 10_000_000 and default_dead_window(1000, 64) == 512
    assert default_batch_size(10**7, 4 * 10**7) == 4096 and default_batch_size(100_000, 400_000) == 256


def test_a_dead_latent_is_one_that_has_not_fired_within_the_window(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, planted(2000, dictionary(32, 16)))
    coder = build(TopK, TopK.Config(d_in=16, d_sae=32, k=2, aux_coefficient=0.0), 0)
    with torch.no_grad():
        coder.b_enc[0] = -1e6
    trainer = Trainer(coder, rows, settings(steps=10, dead_window=2000), Checkpoints(tmp_path / "c"), Run("train"))
    trainer.fit()
    assert trainer.since_fired[0] == trainer.tokens > 2000
    assert bool(trainer.dead[0]) and not bool(trainer.dead.all())


def test_reading_the_next_block_ahead_gives_the_same_batches(tmp_path: Path) -> None:
    acts = planted(3000, dictionary(32, 16))
    plain = rows_of(tmp_path / "plain", acts, shard=400, budget=60_000)
    ahead = rows_of(tmp_path / "ahead", acts, shard=400, budget=60_000, ahead=True)
    assert len(plain.blocks(0, 0)) > 2
    streams = [rows.stream(3, 256, Cursor()) for rows in (plain, ahead)]
    for _ in range(25):  # more than two epochs
        (one, x, _), (other, y, _) = (next(stream) for stream in streams)
        assert one == other and torch.equal(x, y)
    assert one.epoch == 2
    ahead.release()
    assert ahead._coming is None


def test_products_are_quick_on_a_gpu_alone_and_not_beside_a_model_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), quick_products(torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "high"
        raise KeyError
    assert torch.get_float32_matmul_precision() == before
    with quick_products(torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == before

    asked: list[torch.device] = []

    def noted(device: torch.device) -> contextlib.nullcontext:
        asked.append(device)
        return contextlib.nullcontext()

    monkeypatch.setattr(walk, "quick_products", noted)
    acts = planted(300, dictionary(32, 16))
    trained(tmp_path / "stored", TopK, acts, d_sae=32, options={"k": 2}, steps=1)
    assert asked == [torch.device("cpu")]
    monkeypatch.setattr(walk, "StreamRows", ActivationRows)  # as if these rows were harvested on the way
    trained(tmp_path / "streamed", TopK, acts, d_sae=32, options={"k": 2}, steps=1)
    assert len(asked) == 1
