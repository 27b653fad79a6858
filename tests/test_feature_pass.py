"""The pass over activations: what it finds, that it can be stopped anywhere, and that its memory is bounded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from greatctl.errors import InterruptedRun
from greatctl.events import Run
from greatctl.features.best import AFTER, BEFORE, Best, Fired
from greatctl.features.neighbours import neighbours
from greatctl.features.sample import DECILES, Sampler
from greatctl.features.shares import mean_interval, position_share, token_share
from greatctl.features.tables import Directions, FeatureTables, scan, scan_means
from greatctl.stages.feature_pass import PASS, _Saved, control_means, feature_pass
from greatctl.store.shards import ShardWriter

WINDOW, D, L, WINDOWS, DOCUMENTS = 40, 8, 24, 30, 3
OWNER = [w * DOCUMENTS // WINDOWS for w in range(WINDOWS)]
SPECIAL = 0


def shards(scale: int = 1) -> Iterator[dict[str, Tensor]]:
    """Random rows in windows of 40 tokens, 7 windows a shard; token 0 begins each."""
    g = torch.Generator().manual_seed(3)
    for start in range(0, WINDOWS * scale, 7):
        n = min(7, WINDOWS * scale - start)
        position = torch.arange(WINDOW).repeat(n)
        token = torch.randint(1, 90, (n * WINDOW,), generator=g)
        yield {
            "acts": torch.randn(n * WINDOW, D, generator=g),
            "window": (start + torch.arange(n).repeat_interleave(WINDOW)).int(),
            "position": position.int(),
            "token": token.where(position > 0, SPECIAL).int(),
        }


W = torch.randn(L, D, generator=torch.Generator().manual_seed(4))


def encode(x: Tensor) -> Tensor:
    return (x @ W.T - 2).relu()


def all_rows() -> dict[str, Tensor]:
    rows = {k: torch.cat([s[k] for s in shards()]) for k in ("acts", "window", "position", "token")}
    return {k: v[rows["token"] != SPECIAL] for k, v in rows.items()}


def directions() -> Directions:
    return Directions(torch.nn.functional.normalize(W, dim=1), torch.full((D,), 0.1))


@pytest.fixture(scope="module")
def found() -> FeatureTables:
    count = torch.ones(90)
    return scan(
        shards(), encode, L, OWNER, n_documents=DOCUMENTS, special_ids=[SPECIAL], top_k=3, directions=directions(),
        token_count=count,
    )  # fmt: skip


# --- what it finds ----------------------------------------------------------------------------------------


def test_sums_by_document_stretch_token_and_position_equal_naive_ones(found: FeatureTables) -> None:
    rows = all_rows()
    latents, owner = encode(rows["acts"]).double(), torch.tensor(OWNER)[rows["window"].long()]
    for document in range(DOCUMENTS):
        mine = owner == document
        assert torch.allclose(found.document_x_sum[document], rows["acts"][mine].double().sum(0))
        assert torch.allclose(found.stretch_total[document].sum(0).double(), latents[mine].sum(0), rtol=1e-5)
        first = mine & (rows["window"] == OWNER.index(document))
        assert torch.allclose(found.stretch_total[document, 0].double(), latents[first].sum(0), rtol=1e-5)
        assert (
            int(found.stretch_tokens[document, 0]) == int(first.sum()) and int(found.stretch_tokens[document, 10]) == 0
        )
    assert torch.allclose(found.token_total[17], latents[rows["token"] == 17].sum(0)) and found.token_own == 1
    assert torch.allclose(found.position_total[0], latents[rows["position"] == 1].sum(0))
    assert torch.allclose(found.square, latents.square().sum(0))
    assert int(found.token_count.sum()) == int(found.position_count.sum()) == found.n_tokens


def test_several_coders_are_summed_in_one_pass(found: FeatureTables) -> None:
    coders = {"a": encode, "b": lambda x: encode(x)[:, :5]}
    totals = scan_means(shards(), coders, {"a": L, "b": 5}, OWNER, n_documents=DOCUMENTS, special_ids=[SPECIAL])
    assert torch.equal(totals["a"], found.document_total) and torch.equal(totals["b"], found.document_total[:, :5])


def test_examples_of_a_decile_lie_in_it_and_in_different_windows(found: FeatureTables) -> None:
    rows = all_rows()
    latents = encode(rows["acts"])
    filled = 0
    for slot in range(L * DECILES):
        latent, decile = divmod(slot, DECILES)
        passages = found.deciles.found(slot)
        assert len({window for window, *_ in passages}) == len(passages) <= 2
        for window, position, _, heat in passages:
            at = (rows["window"] == window) & (rows["position"] == position)
            activation = latents[at, latent].item()
            share = activation / found.peak[latent].item()
            assert decile / 10 - 1e-6 < share <= (decile + 1) / 10 + 1e-6
            assert heat[BEFORE] == activation
            filled += 1
    assert filled > 5 * L


def test_near_misses_are_the_closest_passages_in_which_a_latent_is_silent(found: FeatureTables) -> None:
    rows = all_rows()
    latents = encode(rows["acts"])
    cosine = torch.nn.functional.normalize(rows["acts"] - 0.1, dim=1) @ directions().rows.T
    for latent in range(0, L, 7):
        best: dict[int, float] = {}
        for i in range(len(latents)):
            window = rows["window"][i]
            span = [
                j for j in range(i - BEFORE, i + AFTER + 1) if 0 <= j < len(latents) and rows["window"][j] == window
            ]
            if not latents[span, latent].any():
                best[int(window)] = max(best.get(int(window), -2.0), cosine[i, latent].item())
        wanted = sorted(best.values(), reverse=True)[:3]
        assert [v for _, _, v, _ in found.near.found(latent)] == pytest.approx(wanted, abs=1e-6)
        assert all(not heat.any() for *_, heat in found.near.found(latent))
    assert bool((found.near.window >= 0).any())


def test_cofiring_is_the_jaccard_index_of_the_firing_tokens(found: FeatureTables) -> None:
    fires = encode(all_rows()["acts"]) > 0
    for latent in range(L):
        shared = (fires & fires[:, [latent]]).sum(0).double()
        index = shared / (fires.sum(0) + fires[:, latent].sum() - shared)
        index[shared < 5], index[latent] = 0, 0
        expected = index.sort(descending=True).values[:5].numpy()
        assert np.allclose(found.cofiring.jaccard[latent], expected)
        named = found.cofiring.latent[latent]
        assert all(index[i] == v for i, v in zip(named, found.cofiring.jaccard[latent], strict=True) if i >= 0)


def test_a_latent_that_is_a_word_a_place_or_neither_is_told_by_its_shares() -> None:
    def reading(x: Tensor) -> Tensor:
        return x[:, :3].relu()

    def told() -> Iterator[dict[str, Tensor]]:
        for shard in shards(4):
            word, place = (shard["token"] == 7).float(), (shard["position"] < 6).float()
            yield {**shard, "acts": torch.stack([word, place, shard["acts"][:, 0]], dim=1)}

    owner = [0] * (WINDOWS * 4)
    tables = scan(told(), reading, 3, owner, n_documents=1, special_ids=[SPECIAL])
    by_token, by_position = token_share(tables), position_share(tables)
    assert by_token[0] == pytest.approx(1) and by_position[1] > 0.9
    assert max(by_position[0], by_token[1], by_token[2], by_position[2]) < 0.05


def test_rare_ids_share_buckets_where_there_are_more_ids_than_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("greatctl.features.sums._BUCKET_BYTES", 8 * L * 20)
    count = torch.cat([all_rows()["token"].long().bincount(minlength=90), torch.zeros(10, dtype=torch.long)])
    few = scan(shards(), encode, L, OWNER, n_documents=DOCUMENTS, special_ids=[SPECIAL], token_count=count)
    assert len(few.token_count) == 20 and int(few.token_count.sum()) == few.n_tokens
    assert few.token_own == pytest.approx(float(count.sort(descending=True).values[:10].sum()) / few.n_tokens)


def test_the_interval_of_a_mean_is_students() -> None:
    low, high = mean_interval(np.array([[1.0], [2.0], [3.0]]))
    assert (low[0], high[0]) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-3)
    assert np.isnan(mean_interval(np.ones((1, 2)))[0]).all()


def test_neighbours_are_the_nearest_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("greatctl.features.neighbours._BUDGET", 5 * L)
    ids, cosines = neighbours(W)
    whole = torch.nn.functional.normalize(W, dim=1) @ torch.nn.functional.normalize(W, dim=1).T
    whole.fill_diagonal_(-2)
    assert torch.equal(ids, whole.topk(5).indices) and torch.allclose(cosines, whole.topk(5).values)


# --- lists and the sample ---------------------------------------------------------------------------------


def test_a_list_keeps_the_best_of_different_texts_whatever_the_order_of_offers() -> None:
    rng = np.random.default_rng(0)
    value, text = rng.random(200).astype(np.float32), rng.integers(0, 30, 200)
    at = np.arange(200)
    best: dict[int, tuple[float, int]] = {}
    for i in at:
        best[int(text[i])] = max(best.get(int(text[i]), (-1.0, 0)), (float(value[i]), -int(i)))
    expected = [-i for _, i in sorted(best.values(), reverse=True)[:5]]
    for size in (1, 7, 200):
        lists = Best(2, 5)
        for start in range(0, 200, size):
            part = slice(start, start + size)
            keep = start + lists.wanted(np.ones_like(at[part]), value[part])
            if len(keep):
                lists.offer(np.ones_like(keep), value[keep], at[keep], at[keep], text[keep])
        assert lists.window[1].tolist() == expected and (lists.window[0] == -1).all()


def test_the_sample_is_thinned_evenly_where_latents_fire_too_densely() -> None:
    sampler = Sampler(64, windows=64, entries=500)
    for w in range(64):
        row = np.repeat(np.arange(10), 5)
        where = {"window": np.full(10, w), "position": np.arange(10), "token": np.full(10, 9)}
        sampler.add(where, Fired(row, np.tile(np.arange(5), 10), np.full(50, w + 1, np.float32), 5))
    sample = sampler.sample()
    assert len(sample.value) <= 500 and set(np.unique(sample.window)) == set(range(0, 64, sampler.stride))
    assert sample.start[-1] == len(sample.value) == len(sample.latent)
    assert (sample.value == np.repeat(sample.window + 1, 5)).all()


def test_what_is_kept_does_not_grow_with_the_tokens() -> None:
    sizes = []
    for scale in (8, 16):
        held: list[int] = []

        def weigh(sums: Any, held: list[int] = held) -> None:
            held.append(
                sum(t.numel() * t.element_size() for n, t in sums.state().items() if not n.startswith("sample."))
            )

        owner = [0] * (WINDOWS * scale)
        scan(shards(scale), encode, L, owner, n_documents=1, kept=weigh)
        assert len(set(held)) == 1
        sizes.append(held[0])
    assert sizes[0] == sizes[1]


# --- stopping and going on --------------------------------------------------------------------------------


class World:
    """Shards on disk, and what the pass is handed."""

    def __init__(self, root: Path) -> None:
        writer = ShardWriter(root / "acts")
        for number, shard in enumerate(shards()):
            writer.write(number, shard, len(shard["acts"]))
        writer.finish()
        self.activations: Any = SimpleNamespace(path=root / "acts")
        rows = torch.cat([s["token"] for s in shards()]).view(WINDOWS, WINDOW)
        self.store: Any = SimpleNamespace(
            input_ids=rows,
            windows={"document": OWNER},
            documents=[{}] * DOCUMENTS,
            tokenizer={"vocab_size": 90, "special_ids": [SPECIAL]},
        )
        self.sae: Any = SimpleNamespace(
            encode=encode, d_sae=L, d_in=D, d_out=D, W_dec=W, hook_point=None, target_hook_point=None
        )

    def read(self, folder: Path, stop_after: int | None = None) -> FeatureTables:
        """The pass, stopped after so many reports of progress."""
        run, reports = Run("interpret"), 0

        def emit(event: object) -> None:
            nonlocal reports
            reports += 1
            if reports == stop_after:
                run.stop.request(15)

        run.emit = emit  # type: ignore[method-assign]
        ctx: Any = SimpleNamespace(run=run)
        return feature_pass(ctx, self.sae, self.activations, self.store, folder, examples=3, every=0.0)


def same(a: object, b: object) -> bool:
    """Whether two tables hold the same bytes."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, np.asarray(b))
    if hasattr(a, "__dict__"):
        return all(same(value, vars(b)[name]) for name, value in vars(a).items())
    return a == b


