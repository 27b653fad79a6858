"""The chain on real books, from an empty folder to a report."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

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
    assert "Darwin" in Path(out.document["summary"]["path"]).read_text()
