"""Tokenizing by parts: every token finds its characters, shared passages and loud voices are cut down, any number of
workers and any kill give the same bytes, and folders of foreign text are read in whatever form they come."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import BOS, TEXT, context, make_project, save_tiny

from greatctl.corpus.balance import within_cap
from greatctl.corpus.parts import Text
from greatctl.corpus.trace import byte_range
from greatctl.corpus.windows import TokenStore
from greatctl.errors import InputError, IntegrityError, LockedError, UsageError
from greatctl.model.encoder import Encoder
from greatctl.model.tokenizer import encode_batch, load_tokenizer
from greatctl.stages import tokenize
from greatctl.store.artifact import load
from greatctl.store.tables import read_rows

PASSAGE = "so then the old ship went slowly home across a grey and quiet sea while nobody on the shore was awake"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(path)
    return path


def made(root: Path, texts: dict[str, str], folder: Path, **more: Any) -> tuple[TokenStore, dict]:
    result = tokenize.run(context(make_project(root, texts)), tokenize.Config(model=str(folder), window=16, **more))
    assert result.artifact is not None
    return TokenStore(result.artifact), dict(result.summary)


def files_of(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(path.iterdir()) if p.is_file() and p.name != "run.json"}


def test_every_token_covers_the_characters_that_it_says(tmp_path: Path, folder: Path) -> None:
    text = TEXT * 2 + "漢字 and 🙂 at the end"
    store, _ = made(tmp_path, {"darwin-a": text}, folder)
    tokenizer = load_tokenizer(folder)
    at = 0
    for window in range(len(store.input_ids)):
        assert store.span(window, 0) == (store.windows["char_start"][window],) * 2
        for position in range(1, int(store.length[window])):
            start, end = store.span(window, position)
            assert start == at
            at = end
            token = tokenizer.decode([int(store.input_ids[window, position])])
            assert token == text[start:end] or "�" in token  # a token may be half a character
        assert at == store.windows["char_end"][window]
    assert at == len(text)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=5))
def test_the_fast_encoder_says_what_the_slow_one_says(folder: Path, texts: list[str]) -> None:
    tokenizer = load_tokenizer(folder)
    texts = [*texts, f"{BOS} in a book about tokenizers"]
    for quick, slow in zip(Encoder(tokenizer)(texts), encode_batch(tokenizer, texts), strict=True):
        np.testing.assert_array_equal(quick[0], slow[0])
        np.testing.assert_array_equal(quick[1], slow[1])


def test_a_shared_passage_stays_in_the_earlier_work_alone(tmp_path: Path, folder: Path) -> None:
    texts = {
        "darwin-a": f"He began. {PASSAGE}. He ended here.",
        "wood-b": f"Another began quite differently.\n\n{PASSAGE.title()}!\n\nAnd he went on after it.",
    }
    store, summary = made(tmp_path, texts, folder)
    kept = {"darwin-a": "", "wood-b": ""}
    for window in range(len(store.input_ids)):
        name = store.document_of(window)["source_id"]
        kept[name] += texts[name][store.windows["char_start"][window] : store.windows["char_end"][window]]
    assert kept["darwin-a"] == texts["darwin-a"]
    assert kept["wood-b"] == "Another began quite differently.\n\n\n\nAnd he went on after it."
    assert summary["overlap_chars_removed"] == len(PASSAGE) + 1 == store.documents[1]["overlap_chars"]
    (row,) = read_rows(store.path / "overlaps.parquet")
    assert (row["loser"], row["keeper"]) == ("wood-b", "darwin-a")
    assert texts["wood-b"][row["char_start"] : row["char_end"]] == PASSAGE.title() + "!"
    whole, summary = made(tmp_path / "all", texts, folder, overlap="keep")
    assert summary["overlap_chars_removed"] == 0
    assert summary["n_tokens"] > int((store.length - 1).sum())
    assert whole.documents[1]["n_chars"] == len(texts["wood-b"])


def test_a_loud_voice_is_cut_down_evenly_over_its_works_and_along_each(tmp_path: Path, folder: Path) -> None:
    long = "".join(f"line {n} of the long one. " for n in range(400))
    texts = {"darwin-a": long, "darwin-b": long.replace("long", "next") + "!", "wood-c": TEXT}
    store, summary = made(tmp_path, texts, folder, max_tokens_per_character=600, overlap="keep")
    a, b, wood = store.documents
    assert summary["capped"] == ["darwin"]
    assert 500 <= a["n_tokens"] + b["n_tokens"] <= 600
    assert abs(a["n_tokens"] - b["n_tokens"]) <= 15
    assert wood["tokens_capped"] == 0
    assert a["tokens_capped"] == summary["tokens_capped"] - b["tokens_capped"] > 0
    starts = [s for s, d in zip(store.windows["char_start"], store.windows["document"], strict=True) if d == 0]
    gaps = np.diff(starts)
    assert gaps.max() < 2.5 * gaps.min()


def test_a_short_work_leaves_its_share_to_the_others() -> None:
    owner = np.array([0] * 2 + [1] * 50 + [2] * 50)
    keep = within_cap(["x", "x", "y"], ["short", "long", "other"], owner, np.full(102, 10), cap=300)
    assert keep[:2].all()
    assert keep[2:52].sum() == 28
    assert keep[52:].sum() == 30


def test_a_very_long_text_is_cut_at_blank_lines() -> None:
    paragraph = "word " * 60_000 + "\n\n"
    text = Text({}, paragraph * 9, [(5, 10)])
    stretches = text.stretches
    assert stretches[0] == (0, 5)
    assert all(b - a <= 1_000_000 for a, b in stretches)
    assert all(text.text[a - 2 : a] == "\n\n" for a, _ in stretches[2:])
    assert "".join(text.text[a:b] for a, b in stretches) == text.text[:5] + text.text[10:]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five files of text in four forms."""
    path = tmp_path_factory.mktemp("foreign") / "web"
    path.mkdir()
    texts = [f"{TEXT} number {n} " * (1 + n % 5) for n in range(60)]
    for n in range(2):
        rows = {"text": texts[n * 20 : n * 20 + 20], "author": [f"author {n}"] * 20, "year": [1800 + n] * 20}
        pq.write_table(pa.table(rows), path / f"{n:03d}.parquet")
    lines = "".join(json.dumps({"text": text, "other": 1}) + "\n" for text in texts[40:])
    (path / "002.jsonl").write_text(lines)
    with gzip.open(path / "003.jsonl.gz", "wt") as stream:
        stream.write(lines)
    (path / "004.txt").write_text(TEXT * 50)
    return path


