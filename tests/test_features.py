"""What latents mean: the pass over activations, text around a token, logits, verdicts on planted truth."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from greatctl import manifest
from greatctl.errors import UsageError
from greatctl.features import VERDICTS, judge
from greatctl.features.adjust import adjust, outlying_author
from greatctl.features.examples import Decoder
from greatctl.features.logits import latent_logits
from greatctl.features.snippet import read_snippet
from greatctl.features.tables import AFTER, BEFORE, BINS, bin_edges, scan
from greatctl.features.units import gather

WINDOWS = 6
BETWEEN, WORK, NOISE = 0.6, 0.3, 1.0


# --- verdicts ---------------------------------------------------------------------------------------------


@functools.cache
def documents() -> tuple[dict, ...]:
    """The real table of documents: everything that can be fetched without hands, one row a window."""
    entries = [e for e in manifest.load(manifest.packaged_path()).entries if e.kind == "gutenberg"]
    rows = [
        {name: getattr(e, name) for name in ("author", "role", "era", "genre", "topic", "split")} | {"work": e.id}
        for e in entries
    ]
    return tuple(row for row in rows for _ in range(WINDOWS))


def column(name: str, value: object) -> np.ndarray:
    return np.array([row[name] == value for row in documents()], dtype=float)


def characters() -> np.ndarray:
    return 1 - column("role", "control")


def null(seed: int, n_latents: int = 20) -> np.ndarray:
    """Windows [n, n_latents] with random effects of author and work, and nothing else."""
    rng = np.random.default_rng(seed)
    effects = {}
    for name, size in (("author", BETWEEN), ("work", WORK)):
        keys = sorted({row[name] for row in documents()})
        drawn = dict(zip(keys, rng.normal(scale=size, size=(len(keys), n_latents)), strict=True))
        effects[name] = np.stack([drawn[row[name]] for row in documents()])
    return effects["author"] + effects["work"] + rng.normal(scale=NOISE, size=(len(documents()), n_latents))


SD = float(np.sqrt(BETWEEN**2 + WORK**2 / 2 + NOISE**2 / WINDOWS / 2))  # between authors' means, about


def planted(seed: int = 0) -> np.ndarray:
    """Null latents, but 0 follows role, 1 one author, 2 the era, 3 the genre and 4 the topic."""
    x = null(seed)
    x[:, 0] += 3 * SD * characters()
    x[:, 1] += 10 * SD * column("author", "Charles Darwin")
    x[:, 2] += 5 * SD * column("era", "18c")
    x[:, 3] += 5 * SD * column("genre", "letters")
    x[:, 4] += 5 * SD * column("topic", "war")
    return x


def verdicts(x: np.ndarray, rows=None, **more) -> list[str]:
    return [row["verdict"] for row in judge(x, rows or documents(), **more)]


def test_a_row_has_the_fixed_keys_and_json_values() -> None:
    row = judge(planted(), documents())[0]
    assert list(row) == ["latent", "effect", "auroc", "p_value", "q_value", "verdict", "reason"]
    assert row["latent"] == 0 and row["effect"] > 1.5 and row["auroc"] > 0.9
    assert 0 < row["p_value"] <= row["q_value"] <= 0.05
    assert row["verdict"] in VERDICTS and "held-out authors" in row["reason"]


def test_rows_and_columns_and_seeds_give_the_same_verdicts() -> None:
    x = planted(1)
    columns = {name: [row[name] for row in documents()] for name in documents()[0]}
    assert judge(x, documents(), seed=3) == judge(x, columns, seed=3) == judge(x, documents(), seed=3)


def test_every_level_shared_by_several_authors_is_named_rightly() -> None:
    for factor in ("era", "genre", "topic"):
        levels = sorted({row[factor] for row in documents()})
        shared = [v for v in levels if len({r["author"] for r in documents() if r[factor] == v}) >= 3]
        x = null(7, len(shared))
        for place, level in enumerate(shared):
            x[:, place] += 7 * SD * column(factor, level)
        assert set(verdicts(x)) == {f"not-separable-{factor}"}, factor


def test_a_topic_that_fills_one_role_is_not_taken_for_the_role() -> None:
    """Characters and two hard controls write about greatness: only those two tell topic from role."""
    rows = [dict(row) for row in documents()]
    hard = {"James Baldwin", "U.S. Department of Defense"}
    for row in rows:
        row["topic"] = "greatness" if row["role"] != "control" or row["author"] in hard else "daily life"
    x = null(11)
    about = np.array([row["topic"] == "greatness" for row in rows])
    x[:, 0] += 6 * SD * about
    x[:, 1] += 6 * SD * characters()
    assert verdicts(x, rows)[:2] == ["not-separable-topic", "supported"]


def test_a_topic_that_says_what_role_says_can_never_be_separated() -> None:
    rows = [{**row, "topic": "plain" if row["role"] == "control" else "great"} for row in documents()]
    found = judge(planted(), rows)[0]
    assert found["verdict"] == "not-separable-topic" and "say the same" in found["reason"]


def test_a_latent_without_noise_is_judged_too() -> None:
    x = np.stack([characters(), column("era", "18c"), np.zeros(len(documents()))], axis=1)
    assert verdicts(x) == ["supported", "not-separable-era", "not-supported"]


def test_a_difference_that_held_out_authors_do_not_share_is_unstable() -> None:
    x = planted()
    held = column("split", "heldout-author") > 0
    x[held, 0] -= 3 * SD * characters()[held]
    x[~held, 0] += 3 * SD * characters()[~held]
    assert verdicts(x)[0] == "unstable"


def test_too_few_authors_are_called_underpowered_with_numbers() -> None:
    chosen = {"Charles Darwin", "Ulysses S. Grant", "J. G. Wood", "Leander Stillwell"}
    keep = [i for i, row in enumerate(documents()) if row["author"] in chosen]
    found = judge(planted()[keep], [documents()[i] for i in keep])
    assert {row["verdict"] for row in found} == {"underpowered"}
    assert "2 authors of characters against 2 of controls" in found[0]["reason"] and "0.33" in found[0]["reason"]
    alone = [i for i, row in enumerate(documents()) if row["author"] == "Charles Darwin"]
    assert set(verdicts(planted()[alone], [documents()[i] for i in alone])) == {"underpowered"}


def test_an_author_under_both_roles_cannot_separate_them() -> None:
    rows = [{**row, "author": "one hand"} for row in documents()]
    found = judge(planted(), rows)
    assert {row["verdict"] for row in found} == {"underpowered"} and "1 under both roles" in found[0]["reason"]


def test_missing_factors_are_said_to_be_missing() -> None:
    rows = [{k: v for k, v in row.items() if k not in ("era", "topic")} for row in documents()]
    found = judge(planted(), rows)[0]
    assert found["verdict"] == "supported" and "not adjusted for era, topic" in found["reason"]


@pytest.mark.parametrize(
    ("x", "rows"),
    [
        (np.zeros((2, 3)), [{"author": "a", "role": "control"}]),
        (np.full((1, 3), np.nan), [{"author": "a", "role": "control"}]),
        (np.zeros((1, 3)), [{"author": None, "role": "control"}]),
        (np.zeros((1, 3)), [{"author": "a", "role": "hero"}]),
    ],
)
def test_input_that_cannot_be_judged_is_refused(x: np.ndarray, rows: list[dict]) -> None:
    with pytest.raises(UsageError):
        judge(x, rows)


def test_works_count_equally_and_windows_do_not() -> None:
    rows = [{"author": "a", "work": w, "role": "character"} for w in ("long", "long", "long", "short")]
    cells = gather(np.array([[1.0], [1.0], [1.0], [5.0]]), rows)
    assert cells.author_means.tolist() == [[3.0]] and cells.means.tolist() == [[1.0], [5.0]]


def test_a_work_that_changes_its_topic_still_counts_once() -> None:
    rows = [{"author": "a", "work": "w", "role": "control", "topic": t} for t in ("x", "x", "y")]
    rows.append({"author": "a", "work": "v", "role": "control", "topic": "x"})
    cells = gather(np.array([[0.0], [0.0], [3.0], [9.0]]), rows)
    assert len(cells.means) == 3 and cells.author_means.tolist() == [[5.0]]


def test_factor_and_author_p_values_are_honest_under_the_null() -> None:
    cells = gather(null(21, 300), documents())
    assert np.mean(adjust(cells, "genre").factor_p < 0.05) < 0.08
    assert np.mean(outlying_author(cells)[0] < 0.05) < 0.08


# --- the pass over the activations ------------------------------------------------------------------------


def shards(n_windows: int = 13, d: int = 6, per_shard: int = 4):
    """Windows of unequal length in shards, as harvest writes them; token 0 is special."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 9, (n_windows,), generator=generator).tolist()
    for start in range(0, n_windows, per_shard):
        numbers = range(start, min(start + per_shard, n_windows))
        window = torch.cat([torch.full((lengths[w],), w, dtype=torch.int32) for w in numbers])
        position = torch.cat([torch.arange(lengths[w], dtype=torch.int32) for w in numbers])
        acts = torch.randn(len(window), d, generator=generator)
        token = torch.where(position == 0, 0, 10 * window + position + 5).int()  # no text twice
        yield {"acts": acts, "window": window, "position": position, "token": token}


