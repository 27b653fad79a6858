"""Cleaning beside gutenbergpy's stripper, book by book: words kept and lost, lines of licence left.

    python tests/benchmarks/strippers.py [--mirror DIR] [--peer PYTHON] [--json FILE]

The peer runs in an environment of its own (default .bench/gutenberg/bin/python; `python -m venv .bench/gutenberg &&
.bench/gutenberg/bin/pip install gutenbergpy`); without it only our columns are filled, with a word. The texts are the
files of the mirror: what Project Gutenberg has in its folders, and old and joined files.

Words are runs of letters. `span` is what our cleaning keeps of the author's own span; `whole` the same without the
manifest's span, which is what a stripper can be held against. `they lost` are words of `whole` that the peer does not
have, `they add` words that only the peer has (header, licence, credits, captions). A line of licence is one that
matches the audit's list (greatctl.corpus.audit.LICENCE).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from greatctl import manifest  # noqa: E402
from greatctl.corpus.audit import LICENCE, suspicious_lines  # noqa: E402
from greatctl.corpus.encoding import decode, normalise  # noqa: E402
from greatctl.corpus.gutenberg import Gutenberg  # noqa: E402
from greatctl.entries import Entry  # noqa: E402
from greatctl.errors import GreatctlError  # noqa: E402

PEER = """
import sys
from pathlib import Path
from gutenbergpy.textget import strip_headers
for path, out in zip(sys.argv[2::2], sys.argv[3::2]):
    Path(out).write_bytes(strip_headers(Path(path).read_bytes()))
"""
COLUMNS = ("file", "span", "whole", "theirs", "they lost", "they add", "licence ours", "licence theirs")


def words(text: str) -> Counter[str]:
    """Words of a text, each with how often it stands there."""
    return Counter(re.findall(r"[^\W\d_]+", text.replace("^", "")))


def licence_lines(text: str) -> int:
    """Lines that belong to a licence, a header or a credit."""
    return len({line for line, kind, _ in suspicious_lines(text) if kind in LICENCE})


def ours(entry: Entry, data: bytes) -> tuple[str | None, str | None]:
    """(text of the author's span, text of the whole book); None where it is refused."""
    texts = []
    for one in (entry, entry.model_copy(update={"text_from": None, "text_to": None})):
        try:
            texts.append(Gutenberg().read(one, {"original.txt": data}).text)
        except GreatctlError:
            texts.append(None)
    return texts[0], texts[1]


def theirs(peer: Path, paths: Sequence[Path], folder: Path) -> dict[Path, str]:
    """What the peer keeps of each file, decoded as we decode; empty where the peer is not installed."""
    if not peer.exists():
        return {}
    outs = [folder / f"{i}.txt" for i in range(len(paths))]
    pairs = [str(p) for pair in zip(paths, outs, strict=True) for p in pair]
    subprocess.run([str(peer), "-c", PEER, "-", *pairs], check=True)
    charsets = [decode(path.read_bytes())[1] for path in paths]
    return {
        path: normalise(out.read_bytes().decode(charset, "replace"))
        for path, out, charset in zip(paths, outs, charsets, strict=True)
    }


def table(mirror: Path, peer: Path) -> list[dict[str, object]]:
    """One row a file."""
    entries = {e.pg: e for e in manifest.load(ROOT / "sources.toml").entries if e.pg}
    paths = [
        *sorted(mirror.glob("cache/epub/*/pg*.txt")),
        *sorted(mirror.glob("cache-20*/*/pg*.txt")),
        *sorted(mirror.glob("files/*/*.txt")),
        *sorted(mirror.glob("files/*/old/*.txt")),
    ]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        peers = theirs(peer, paths, Path(scratch))
        for path in paths:
            number = int(next(part for part in reversed(path.parts) if part.isdigit()))
            entry = entries.get(number) or entries[1228].model_copy(update={"pg": number, "text_from": None})
            span, whole = ours(entry, path.read_bytes())
            rows.append(_row(str(path.relative_to(mirror)), span, whole, peers.get(path)))
    return rows


def _row(name: str, span: str | None, whole: str | None, peer: str | None) -> dict[str, object]:
    row: dict[str, object] = {"file": name}
    row["span"] = words(span).total() if span is not None else None
    row["whole"] = words(whole).total() if whole is not None else None
    row["licence ours"] = licence_lines(whole) if whole is not None else None
    if peer is not None:
        row["theirs"], row["licence theirs"] = words(peer).total(), licence_lines(peer)
        if whole is not None:
            row["they lost"] = (words(whole) - words(peer)).total()
            row["they add"] = (words(peer) - words(whole)).total()
    return row


def main() -> None:
    """Print the table; `--json` writes it as well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mirror", type=Path, default=ROOT.parent / "shared" / "mirror" / "gutenberg")
    parser.add_argument("--peer", type=Path, default=ROOT / ".bench" / "gutenberg" / "bin" / "python")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if not given.mirror.is_dir():
        sys.exit(f"no texts at {given.mirror}; give --mirror")
    if not given.peer.exists():
        print(f"gutenbergpy is not installed ({given.peer} is not there): its columns stay empty", file=sys.stderr)
    rows = table(given.mirror, given.peer)
    width = max(len(str(row["file"])) for row in rows)
    print("  ".join([COLUMNS[0].ljust(width), *(c.rjust(max(9, len(c))) for c in COLUMNS[1:])]))
    for row in rows:
        cells = ["-" if row.get(c) is None else f"{row[c]:,}" for c in COLUMNS[1:]]
        padded = [cell.rjust(max(9, len(c))) for cell, c in zip(cells, COLUMNS[1:], strict=True)]
        print("  ".join([str(row["file"]).ljust(width), *padded]))
    totals = {c: sum(int(str(row[c])) for row in rows if row.get(c) is not None) for c in COLUMNS[1:]}
    print("total: " + ", ".join(f"{c} {total:,}" for c, total in totals.items()))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