def on_texts(root: Path, folder: Path, foreign: Path, **more: Any) -> Path | None:
    ctx = context(make_project(root, {}))
    config = tokenize.Config(model=str(folder), window=16, texts=str(foreign), **more)
    return tokenize.run(ctx, config).artifact


def test_folders_of_foreign_text_are_read_in_every_form(tmp_path: Path, folder: Path, foreign: Path) -> None:
    path = on_texts(tmp_path, folder, foreign)
    assert path is not None
    store = TokenStore(path)
    assert path.name == "tiny-16-web"
    assert len(store.documents) == 20 + 20 + 20 + 20 + 1
    by_source: dict[str, list] = {}
    for document in store.documents:
        by_source.setdefault(document["source_id"], []).append(document)
    assert [d["n_tokens"] for d in by_source["002"]] == [d["n_tokens"] for d in by_source["003"]]
    assert (by_source["001"][0]["author"], by_source["001"][0]["year"]) == ("author 1", 1801)
    assert {d["role"] for d in store.documents} == {"text"}
    assert sum(d["n_tokens"] for d in store.documents) == int((store.length - 1).sum())


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path, folder: Path, foreign: Path) -> None:
    alone = on_texts(tmp_path / "alone", folder, foreign)
    for number in (3, 1, 2):
        assert on_texts(tmp_path / "three", folder, foreign, worker=f"{number}/3") is None
    together = on_texts(tmp_path / "three", folder, foreign)
    assert alone is not None and together is not None
    assert files_of(alone) == files_of(together)
    assert not list(together.parent.glob(".*worker-*-of-3/part-*"))


def test_a_half_written_part_is_made_again(tmp_path: Path, folder: Path, foreign: Path) -> None:
    alone = on_texts(tmp_path / "alone", folder, foreign)
    on_texts(tmp_path / "some", folder, foreign, worker="1/2")
    (left,) = (tmp_path / "some/data/tokens").glob(".*worker-1-of-2")
    (left / "part-000000.documents.arrow").unlink()  # killed between the two files of a part
    (left / "part-000002.windows.arrow.partial").write_bytes(b"half")
    together = on_texts(tmp_path / "some", folder, foreign)
    assert alone is not None and together is not None
    assert files_of(alone) == files_of(together)