def encode(x: torch.Tensor) -> torch.Tensor:
    latents = torch.cat([x, -x], dim=1).relu()
    latents[:, -1] = 0  # a latent that never fires
    return latents


OWNER = [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 3, 3]  # document 2 has no window


def test_tables_equal_a_naive_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("greatctl.features.tables._BUDGET", 12 * 10)  # several chunks a shard
    found = scan(shards(), encode, 12, OWNER, n_documents=4, special_ids=[0], top_k=3)
    rows = {k: torch.cat([s[k] for s in shards()]) for k in ("acts", "window", "position", "token")}
    keep = rows["token"] != 0
    latents, window, position = encode(rows["acts"])[keep], rows["window"][keep], rows["position"][keep]
    owner = torch.tensor(OWNER)[window.long()]
    assert found.n_tokens == int(keep.sum()) == int(found.document_tokens.sum())
    assert torch.equal(found.fired, (latents > 0).sum(0))
    assert torch.allclose(found.total, latents.double().sum(0))
    assert torch.equal(found.peak, latents.amax(0))
    assert found.histogram.sum(1).equal(found.fired)
    for document in range(4):
        mine = latents[owner == document]
        assert torch.allclose(found.document_total[document], mine.double().sum(0))
        assert torch.equal(found.document_fired[document], (mine > 0).sum(0))
    assert np.allclose(found.document_means[0], latents[owner == 0].double().mean(0))
    assert not found.document_means[2].any()
    for latent in range(12):
        best = sorted(((float(latents[window == w, latent].max()), -int(w)) for w in window.unique()), reverse=True)[:3]
        best = [(a, -w) for a, w in best if a > 0]
        got = [w for w in found.top.window[latent].tolist() if w >= 0]
        assert got == [w for _, w in best]
        for rank, (activation, w) in enumerate(best):
            assert found.top.value[latent, rank] == activation
            at = (window == w) & (position == found.top.position[latent, rank])
            assert latents[at, latent].item() == activation
            assert found.top.heat[latent, rank, BEFORE] == activation
            after = latents[(window == w) & (position == found.top.position[latent, rank] + 1), latent]
            assert found.top.heat[latent, rank, BEFORE + 1] == (after.item() if len(after) else 0)
    assert found.top.window[-1].tolist() == [-1, -1, -1]
    assert found.top.heat.shape == (12, 3, BEFORE + 1 + AFTER)


