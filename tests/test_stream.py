"""Rows straight from the model: each comes once an epoch, any cursor resumes to the bit, and the mixing is honest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from planted import dictionary, planted
from small_training import settings

from greatctl.errors import InterruptedRun, StageError
from greatctl.events import Run
from greatctl.sae.checkpoints import Checkpoints
from greatctl.sae.mixing import measured, perfect
from greatctl.sae.rows import Cursor
from greatctl.sae.setup import build
from greatctl.sae.stream import Harvested, StreamRows, Windows
from greatctl.sae.topk import TopK
from greatctl.sae.trainer import Trainer

LENGTH, WINDOWS, HELD = 16, 200, 20  # a BOS and 15 tokens a window


class Model:
    """Made-up activations of windows, the window's number in the first column; counts what it is asked for."""

    def __init__(self, d: int = 8, *, target: bool = False) -> None:
        g = torch.Generator().manual_seed(5)
        self.acts = torch.randn(WINDOWS, LENGTH, d, generator=g)
        self.acts[:, 1:, 0] = 10.0 + torch.arange(WINDOWS)[:, None] / 1000
        self.acts[:, 1:, 1] = torch.arange(1, LENGTH).float() / 10
        self.acts[:, 0] = 1000.0  # BOS
        self.acts[50, 3] = 10_000.0  # an outlier
        self.target, self.asked = target, 0

    def __call__(self, windows: torch.Tensor) -> Harvested:
        assert torch.equal(windows, windows.sort().values)
        self.asked += windows.numel()
        acts = self.acts[windows].flatten(0, 1)
        ordinary = (torch.arange(LENGTH) > 0).repeat(windows.numel())
        return Harvested(acts, 2 * acts if self.target else None, windows.repeat_interleave(LENGTH), ordinary)


