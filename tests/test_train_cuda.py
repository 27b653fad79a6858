"""Training on a GPU: every architecture follows the curve of the CPU, and nothing in a step waits for the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from planted import dictionary, planted, rows_of, write_shards
from small_training import AUTOENCODERS, TRANSCODERS, settings

from greatctl.errors import InterruptedRun, ResourceError, StageError
from greatctl.events import Run
from greatctl.sae.checkpoints import Checkpoints
from greatctl.sae.coder import Coder
from greatctl.sae.data import ActivationRows
from greatctl.sae.feed import feed
from greatctl.sae.rows import Cursor
from greatctl.sae.setup import build
from greatctl.sae.topk import TopK
from greatctl.sae.trainer import Trainer
from greatctl.sae.walk import walk
from greatctl.store.shards import ShardReader

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
CODERS = {**AUTOENCODERS, **TRANSCODERS}
STEPS = 50


def pair_of(folder: Path) -> ActivationRows:
    """Rows of 32 numbers with targets of 24, a linear map of them."""
    acts = planted(8000, dictionary(64, 32))
    target = acts @ torch.randn(32, 24, generator=torch.Generator().manual_seed(4))
    window = torch.arange(8000) // 16
    for name, values in (("x", acts), ("y", target)):
        write_shards(folder / name, values, window, torch.ones(8000), size=3000)
    held = torch.arange(500) >= 475
    return ActivationRows(ShardReader(folder / "x"), [0], held, target=ShardReader(folder / "y"))


def trainer_of(
    folder: Path, name: str, device: str, rows: ActivationRows, cls: type[Coder] | None = None, **changes
) -> Trainer:
    kind, options = CODERS[name]
    kind = cls or kind
    extra = {"d_out": 24} if name in TRANSCODERS else {}
    coder = build(kind, kind.Config(d_in=32, d_sae=128, **options, **extra), 0)
    rules = settings(**{"steps": STEPS, "dead_window": 3000, "log_every": 1, **changes})
    return Trainer(coder, rows, rules, Checkpoints(folder), Run("train"), device)


@pytest.mark.parametrize("name", CODERS)
def test_the_curve_on_cuda_is_that_of_the_cpu(tmp_path: Path, name: str) -> None:
    rows = pair_of(tmp_path) if name in TRANSCODERS else rows_of(tmp_path, planted(8000, dictionary(64, 32)))
    curves = []
    for device in ("cpu", "cuda"):
        trainer = trainer_of(tmp_path / device, name, device, rows)
        trainer.fit()
        curves.append(trainer.log)
        assert trainer.step == STEPS and trainer.coder.W_dec.device.type == device
    for ours, theirs in zip(*curves, strict=True):
        assert ours["lr"] == theirs["lr"] and ours["tokens"] == theirs["tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02, abs=1e-3)
        assert ours["explained_variance"] == pytest.approx(theirs["explained_variance"], abs=0.02)


@pytest.mark.parametrize("name", CODERS)
def test_a_resumed_run_on_cuda_goes_on_where_it_was(tmp_path: Path, name: str) -> None:
    rows = pair_of(tmp_path) if name in TRANSCODERS else rows_of(tmp_path, planted(8000, dictionary(64, 32)))
    whole = trainer_of(tmp_path / "whole", name, "cuda", rows)
    whole.fit()
    stopped = trainer_of(tmp_path / "halves", name, "cuda", rows)
    stopped.run.stop.request(15)
    with pytest.raises(InterruptedRun):
        stopped.fit()
    again = trainer_of(tmp_path / "halves", name, "cuda", rows)
    assert again.resumed_at == 1
    again.fit()
    assert [row["step"] for row in again.log] == list(range(STEPS))
    assert again.log[-1]["loss"] == pytest.approx(whole.log[-1]["loss"], rel=0.02)


def test_a_step_makes_the_cpu_wait_for_nothing(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, planted(8000, dictionary(64, 32)))
    rules = {"log_every": 10**6, "dead_window": 10**6}
    trainer = trainer_of(tmp_path / "kept", "relu", "cuda", rows, **rules)
    with feed(rows.stream(0, 256, Cursor()), torch.device("cuda")) as batches:
        for step in range(12):
            cursor, x, _ = next(batches)
            trainer.step = step + 1  # step 0 would be a point of the curve, which may wait
            torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
            try:
                trainer.take(x.float(), None, cursor)
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_batches_that_are_copied_ahead_are_those_of_the_stream(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, planted(8000, dictionary(64, 32)))
    plain = rows.stream(0, 256, Cursor())
    with feed(rows.stream(0, 256, Cursor()), torch.device("cuda")) as batches:
        for _ in range(40):
            (one, x, _), (other, y, _) = next(plain), next(batches)
            assert one == other and y.is_cuda and torch.equal(x, y.cpu())


def test_trainers_in_one_walk_learn_what_they_learn_alone_and_the_waiting_is_measured(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, planted(8000, dictionary(64, 32)))
    alone = [trainer_of(tmp_path / f"alone-{name}", name, "cuda", rows) for name in ("topk", "relu")]
    together = [trainer_of(tmp_path / f"both-{name}", name, "cuda", rows) for name in ("topk", "relu")]
    for trainer in alone:
        trainer.fit()
    walked = walk(together)
    for one, other in zip(alone, together, strict=True):
        assert one.log[-1]["loss"] == pytest.approx(other.log[-1]["loss"], rel=0.02)
    assert 0 <= walked.waited < walked.seconds and all(0 < s < walked.seconds for s in walked.steps)


def test_divergence_is_found_late_and_no_checkpoint_holds_it(tmp_path: Path) -> None:
    class Poisoned(TopK):
        def losses(self, x: torch.Tensor, *, dead: torch.Tensor, step: int, **more) -> dict[str, torch.Tensor]:
            terms = dict(super().losses(x, dead=dead, step=step, **more))
            return {**terms, "mse": terms["mse"] * (float("nan") if step == 12 else 1.0)}

    rows = rows_of(tmp_path, planted(8000, dictionary(64, 32)))
    changes = {"checkpoint_every": 10, "log_every": 10**6}
    trainer = trainer_of(tmp_path / "kept", "topk", "cuda", rows, Poisoned, **changes)
    with pytest.raises(StageError, match="diverged at step 12"):
        trainer.fit()
    tensors, state = Checkpoints(tmp_path / "kept").latest()  # type: ignore[misc]
    assert state["step"] == 10 and all(bool(value.isfinite().all()) for value in tensors.values())


def test_memory_that_runs_out_cuts_the_batch_and_at_last_is_exit_9(tmp_path: Path) -> None:
    class Greedy(TopK):
        """Asks for more memory than there is on more than `most` rows."""

        most = 100

        def losses(self, x: torch.Tensor, **more) -> dict[str, torch.Tensor]:
            if x.shape[0] > self.most:
                torch.empty(1 << 42, dtype=torch.uint8, device=x.device)
            return super().losses(x, **more)

    rows = rows_of(tmp_path, planted(8000, dictionary(64, 32)))
    whole = trainer_of(tmp_path / "whole", "topk", "cuda", rows)
    whole.fit()
    cut = trainer_of(tmp_path / "cut", "topk", "cuda", rows, Greedy)
    cut.fit()
    assert cut.parts.count == 4
    assert cut.log[-1]["loss"] == pytest.approx(whole.log[-1]["loss"], rel=0.02)
    Greedy.most = 2
    with pytest.raises(ResourceError) as caught:
        trainer_of(tmp_path / "none", "topk", "cuda", rows, Greedy).fit()
    assert caught.value.exit_code == 9
