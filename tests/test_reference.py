"""The bundled reference: the model is what it claims to be, its pairs work, and the program that made it
can be trusted.
"""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import subprocess
import sys
import time
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from greatctl.errors import InputError, UsageError
from greatctl.reference import PAIR_SETS, model_dir, pairs_path, texts, texts_dir

ROOT = Path(__file__).resolve().parents[1]
MIRROR = ROOT.parent / "shared" / "mirror" / "gutenberg" / "cache" / "epub"
LLAMA3 = ROOT.parent / "shared" / "llama3-tokenizer" / "tokenizer.model"
TINY = [
    "--heldout",
    "b.txt",
    "--device",
    "cpu",
    "--vocab-size",
    "300",
    "--d-model",
    "16",
    "--n-layers",
    "2",
    "--n-heads",
    "2",
    "--n-kv-heads",
    "1",
    "--d-mlp",
    "32",
    "--context",
    "32",
    "--batch-size",
    "4",
    "--epochs",
    "1",
    "--eval-every",
    "8",
    "--save-every",
    "4",
    "--warmup",
    "2",
    "--copy-fraction",
    "0.25",
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(model_dir()))


@pytest.fixture(scope="module")
def model() -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(model_dir()), dtype=torch.float32).eval()


def load_pairs(name: str) -> list[dict[str, Any]]:
    return tomllib.loads(pairs_path(name).read_text(encoding="utf-8"))["pair"]


# ---- the bundled model ----


def test_model_is_a_small_llama_with_shared_key_value_heads_and_tied_embeddings(model: Any) -> None:
    config = model.config
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("llama", 256, 8)
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.max_position_embeddings >= 512
    assert model.lm_head.weight is model.model.embed_tokens.weight
    stored = json.loads((model_dir() / "config.json").read_text(encoding="utf-8"))
    assert stored["dtype"] == "bfloat16"


def test_model_folder_stays_under_fourteen_megabytes() -> None:
    assert sum(path.stat().st_size for path in model_dir().iterdir()) <= 14_000_000


def test_tokenizer_adds_exactly_one_bos_and_none_when_asked_not_to(tokenizer: Any) -> None:
    with_bos = tokenizer("He was calm.")["input_ids"]
    without = tokenizer("He was calm.", add_special_tokens=False)["input_ids"]
    assert with_bos == [tokenizer.bos_token_id, *without]
    assert tokenizer.bos_token_id not in without
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|begin_of_text|>", "<|end_of_text|>")


def test_tokenizer_gives_back_any_text(tokenizer: Any) -> None:
    text = "Ünïcode — 1812, “quotes”\n\n\ttabs  and 漢字 🙂"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_model_copies_random_tokens_and_its_card_names_the_heads(model: Any) -> None:
    from greatctl.reference.score import copying, head_scores

    assert copying(model, model.config.vocab_size, model.config.bos_token_id, period=50, n=8) >= 0.5
    card = json.loads((model_dir() / "card.json").read_text(encoding="utf-8"))
    scores = head_scores(model, model.config.vocab_size, model.config.bos_token_id, period=40, n=4)
    for kind, table in scores.items():
        layer, head = map(int, card["heads"][kind][0]["head"].split("."))
        assert table[layer, head] > 0.5


