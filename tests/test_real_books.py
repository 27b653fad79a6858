"""The chain on real books, from an empty folder to a report."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from greatctl.corpus.trace import byte_range
from greatctl.corpus.windows import TokenStore
from greatctl.store.tables import read_rows

ROOT = Path(__file__).resolve().parents[1]
MIRROR = ROOT.parent / "shared" / "mirror"
Greatctl = Callable[..., "object"]


@pytest.fixture(scope="module")
def mirror() -> Iterator[str]:
    """The loopback server over real Gutenberg files."""
    if not (MIRROR / "serve.py").exists():
        pytest.skip("the mirror of real books is not beside this checkout (../shared/mirror)")
    process = subprocess.Popen([sys.executable, str(MIRROR / "serve.py")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    yield next(word for word in line.split() if word.startswith("http")).rstrip("/")
    process.kill()
    process.communicate()


def test_real_books_to_a_report(greatctl: Greatctl, mirror: str, tmp_path: Path) -> None:
    """The chain on two real books, cut short so that it stays a test: a small autoencoder, one pair."""
    assert greatctl("init", cwd=tmp_path).code == 0
    controls = ["--control", "wood-common-objects"]
    people = ["--source", "darwin-autobiography"]
    out = greatctl("fetch", *people, *controls, "--mirror", mirror, "--json", cwd=tmp_path)
    assert out.code == 0, out.out + out.err
    pair = [
        "--clean",
        "The brave man was a",
        "--corrupted",
        "The idle man was a",
        "--answer",
        " great",
        "--wrong-answer",
    ]
    stages = [
        ["tokenize", "--model", "bundled"],
        ["harvest", "--batch-size", "32", "--layer", "1"],
        ["train", "--arch", "topk", "--d-sae", "512", "--steps", "30", "--batch-size", "1024"],
        ["interpret"],
        ["patch", "--metric", "logit-diff", *pair, " poor"],
        ["report"],
    ]
    for stage in stages:
        out = greatctl(*stage, "--json", cwd=tmp_path, timeout=600)
        assert out.code == 0, (stage, out.out, out.err)
    page = Path(out.document["summary"]["path"]).read_text()
    assert "Darwin" in page
    follow_a_quotation_to_its_bytes(tmp_path, page)


def follow_a_quotation_to_its_bytes(project: Path, page: str) -> None:
    """From what the report quotes, through window and clean text, to the bytes of the file that was downloaded."""
    (features,) = (p for p in (project / "results/features").iterdir() if not p.name.startswith("."))
    rows = [r for r in read_rows(features / "examples.parquet") if r["source_id"] == "darwin-autobiography"]
    cited = [r for r in rows if f"{r['source_id']} {r['char_start']}-{r['char_end']}" in page]
    assert cited, "the report cites no passage of the book"
    source = project / "data/raw/darwin-autobiography"
    text, original = (source / "text.txt").read_text(encoding="utf-8"), next(source.glob("original.*")).read_bytes()
    tokens = TokenStore(next((project / "data/tokens").glob("bundled-256")))
    for row in cited[:20]:
        quoted = "".join(row["pieces"])
        clean = text[row["char_start"] : row["char_end"]]
        assert letters(clean) == letters(quoted)
        assert tokens.span(row["window"], row["position"])[1] <= row["char_end"]
        assert tokens.windows["char_start"][row["window"]] <= row["char_start"]
        start, end = byte_range(original, text, row["char_start"], row["char_end"])
        assert letters(original[start:end].decode("latin-1")) == letters(clean)


def letters(text: str) -> str:
    return "".join(c for c in text.lower() if c.isascii() and c.isalpha())
