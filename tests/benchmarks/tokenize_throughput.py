"""How fast and how lean is `greatctl tokenize` on a folder of text, beside `datasets.map` with the same tokenizer?

    python tests/benchmarks/tokenize_throughput.py --megabytes 2000

Writes that much generated text (sentences of the bundled sample texts in random order) as Parquet files, then runs, each
in a process of its own on all cores: the Rust tokenizer alone on texts in memory (the floor), `datasets.map` in batches
with one process a core and nothing but ids kept, and `greatctl tokenize --texts`, which also keeps where each token ends
and cuts windows. Prints MB/s of text and the peak memory of each process tree. No test asserts a time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROWS = 2000  # documents a row group
DOCUMENT = 4000  # characters, about


def generate(folder: Path, megabytes: int, files: int, seed: int = 0) -> int:
    """Write the texts; returns their bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from greatctl.reference import texts_dir

    whole = "\n".join(p.read_text("utf-8") for p in sorted(Path(texts_dir()).rglob("*.txt")))
    sentences = [s.strip() for s in re.split(r"(?<=[.!?])\s+", whole) if len(s) > 20]
    draw, total = random.Random(seed), 0
    folder.mkdir(parents=True)
    for number in range(files):
        with pq.ParquetWriter(folder / f"{number:05d}.parquet", pa.schema([("text", pa.string())])) as writer:
            size, wanted = 0, megabytes * 1_000_000 // files
            while size < wanted:
                texts = [" ".join(draw.choices(sentences, k=DOCUMENT // 90)) for _ in range(ROWS)]
                texts = texts[: max(1, (wanted - size) // DOCUMENT + 1)]
                writer.write_table(pa.table({"text": texts}))
                size += sum(len(text.encode()) for text in texts)
        total += size
    return total


FLOOR = """
import sys, time, pyarrow.parquet as pq
from greatctl.model.tokenizer import load_tokenizer
tokenizer = load_tokenizer(sys.argv[2]).backend_tokenizer
file = pq.ParquetFile(sorted(__import__("pathlib").Path(sys.argv[1]).glob("*.parquet"))[0])
texts = next(file.iter_batches(2000)).column(0).to_pylist()
size = sum(len(t.encode()) for t in texts)
tokenizer.encode_batch_fast(texts[:50], add_special_tokens=False)
start = time.perf_counter()
tokenizer.encode_batch_fast(texts, add_special_tokens=False)
print("RATE", size / (time.perf_counter() - start) / 1e6)
"""

MAP = """
import os, sys, time
import datasets
from greatctl.model.tokenizer import load_tokenizer
datasets.disable_progress_bars()
tokenizer = load_tokenizer(sys.argv[2])
files = sorted(map(str, __import__("pathlib").Path(sys.argv[1]).glob("*.parquet")))
rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=sys.argv[3])
def ids(batch):
    return {"input_ids": tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False)["input_ids"]}
start = time.perf_counter()
made = rows.map(ids, batched=True, num_proc=os.cpu_count(), remove_columns=["text"])
print("SECONDS", time.perf_counter() - start)
"""


def measured(words: list[str], **more: object) -> tuple[float, float, str]:
    """Run a command; (seconds, peak MB of its process tree, its output)."""
    started = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)  # type: ignore
    peak, over = [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            peak[0] = max(peak[0], tree_megabytes(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, err = process.communicate()
    over.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(words[:4])} failed:\n{err[-2000:]}")
    return time.perf_counter() - started, peak[0], out


def tree_megabytes(pid: int) -> float:
    """Proportional memory of a process and its children: private pages, and its part of shared and mapped ones."""
    total, waiting = 0, [pid]
    while waiting:
        one = waiting.pop()
        try:
            text = Path(f"/proc/{one}/smaps_rollup").read_text()
            total += int(re.search(r"^Anonymous:\s+(\d+)", text, re.MULTILINE)[1])  # type: ignore[index]
            waiting += [
                int(c) for t in Path(f"/proc/{one}/task").iterdir() for c in (t / "children").read_text().split()
            ]
        except (OSError, TypeError):
            continue
    return total / 1000


def main() -> None:
    """Print the table."""
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--megabytes", type=int, default=200)
    ask.add_argument("--files", type=int, default=8)
    ask.add_argument("--model", default="bundled", help="a folder with a tokenizer, or `bundled`")
    ask.add_argument("--alone", action="store_true", help="only greatctl: for a large text")
    given = ask.parse_args()
    from greatctl.reference import model_dir

    folder = str(model_dir()) if given.model == "bundled" else given.model
    quiet = {"env": {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}}
    alone = {"env": {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as place:
        texts = Path(place) / "texts"
        size = generate(texts, given.megabytes, given.files) / 1e6
        print(f"{size:,.0f} MB of text in {given.files} files, {os.cpu_count()} cores, tokenizer {given.model}")
        floor = theirs = peak_map = float("nan")
        if not given.alone:
            _, _, out = measured([sys.executable, "-c", FLOOR, str(texts), folder], **quiet)
            floor = float(out.split()[1])
            words = [sys.executable, "-c", MAP, str(texts), folder, str(Path(place) / "cache")]
            _, peak_map, out = measured(words, **alone)
            theirs = size / float(out.split()[-1])
        project = Path(place) / "project"
        project.mkdir()
        words = [
            "-m",
            "greatctl",
            "-C",
            str(project),
            "tokenize",
            "--texts",
            str(texts),
            "--model",
            given.model,
            "--json",
        ]
        started = time.perf_counter()
        _, peak, out = measured([sys.executable, *words], **quiet)
        ours = size / (time.perf_counter() - started)
        tokens = json.loads(out)["summary"]["n_tokens"]
    print(f"{'':34}{'MB/s':>8}{'of map':>9}{'peak MB':>10}")
    print(f"{'Rust tokenizer alone (floor)':34}{floor:8.2f}{floor / theirs:9.2f}{'':>10}")
    print(f"{'datasets.map, ids only':34}{theirs:8.2f}{1:9.2f}{peak_map:10,.0f}")
    print(f"{'greatctl tokenize, whole command':34}{ours:8.2f}{ours / theirs:9.2f}{peak:10,.0f}")
    print(f"{tokens:,} tokens")


if __name__ == "__main__":
    main()
