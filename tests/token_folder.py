"""A tokens folder written directly, for tests of the stages behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from greatctl.corpus.merge import merge
from greatctl.corpus.parts import Cutter, Encode, Part, Text, tokenize
from greatctl.store.files import write_json


def build(
    folder: Path,
    documents: Sequence[Mapping[str, object]],
    texts: Sequence[str],
    encode: Encode,
    *,
    window: int,
    tokenizer: Mapping[str, Any],
) -> dict[str, int]:
    """Write windows, documents and tokenizer.json into `folder`; one part a text."""
    cutter = Cutter(encode, window, int(tokenizer["bos_id"]), int(tokenizer["pad_id"]))
    parts = [Part(i, [Text(facts, text)]) for i, (facts, text) in enumerate(zip(documents, texts, strict=True))]
    tokenize(folder.with_name(f"{folder.name}-parts"), parts, cutter, lambda characters: None)
    write_json(folder / "tokenizer.json", dict(tokenizer))
    return merge(folder, folder.with_name(f"{folder.name}-parts"), len(parts), window)