def test_changed_and_missing_folders_are_told_apart(tmp_path: Path, folder: Path, foreign: Path) -> None:
    copy = tmp_path / "web"
    shutil.copytree(foreign, copy)
    first = on_texts(tmp_path, folder, copy)
    assert first is not None
    mark = load(first).fingerprint
    with (copy / "004.txt").open("a") as stream:
        stream.write("more")
    again = on_texts(tmp_path, folder, copy)
    assert again is not None and load(again).fingerprint != mark
    with pytest.raises(InputError, match="no text files"):
        on_texts(tmp_path, folder, tmp_path / "nowhere")
    (copy / "005.jsonl").write_text('{"body": "no text here"}\n')
    with pytest.raises(InputError, match="no column `text`"):
        on_texts(tmp_path, folder, copy)
    with pytest.raises(UsageError, match="exclude"):
        on_texts(tmp_path, folder, foreign, character=["darwin"])


def killed_and_resumed(root: Path, folder: Path, foreign: Path, times: int, seed: int) -> dict[str, bytes]:
    """Start tokenizing in a process of its own, kill it at random `times`, let it end; returns the files."""
    make_project(root, {})
    draw = random.Random(seed)
    work = root / "data/tokens/.tiny-16-web.partial"
    for _ in range(times):
        child = os.fork()  # what is loaded stays loaded: a fresh interpreter would need seconds to get here
        if child == 0:
            try:
                on_texts(root, folder, foreign)
            finally:
                os._exit(0)
        began = time.monotonic()
        while not (work / "parts").exists() and time.monotonic() - began < 60:
            if os.waitpid(child, os.WNOHANG)[0]:
                break
            time.sleep(0.001)
        else:
            time.sleep(draw.uniform(0.0, 0.1))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    on_texts(root, folder, foreign)
    return files_of(root / "data/tokens/tiny-16-web")


def test_killed_at_random_it_ends_with_the_same_bytes(tmp_path: Path, folder: Path, foreign: Path) -> None:
    alone = on_texts(tmp_path / "alone", folder, foreign)
    assert alone is not None
    assert killed_and_resumed(tmp_path / "killed", folder, foreign, times=4, seed=0) == files_of(alone)


@pytest.mark.slow
def test_killed_fifty_times_it_ends_with_the_same_bytes(tmp_path: Path, folder: Path, foreign: Path) -> None:
    alone = on_texts(tmp_path / "alone", folder, foreign)
    assert alone is not None
    for seed in range(10):
        assert killed_and_resumed(tmp_path / str(seed), folder, foreign, times=5, seed=seed) == files_of(alone)


def test_the_parquet_export_opens_as_a_dataset(tmp_path: Path, folder: Path, foreign: Path) -> None:
    import datasets

    path = on_texts(tmp_path, folder, foreign, export=["parquet"])
    assert path is not None
    store = TokenStore(path)
    file = path / "exports/000.parquet"
    rows = datasets.load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == sum(int(store.length[w]) == 16 for w, d in enumerate(store.windows["document"]) if d < 20)
    assert len(rows[0]["input_ids"]) == 16


def test_a_running_worker_keeps_the_plain_command_from_sealing(tmp_path: Path, folder: Path, foreign: Path) -> None:
    from greatctl.store.lock import hold

    on_texts(tmp_path, folder, foreign, worker="1/2")
    (left,) = [p for p in (tmp_path / "data/tokens").glob(".*worker-1-of-2") if p.is_dir()]
    with hold(left), pytest.raises(LockedError):
        on_texts(tmp_path, folder, foreign)


def test_a_passage_is_found_again_in_the_bytes_it_came_from() -> None:
    lines = [
        "\ufeffTitle",
        "",
        "The caf\u0065\u0301 was _shut_;[1] the ship’s",
        "bell rang {12} twice.",
        "",
        "[1] A note.",
        "",
    ]
    original = "\r\n".join(lines).encode()
    text = "The café was shut; the ship’s bell rang twice.\n"
    start, end = byte_range(original, text, text.index("was shut"), text.index("bell") + 4)
    assert original[start:end].decode() == "was _shut_;[1] the ship’s\r\nbell"
    start, end = byte_range(original, text, 0, len(text))
    assert original[start:end].decode().startswith("The caf")
    assert original[start:end].decode().endswith("twice")
    with pytest.raises(IntegrityError, match="not in the original"):
        byte_range(b"nothing of it", text, 0, 8)
