"""Activation shards as training rows: what is left out, the shuffle, resuming it, pairs of sites."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from planted import rows_of, write_shards

from greatctl.errors import InputError, StageError
from greatctl.sae.data import ActivationRows, Cursor
from greatctl.store.shards import INDEX, ShardReader


def test_special_rows_and_outliers_are_counted_and_never_served(tmp_path: Path) -> None:
    acts = torch.randn(1000, 8, generator=torch.Generator().manual_seed(2))
    token = torch.ones(1000)
    token[::50] = 0
    acts[::50] = 500.0
    acts[7] *= 100
    write_shards(tmp_path, acts, torch.arange(1000) // 100, token, size=300)
    held = torch.arange(10) >= 9
    rows = ActivationRows(ShardReader(tmp_path), [0], held)
    assert (rows.counts.special, rows.counts.outliers, rows.counts.held_out) == (20, 1, 98)
    assert rows.counts.train == 1000 - 20 - 1 - 98
    stream = rows.stream(0, 64, Cursor())
    seen = torch.cat([next(stream)[1] for _ in range(rows.steps(0, 64, 1))])
    assert seen.shape[0] == rows.counts.train
    assert float(seen.norm(dim=1).max()) < 50
    usable = (token[:900] != 0) & (torch.arange(900) != 7)
    assert torch.equal(seen.sum(dim=1).sort().values, acts[:900][usable].sum(dim=1).sort().values)
    assert torch.allclose(rows.mean, acts[:900][usable].double().mean(dim=0), atol=1e-12)
    assert torch.equal(rows.held_out(), acts[900:][token[900:] != 0])
    assert rows.held_out(limit=10).shape[0] == 10


@pytest.mark.parametrize("budget", [2**30, 300 * 8 * 4 * 2], ids=["one block", "blocks"])
def test_each_row_comes_once_an_epoch_in_a_new_order_and_any_cursor_resumes(tmp_path: Path, budget: int) -> None:
    acts = torch.arange(2000 * 8, dtype=torch.float32).view(2000, 8) + 1e6
    rows = rows_of(tmp_path, acts, held_out=0.2, shard=300, budget=budget)
    total = rows.steps(5, 128, 2)
    stream = rows.stream(5, 128, Cursor())
    served = [next(stream) for _ in range(total)]
    firsts = [batch[:, 0] for _, batch, _ in served]
    per_epoch = [torch.cat([f for (c, _, _), f in zip(served, firsts, strict=True) if c.epoch == e]) for e in (0, 1)]
    for epoch in per_epoch:
        assert torch.equal(epoch.sort().values, acts[:1600, 0])
    assert not torch.equal(per_epoch[0], per_epoch[1])
    assert max(f.numel() for f in firsts) < 192
    for at in (0, 3, total // 2, total - 2):
        again = rows.stream(5, 128, served[at][0])
        assert torch.equal(next(again)[1], served[at + 1][1])


def test_fault_49_a_row_that_is_not_finite_is_refused_with_its_coordinates(tmp_path: Path) -> None:
    acts = torch.randn(100, 8)
    acts[41, 3] = float("nan")
    with pytest.raises(StageError) as caught:
        rows_of(tmp_path, acts, shard=30)
    assert "shard-00001" in str(caught.value) and "row 11" in str(caught.value)
    assert "window 2" in caught.value.why


def test_fault_56_nothing_to_train_on_is_an_error_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="held out"):
        rows_of(tmp_path / "a", torch.randn(50, 8), held_out=1.0)
    write_shards(tmp_path / "b", torch.randn(5, 8), torch.zeros(5), torch.zeros(5), size=5)
    with pytest.raises(StageError, match="no activations"):
        ActivationRows(ShardReader(tmp_path / "b"), [0], torch.zeros(1, dtype=torch.bool))


def test_fault_54_the_order_of_the_index_does_not_matter(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, torch.randn(2000, 8, generator=torch.Generator().manual_seed(3)), shard=300)
    _, before, _ = next(rows.stream(0, 128, Cursor()))
    index = tmp_path / INDEX
    lines = index.read_bytes().splitlines(keepends=True)
    index.write_bytes(b"".join(reversed(lines)))
    again = ActivationRows(ShardReader(tmp_path), [0], torch.arange(125) >= 119)
    assert torch.equal(next(again.stream(0, 128, Cursor()))[1], before)
    assert torch.equal(again.mean, rows.mean)


def test_fault_54_shards_of_another_size_are_served_in_the_same_order(tmp_path: Path) -> None:
    acts = torch.randn(2000, 8, generator=torch.Generator().manual_seed(3))
    one, other = (rows_of(tmp_path / str(size), acts, shard=size) for size in (300, 777))
    assert torch.equal(next(one.stream(0, 128, Cursor()))[1], next(other.stream(0, 128, Cursor()))[1])


class Counted(ShardReader):
    """A reader that counts how often a shard is read."""

    reads = 0

    def read(self, number: int) -> dict[str, torch.Tensor]:
        """As it is, and counted."""
        Counted.reads += 1
        return super().read(number)


def test_each_shard_is_read_twice_and_then_stays_in_memory(tmp_path: Path) -> None:
    write_shards(tmp_path, torch.randn(900, 8), torch.arange(900) // 16, torch.ones(900), size=300)
    Counted.reads = 0
    rows = ActivationRows(Counted(tmp_path), [0], torch.zeros(57, dtype=torch.bool))
    stream = rows.stream(0, 100, Cursor())
    for _ in range(30):
        next(stream)
    assert Counted.reads == 2 * 3


@pytest.mark.parametrize("budget", [2**30, 300 * 13 * 4 * 2], ids=["one block", "blocks"])
def test_pairs_of_sites_stay_together(tmp_path: Path, budget: int) -> None:
    g = torch.Generator().manual_seed(4)
    acts, target = torch.randn(1600, 8, generator=g), torch.randn(1600, 5, generator=g)
    target[:, 0] = acts[:, 0]
    target[9] *= 1000  # an outlier of the target alone
    token = torch.ones(1600)
    token[::16] = 0
    window = torch.arange(1600) // 16
    write_shards(tmp_path / "x", acts, window, token, size=300)
    write_shards(tmp_path / "y", target, window, token, size=300)
    held = torch.arange(100) >= 90
    rows = ActivationRows(ShardReader(tmp_path / "x"), [0], held, target=ShardReader(tmp_path / "y"), budget=budget)
    assert (rows.d_in, rows.d_out, rows.counts.outliers, rows.counts.train) == (8, 5, 1, 90 * 15 - 1)
    stream, seen = rows.stream(0, 100, Cursor()), []
    for _ in range(rows.steps(0, 100, 1)):
        _, x, y = next(stream)
        assert y is not None and torch.equal(x[:, 0], y[:, 0])
        seen.append(y)
    assert sum(y.shape[0] for y in seen) == rows.counts.train
    usable = (token[:1440] != 0) & (torch.arange(1440) != 9)
    assert torch.allclose(rows.target_mean, target[:1440][usable].double().mean(dim=0), atol=1e-12)  # type: ignore
    found = rows.held_out_target()
    assert found is not None and torch.equal(found[:, 0], rows.held_out()[:, 0])
    assert torch.equal(rows.held_out_windows(), window[1440:][token[1440:] != 0])


def test_fault_48_a_target_of_other_rows_is_no_pair(tmp_path: Path) -> None:
    write_shards(tmp_path / "x", torch.randn(100, 8), torch.arange(100) // 16, torch.ones(100), size=30)
    write_shards(tmp_path / "y", torch.randn(100, 8), torch.arange(100) // 10, torch.ones(100), size=30)
    with pytest.raises(InputError, match="no pair") as caught:
        ActivationRows(
            ShardReader(tmp_path / "x"),
            [0],
            torch.zeros(10, dtype=torch.bool),
            target=ShardReader(tmp_path / "y"),
        )
    assert caught.value.exit_code == 5 and "--hook-point x --hook-point y" in caught.value.fix