def rows_of(model: Model, buffer_rows: int, run: Run | None = None) -> StreamRows:
    """180 training windows of 15 rows and 20 held-out ones; ten windows a work."""
    numbers = torch.arange(WINDOWS)
    windows = Windows(torch.full((WINDOWS,), LENGTH - 1), numbers >= WINDOWS - HELD, numbers // 10, WINDOWS * LENGTH)
    return StreamRows(model, windows, buffer_rows=buffer_rows, run=run or Run("train"))


@pytest.mark.parametrize("buffer_rows", [10_000, 600], ids=["all at once", "a buffer"])
def test_each_row_comes_once_an_epoch_and_any_cursor_resumes(buffer_rows: int) -> None:
    rows = rows_of(Model(), buffer_rows)
    total = rows.steps(7, 64, 2)
    stream = rows.stream(7, 64, Cursor())
    served = [next(stream) for _ in range(total)]
    assert [cursor.epoch for cursor, _, _ in served].count(1) == total // 2
    for epoch in (0, 1):
        seen = torch.cat([x for cursor, x, _ in served if cursor.epoch == epoch])
        assert seen.shape[0] == 180 * 15 - 1 == rows.counts.train  # the outlier is left out
        assert len({(float(a), float(b)) for a, b in seen[:, :2]}) == seen.shape[0]
        assert float(seen[:, 0].max()) < 10.18
    assert not torch.equal(served[0][1], served[total // 2][1])
    for at in (0, 2, total // 2 - 1, total - 2):
        fresh = rows_of(Model(), buffer_rows)
        assert torch.equal(next(fresh.stream(7, 64, served[at][0]))[1], served[at + 1][1])


def test_a_resume_harvests_at_most_three_chunks_and_the_sample_again() -> None:
    model = Model()
    rows = rows_of(model, 600)
    sample, model.asked = model.asked, 0
    next(rows.stream(7, 64, Cursor(0, rows.chunks // 2, 1)))
    assert model.asked <= 3 * -(-180 // rows.chunks) + 3 and sample <= 180


def test_the_buffer_is_never_larger_than_it_was_told() -> None:
    rows = rows_of(Model(), 600)
    stream = rows.stream(7, 64, Cursor())
    for _ in range(rows.steps(7, 64, 1)):
        next(stream)
        waiting = sum(share.window.numel() for shares in rows._shares.values() for share in shares.values())
        assert waiting <= 300 + 2 * 15  # the other half is what is being served


def test_two_shuffles_of_one_stream_do_not_mix() -> None:
    rows, alone = rows_of(Model(), 600), rows_of(Model(), 600)
    next(rows.stream(7, 64, Cursor()))
    assert torch.equal(next(rows.stream(8, 64, Cursor()))[1], next(alone.stream(8, 64, Cursor()))[1])
    again = rows.stream(8, 64, Cursor(0, 2, 0))
    assert torch.equal(next(again)[1], next(alone.stream(8, 64, Cursor(0, 2, 0)))[1])


def test_mixing_is_measured_and_held_against_a_perfect_shuffle() -> None:
    said: list[str] = []
    rows = rows_of(Model(), 600, Run("train", lambda event: said.append(event.message)))
    stream = rows.stream(7, 64, Cursor())
    for _ in range(rows.steps(7, 64, 1)):
        next(stream)
    (line,) = [message for message in said if "mixes" in message]
    assert "windows of" in line and "works" in line and "a perfect shuffle would give" in line
    mixing = rows.state()["mixing"]
    assert 0.7 * mixing["perfect"]["windows"] < mixing["measured"]["windows"] < mixing["perfect"]["windows"]  # type: ignore[index]
    whole = rows_of(Model(), 10_000)
    next(whole.stream(7, 64, Cursor()))
    best = whole.state()["mixing"]
    assert best["measured"]["windows"] == pytest.approx(best["perfect"]["windows"], rel=0.05)  # type: ignore[index]
    again = rows_of(Model(), 600)
    again.restore(rows.state())
    assert again.state() == rows.state()


def test_mixing_of_known_batches() -> None:
    work = torch.tensor([0, 0, 1])
    found = measured([torch.tensor([0, 0, 1, 1]), torch.tensor([2, 2, 2, 2])], work)
    assert (found.windows, found.works) == (1.5, 1.0)
    assert found.entropy == pytest.approx(torch.tensor(2.0).log().item() / 2)
    assert perfect(torch.tensor([5, 5, 0]), work, 100).windows == 2


def test_pairs_of_sites_stay_together_in_a_stream() -> None:
    rows = rows_of(Model(target=True), 600)
    _, x, y = next(rows.stream(0, 64, Cursor()))
    assert y is not None and torch.equal(2 * x, y) and rows.d_out == 8
    assert rows.target_mean_norm == pytest.approx(2 * rows.mean_norm)
    held = rows.held_out_target()
    assert held is not None and torch.equal(held, 2 * rows.held_out())


def test_held_out_rows_are_harvested_once_and_stay_after_release() -> None:
    model = Model()
    rows = rows_of(model, 600)
    model.asked = 0
    rows.release()
    assert rows.held_out().shape == (HELD * 15, 8) and rows.held_out_windows().min() == WINDOWS - HELD
    assert model.asked == HELD


def test_fault_56_a_stream_of_nothing_is_an_error_with_a_reason() -> None:
    none = torch.zeros(4, dtype=torch.int64)
    for usable, held, words in ((none, none.bool(), "no activations"), (none + 3, ~none.bool(), "held out")):
        with pytest.raises(StageError, match=words):
            StreamRows(Model(), Windows(usable, held, none, 20), buffer_rows=100, run=Run("train"))


def trainer_on(rows: StreamRows, folder: Path, run: Run) -> Trainer:
    """A small TopK on those rows."""
    coder = build(TopK, TopK.Config(d_in=8, d_sae=16, k=2), 0)
    return Trainer(coder, rows, settings(steps=70, batch_size=64, checkpoint_every=9), Checkpoints(folder), run)


def test_fault_53_a_streamed_run_that_is_stopped_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = trainer_on(rows_of(Model(), 600), tmp_path / "whole", Run("train"))
    whole.fit()
    run = Run("train")

    class Asked(Model):
        """Stops while it is harvesting for the third time."""

        calls = 0

        def __call__(self, windows: torch.Tensor) -> Harvested:
            self.calls += 1
            if self.calls == 5:
                run.stop.request(2)
                run.stop_here()
            return super().__call__(windows)

    with pytest.raises(InterruptedRun):
        trainer_on(rows_of(Asked(), 600), tmp_path / "stopped", run).fit()
    again = trainer_on(rows_of(Model(), 600), tmp_path / "stopped", Run("train"))
    assert 0 < again.resumed_at < 70
    again.fit()
    for name, value in whole.coder.state_dict().items():
        assert torch.equal(value, again.coder.state_dict()[name]), name
    assert whole.log == again.log and whole.rows.state() == again.rows.state()


def test_what_is_streamed_trains_like_what_is_stored(tmp_path: Path) -> None:
    acts = planted(WINDOWS * LENGTH, dictionary(32, 16)).view(WINDOWS, LENGTH, 16)
    model = Model(16)
    model.acts = acts
    rows = rows_of(model, 900)
    coder = build(TopK, TopK.Config(d_in=16, d_sae=32, k=3), 0)
    trainer = Trainer(coder, rows, settings(steps=150, batch_size=128, lr=2e-3), Checkpoints(tmp_path), Run("train"))
    trainer.fit()
    assert trainer.log[-1]["explained_variance"] > 0.5