def test_the_size_of_chunks_and_shards_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = scan(shards(), encode, 12, OWNER, n_documents=4, special_ids=[0], top_k=3)
    monkeypatch.setattr("greatctl.features.tables._BUDGET", 1)
    pieces = scan(shards(), encode, 12, OWNER, n_documents=4, special_ids=[0], top_k=3)
    for name in ("fired", "total", "histogram", "document_x_sum", "stretch_total", "token_total", "position_total"):
        assert torch.equal(getattr(whole, name), getattr(pieces, name)), name
    for name in ("top", "deciles", "near"):
        for of in ("value", "window", "position", "heat"):
            assert torch.equal(getattr(getattr(whole, name), of), getattr(getattr(pieces, name), of)), (name, of)


def test_of_equal_windows_the_earlier_is_shown_and_of_equal_tokens_the_first() -> None:
    window = torch.arange(4).repeat_interleave(3).int()
    shard = {
        "acts": torch.ones(12, 1),
        "window": window,
        "position": torch.arange(3).repeat(4).int(),
        "token": torch.arange(12).int(),
    }
    found = scan([shard], lambda x: x, 1, [0] * 4, n_documents=1, top_k=2)
    assert found.top.window.tolist() == [[0, 1]] and found.top.position.tolist() == [[0, 0]]
    shard["token"] = torch.full((12,), 7).int()  # a text that comes again and again is shown once
    found = scan([shard], lambda x: x, 1, [0] * 4, n_documents=1, top_k=2)
    assert found.top.window.tolist() == [[0, -1]] and found.top.value.tolist() == [[1.0, 0.0]]