def test_held_out_works_cost_at_most_what_the_card_promises(model: Any, tokenizer: Any) -> None:
    from greatctl.reference.bpe import encode
    from greatctl.reference.prepare import paragraphs
    from greatctl.reference.score import bits_per_byte

    if not MIRROR.exists():
        pytest.skip("needs the mirror of Project Gutenberg beside the checkout")
    n_bits = n_bytes = 0.0
    for number in (2010, 54623):
        lines = paragraphs((MIRROR / str(number) / f"pg{number}.txt").read_bytes())
        text = "\n".join(lines[len(lines) // 2 :])[:30_000]
        size = len(text.encode())
        n_bits += bits_per_byte(model, encode(tokenizer, text), size, tokenizer.bos_token_id, 512) * size
        n_bytes += size
    assert n_bits / n_bytes <= 1.58


# ---- pairs and texts ----


@pytest.mark.parametrize("name", PAIR_SETS)
def test_pairs_have_prompts_of_equal_length_and_answers_of_one_token(name: str, tokenizer: Any) -> None:
    pairs = load_pairs(name)
    assert len(pairs) >= 32
    assert sum(pair["heldout"] for pair in pairs) == 8
    assert len({pair["id"] for pair in pairs}) == len(pairs)
    for pair in pairs:
        assert len(tokenizer(pair["clean"])["input_ids"]) == len(tokenizer(pair["corrupted"])["input_ids"]), pair
        for key in ("answer", "wrong_answer"):
            assert len(tokenizer(pair[key], add_special_tokens=False)["input_ids"]) == 1, pair
            assert pair[key].startswith(" ")
        assert pair["answer"].strip() not in pair["clean"].split(), f"copied: {pair}"


@pytest.mark.parametrize("name", PAIR_SETS)
def test_model_tells_at_least_three_quarters_of_the_pairs_apart(name: str, model: Any, tokenizer: Any) -> None:
    from greatctl.reference.score import pair_differences

    differences = pair_differences(model, tokenizer, load_pairs(name))
    assert sum(d is not None and d >= 0.5 for d in differences) >= 0.75 * len(differences)


@pytest.mark.parametrize("name", PAIR_SETS)
def test_pairs_also_fit_llama_3(name: str) -> None:
    if not LLAMA3.exists():
        pytest.skip("needs Llama 3's tokenizer file beside the checkout")
    count = llama3_counter()
    for pair in load_pairs(name):
        assert count(pair["clean"]) == count(pair["corrupted"]), pair
        assert count(pair["answer"]) == count(pair["wrong_answer"]) == 1, pair


def llama3_counter() -> Any:
    """Token counts under Llama 3: merge by rank within each split word, as tiktoken does."""
    import regex

    from greatctl.reference.bpe import SPLIT

    rows = (line.split() for line in LLAMA3.read_bytes().splitlines() if line.strip())
    ranks = {base64.b64decode(token): int(rank) for token, rank in rows}

    def count(text: str) -> int:
        total = 0
        for word in regex.findall(SPLIT, text):
            parts = [bytes([byte]) for byte in word.encode()]
            while len(parts) > 1:
                found = [ranks.get(a + b, 1 << 30) for a, b in pairwise(parts)]
                best = min(found)
                if best == 1 << 30:
                    break
                place = found.index(best)
                parts[place : place + 2] = [parts[place] + parts[place + 1]]
            total += len(parts)
        return total

    return count


def test_an_unknown_pair_set_is_named_with_its_neighbours() -> None:
    with pytest.raises(UsageError) as caught:
        pairs_path("greatnes")
    assert "greatness" in caught.value.fix


def test_every_sample_text_in_the_table_is_on_disk() -> None:
    if not (texts_dir() / "texts.toml").exists():
        pytest.skip("no sample texts here")
    rows = texts()
    assert len(rows) >= 30
    assert all(row.path.is_file() for row in rows)
    assert {row.role for row in rows} == {"character", "control"}


# ---- the program that makes the model ----


def write_texts(folder: Path) -> Path:
    """Two small generated texts: sentences over a few words, so that there is something to learn."""
    draw = random.Random(0)
    words = ["the", "old", "king", "general", "river", "house", "stood", "marched", "saw", "and", "army"]
    folder.mkdir()
    for name, n in (("a.txt", 120), ("b.txt", 20)):
        lines = [" ".join(draw.choices(words, k=9)).capitalize() + "." for _ in range(n)]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def build_here(source: Path, out: Path, *more: str) -> None:
    from greatctl.reference.build import main

    assert main([str(source), str(out), *TINY, *more]) == 0


def test_build_killed_and_resumed_gives_the_same_bytes(tmp_path: Path) -> None:
    import torch

    torch.set_num_threads(1)
    source = write_texts(tmp_path / "texts")
    build_here(source, tmp_path / "whole")
    # A second build is killed for real once its first checkpoint is on disk, then gone on with.
    out, log = tmp_path / "killed", tmp_path / "killed.work" / "log.jsonl"
    command = [sys.executable, "-m", "greatctl.reference.build", str(source), str(out), *TINY]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for _ in range(6000):
        if process.poll() is not None or (log.exists() and "checkpoint" in log.read_text()):
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    build_here(source, out)
    events = [json.loads(line) for line in log.read_text().splitlines()]
    starts = [event["step"] for event in events if event["event"] == "start"]
    assert starts[0] == 0 and starts[-1] >= 4
    for name in ("model.safetensors", "tokenizer.json", "config.json", "card.json", "README.md"):
        assert (tmp_path / "whole" / name).read_bytes() == (out / name).read_bytes(), name
    card = json.loads((out / "card.json").read_text())
    assert set(card["heldout"]) == {"b.txt"}
    assert 0 < card["heldout"]["b.txt"]["bits_per_byte"] < 8
    with pytest.raises(InputError, match="another recipe"):
        build_here(source, out, "--seed", "1")


def test_build_refuses_a_held_out_name_that_is_not_there(tmp_path: Path) -> None:
    from greatctl.reference.build import Texts

    with pytest.raises(InputError, match=r"missing.*pg1\.txt"):
        Texts.read(write_texts(tmp_path / "texts"), ["pg1.txt"])


def test_copy_windows_ask_only_for_what_can_be_known() -> None:
    import numpy as np

    from greatctl.reference.windows import IGNORED, copy_window

    row, labels = copy_window(np.random.default_rng(3), 64, 300)
    known = labels != IGNORED
    period = int(np.argmax(known))
    assert 2 <= period <= 32 and known[period:].all()
    assert (row[period:] == row[:-period]).all()


def test_trigram_probabilities_add_up_to_one() -> None:
    import numpy as np

    from greatctl.reference.score import Trigram

    tokens = np.random.default_rng(0).integers(0, 7, 400)
    trigram = Trigram(tokens, 7)
    for a, b in ((0, 1), (3, 3), (6, 2)):
        total = sum(np.exp(-trigram.nats(np.array([a, b, c]))[0]) for c in range(7))
        assert total == pytest.approx(1.0)


def test_prepare_cuts_the_wrapper_joins_lines_and_keeps_verse() -> None:
    from greatctl.reference.prepare import paragraphs

    raw = (
        "The Project Gutenberg EBook of A\r\n\r\n"
        "*** START OF THIS PROJECT GUTENBERG EBOOK A LONG\r\nTITLE ***\r\n\r\n"
        "Produced by Nobody\r\n\r\nIt was a _very_ cold\r\nmorn-\r\ning.[1]\r\n\r\n"
        "    Roses are red,\r\n    violets blue.\r\n"
        "\r\n12  34  56\r\n\r\nEnd of the Project Gutenberg EBook of A\r\n\r\n"
        "*** END OF THIS PROJECT GUTENBERG EBOOK A ***\r\n"
        "Licence."
    )
    assert paragraphs(raw.encode()) == ["It was a very cold morn-ing.", "Roses are red,", "violets blue."]
