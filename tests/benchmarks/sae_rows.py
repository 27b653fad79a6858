"""Texts -> stored activations with whole works held out: what every trainer of `sae_quality.py` reads.

    python tests/benchmarks/sae_rows.py --texts FOLDER --out FOLDER --rows 2000000

Takes an equal share of every text (.txt, below the folder or inside a .tar.xz), cuts it into windows, reads them
with the frozen model and writes shards as `harvest` does, with rows.json (what is in them) and windows.safetensors.
The works that are held out come last: windows from `held_out_from` on.
"""

from __future__ import annotations

import argparse
import json
import re
import tarfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from greatctl import model as models
from greatctl.model.reading import read
from greatctl.reference import model_dir
from greatctl.store.shards import ShardWriter

_SHARD_WINDOWS = 512
_HELD_OUT_EVERY = 8  # every eighth work
_FRONT, _MOST_CHARS = 3000, 400_000  # past title pages and contents; of each work at most
_BODY = re.compile(r"\*\*\* ?START OF.*?\*\*\*(.*)\*\*\* ?END OF", re.DOTALL)


def texts_in(place: Path) -> dict[str, str]:
    """Name -> text without Project Gutenberg's wrapper, one a book (other copies of the same name count once)."""
    found: dict[str, bytes] = {}
    if place.is_file():
        with tarfile.open(place) as archive:
            for member in sorted(archive.getmembers(), key=lambda m: m.name):
                if member.isfile() and member.name.endswith(".txt") and (stream := archive.extractfile(member)):
                    found.setdefault(Path(member.name).stem, stream.read())
    else:
        for path in sorted(place.rglob("*.txt")):
            found.setdefault(path.stem, path.read_bytes())
    texts = {}
    for name, raw in found.items():
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = raw.decode("latin-1")
        body = _BODY.search(text)
        texts[name] = (body[1] if body else text).replace("\r\n", "\n")
    return {name: text for name, text in texts.items() if len(text) > 20_000}


def windows_of(texts: dict[str, str], tokenizer, rows: int, window: int) -> tuple[torch.Tensor, int, int]:
    """input_ids int32 [n, window] (BOS first), the first held-out window, and the number of works."""
    body = window - 1
    wanted = -(-rows // body)
    parts: dict[str, torch.Tensor] = {}
    for name in sorted(texts):
        ids = tokenizer(texts[name][_FRONT : _FRONT + _MOST_CHARS], add_special_tokens=False)["input_ids"]
        n = len(ids) // body
        if n:
            cut = torch.full((n, window), tokenizer.bos_token_id, dtype=torch.int32)
            cut[:, 1:] = torch.tensor(ids[: n * body], dtype=torch.int32).view(n, body)
            parts[name] = cut
    share = -(-wanted // len(parts))  # windows a work: more where short works leave room
    while sum(min(share, cut.shape[0]) for cut in parts.values()) < wanted and share < max(map(len, parts.values())):
        share += 1 + share // 50
    parts = {name: cut[:share] for name, cut in parts.items()}
    trained = [name for at, name in enumerate(parts) if (at + 1) % _HELD_OUT_EVERY]
    held = [name for at, name in enumerate(parts) if not (at + 1) % _HELD_OUT_EVERY]
    front = sum(parts[name].shape[0] for name in trained)
    return torch.cat([parts[name] for name in trained + held]), front, len(parts)


def make(texts: Path, out: Path, rows: int, *, hook_point: str, device: str, window: int, model: str) -> dict:
    """Write the folder; returns rows.json."""
    began = time.perf_counter()
    source = Path(model_dir()) if model == "bundled" else Path(model)
    frozen = models.load(source, name=model, device=device)
    held = 1 + 1 / (_HELD_OUT_EVERY - 1)  # so that the rows that are trained on are as many as asked for
    ids, front, works = windows_of(texts_in(texts), frozen.tokenizer, round(rows * held), window)
    length = torch.full((ids.shape[0],), window, dtype=torch.int32)
    writer = ShardWriter(out)
    for number, start in enumerate(range(0, ids.shape[0], _SHARD_WINDOWS)):
        span = range(start, min(start + _SHARD_WINDOWS, ids.shape[0]))
        shard = read(frozen, ids, length, span, [hook_point], dtype="float32", batch_size=128, shard=number)
        writer.write(number, shard[hook_point], len(span) * window)
    writer.finish()
    save_file({"input_ids": ids, "length": length}, out / "windows.safetensors")
    facts = {
        "model": model,
        "hook_point": hook_point,
        "d_in": frozen.d_model,
        "special_ids": list(frozen.special_ids),
        "works": works,
        "windows": ids.shape[0],
        "held_out_from": front,
        "window": window,
        "train_rows": front * (window - 1),
        "seconds": round(time.perf_counter() - began, 1),
    }
    (out / "rows.json").write_text(json.dumps(facts, indent=1))
    return facts


def main() -> None:
    """Make the rows and say what was made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--hook-point", default="blocks.4.hook_resid_post")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    print(make(a.texts, a.out, a.rows, hook_point=a.hook_point, device=a.device, window=a.window, model=a.model))


if __name__ == "__main__":
    main()