def test_a_pass_that_is_stopped_anywhere_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    world = World(tmp_path)
    whole = world.read(tmp_path / "calm")
    assert same(whole, world.read(tmp_path / "calm"))  # nothing left to read
    for stop_after in range(1, 12):
        folder = tmp_path / f"stopped-{stop_after}"
        try:
            world.read(folder, stop_after)
        except InterruptedRun:
            pass
        else:
            break
        assert same(whole, world.read(folder)), stop_after
    else:
        pytest.fail("it never came to an end")
    assert stop_after > 4


def test_what_was_read_before_a_stop_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from greatctl.store.shards import ShardReader

    world, numbers, read = World(tmp_path), [], ShardReader.read
    monkeypatch.setattr(ShardReader, "read", lambda self, number: numbers.append(number) or read(self, number))
    with pytest.raises(InterruptedRun):
        world.read(tmp_path / "work", 5)
    before = numbers.copy()
    world.read(tmp_path / "work")
    assert before[0] == 0 and numbers[len(before) :] == list(range(before[-1], 5))


def test_where_saving_takes_long_it_is_done_more_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, written = [0.0], []

    def slow(path: Path, data: bytes) -> None:
        written.append(now[0])
        now[0] += 2.0

    monkeypatch.setattr("greatctl.stages.feature_pass.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("greatctl.store.files.write_bytes", slow)
    sums: Any = SimpleNamespace(state=lambda: {"total": torch.zeros(2)})
    saved = _Saved(tmp_path / "sums", None, None, 20.0)  # type: ignore[arg-type]
    for second in (10.0, 21.0, 50.0, 90.0):
        now[0] = second
        saved.keep(sums)
    assert written == [21.0, 90.0], "60 s after the end of one that took 2"


def test_saved_sums_that_are_damaged_are_not_believed(tmp_path: Path) -> None:
    world = World(tmp_path)
    whole = world.read(tmp_path / "work")
    (state,) = (tmp_path / "work" / PASS).iterdir()
    state.write_bytes(state.read_bytes()[:-9])
    assert same(whole, world.read(tmp_path / "work"))


def test_controls_are_summed_from_the_same_shards(tmp_path: Path) -> None:
    world = World(tmp_path)
    ctx: Any = SimpleNamespace(run=Run("interpret"))
    found = control_means(ctx, {"frozen": world.sae}, world.activations, world.store)
    assert torch.equal(found["frozen"], world.read(tmp_path / "work").document_total)