def test_histogram_bins_are_half_octaves() -> None:
    shard = {
        "acts": torch.tensor([[1.0], [1.5], [1e-9], [1e9]]),
        "window": torch.zeros(4).int(),
        "position": torch.arange(4).int(),
        "token": torch.ones(4).int(),
    }
    counts = scan([shard], lambda x: x, 1, [0], n_documents=1).histogram[0]
    edges = bin_edges()
    assert counts[0] == 1 and counts[BINS - 1] == 1
    assert counts[edges.index(1.0)] == 1 and counts[edges.index(1.0) + 1] == 1


def test_an_empty_corpus_gives_empty_tables() -> None:
    found = scan([], encode, 12, [], n_documents=0)
    assert found.n_tokens == 0 and not found.fired.any() and found.document_means.shape == (0, 12)


# --- text -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level and so small that most characters beyond ASCII are several tokens."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["the ship rose and the ship fell"] * 9, 270, special_tokens=["<s>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>")


TEXT = "the café — 漢字 rose"


def test_pieces_join_to_the_text_even_where_tokens_are_half_characters(tokenizer) -> None:
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    pieces = Decoder(tokenizer).pieces(ids)
    assert len(pieces) == len(ids) and "".join(pieces) == TEXT
    assert "" in pieces and not any("\ufffd" in p for p in pieces)


def test_a_token_inside_a_character_shows_the_character(tokenizer) -> None:
    ids = [tokenizer.bos_token_id, *tokenizer.encode(TEXT, add_special_tokens=False)]
    decoder = Decoder(tokenizer, [tokenizer.bos_token_id])
    first_byte = tokenizer.encode("é", add_special_tokens=False)[0]
    passage = decoder.passage(ids, ids.index(first_byte), after=99)
    assert (passage.before, passage.token) == ("the caf", "é") and passage.after == TEXT.split("é")[1]


def test_every_position_splits_the_passage_into_what_was_there(tokenizer) -> None:
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    for position in range(len(ids)):
        passage = Decoder(tokenizer).passage(ids, position, before=99, after=99)
        assert passage.before + passage.token + passage.after == TEXT
        assert passage.token and len(passage.pieces) == len(ids) and passage.first == 0


def test_a_passage_is_cut_to_its_neighbourhood(tokenizer) -> None:
    ids = tokenizer.encode("the ship rose and the ship fell", add_special_tokens=False)
    passage = Decoder(tokenizer).passage(ids, 3, before=2, after=1)
    assert passage.first == 1 and len(passage.pieces) == 4
    assert passage.pieces[2] == passage.token


def test_a_window_that_begins_inside_a_character_is_still_shown(tokenizer) -> None:
    ids = tokenizer.encode("漢字 rose", add_special_tokens=False)[1:]
    pieces = Decoder(tokenizer).pieces(ids)
    assert len(pieces) == len(ids) and "".join(pieces).endswith("字 rose")


# --- logits and snippets ----------------------------------------------------------------------------------


class Head:
    """A norm and an unembedding, as a frozen model shows them above its last block."""

    n_layers, d_vocab = 2, 50

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.gain = torch.rand(8, generator=generator) + 0.5
        self.W_U = torch.randn(8, 50, generator=generator)

    def resume(self, layer: int, residual: torch.Tensor) -> torch.Tensor:
        assert layer == self.n_layers
        size = (residual.square().mean(-1, keepdim=True) + 1e-3).sqrt()  # the epsilon must not count
        return residual / size * self.gain @ self.W_U


def test_logits_are_the_direction_through_gain_and_unembedding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("greatctl.features.logits._BUDGET", 150)
    head, directions = Head(), torch.randn(7, 8, generator=torch.Generator().manual_seed(1))
    found = latent_logits(head, directions, k=4, hidden=[3])
    expected = directions * head.gain @ head.W_U
    expected[:, 3] = 0
    assert torch.allclose(found.top_values, expected.topk(4).values, atol=1e-5)
    assert torch.equal(found.bottom_ids, expected.topk(4, largest=False).indices)
    assert not (found.top_ids == 3).any()


def test_a_snippet_lists_the_firing_latents_of_each_token_in_order() -> None:
    latents = torch.tensor([[0.0, 2.0, 1.0], [0.0, 0.0, 0.0], [3.0, 0.0, 3.0]])
    found = read_snippet(latents, ["He", " kept", " calm"], 2)
    assert [(r["position"], r["latent"], r["activation"]) for r in found.top] == [
        (0, 1, 2),
        (0, 2, 1),
        (2, 0, 3),
        (2, 2, 3),
    ]
    assert found.top[0]["token"] == "He" and found.strength == [2.0, 0.0, 3.0]


def test_judging_loads_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys; from greatctl.features import judge; sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
