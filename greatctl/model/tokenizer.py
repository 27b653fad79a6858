"""Tokenizers: text in, token ids out, with a BOS policy that cannot go wrong twice.

The policy, everywhere in greatctl: exactly one BOS in front, no other special token anywhere. Literal
special-token text in a document ("<|begin_of_text|>" in a book about tokenizers) is read as plain characters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .loading import locate

__all__ = ["bos_id", "digest", "encode", "encode_batch", "load_tokenizer", "pad_id", "special_ids"]

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


def load_tokenizer(source: str | Path, *, offline: bool = False) -> Any:
    """The Hugging Face tokenizer of a folder or hub id (a fast one, since character offsets are needed).

    Raises:
        AccessError: the hub refuses or the cache is empty.
        InputError: there is no tokenizer, or it has no fast form.
    """
    folder = locate(source, offline=offline).folder
    from transformers import AutoTokenizer  # a second of import, paid only where it is needed

    fix = "a tokenizer.json beside config.json is what is needed"
    if not any((folder / name).is_file() for name in _FILES):
        raise InputError(f"{source} has no tokenizer", why=f"none of {', '.join(_FILES)} is there", fix=fix)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(
            f"the tokenizer of {source} cannot be read", why=str(error).splitlines()[0], fix=fix
        ) from error
    if not tokenizer.is_fast:
        raise InputError(f"the tokenizer of {source} gives no character offsets", why="it has no fast form", fix=fix)
    return tokenizer


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text` with exactly one BOS in front; special-token text in it stays text."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    bos = bos_id(tokenizer)
    return [bos, *(i for i in ids if i != bos)]  # should a tokenizer insist on reading text as BOS


def encode_batch(tokenizer: Any, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per text: token ids int32 [n], none of them special, and the character where each ends, int32 [n]."""
    batch = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    found = []
    for ids, offsets in zip(batch["input_ids"], batch["offset_mapping"], strict=True):
        ends = np.fromiter((end for _, end in offsets), dtype=np.int32, count=len(offsets))
        found.append((np.asarray(ids, dtype=np.int32), ends))
    return found


def bos_id(tokenizer: Any) -> int:
    """The id that begins every window: BOS, or EOS where a family has no BOS (Qwen, GPT-2).

    Raises:
        InputError: the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise InputError(
        "the tokenizer has neither a BOS nor an EOS token",
        why="every window must begin with one",
        fix="use --model with a whole Hugging Face folder (tokenizer.json and tokenizer_config.json, which names them)",
    )


def pad_id(tokenizer: Any) -> int:
    """The id that fills the end of a short window: PAD, else EOS, else BOS. Never read as text."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return bos_id(tokenizer)


def special_ids(tokenizer: Any) -> list[int]:
    """Every id that is no text, sorted: all special added tokens (Llama 3 has 256), BOS and padding."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted({*added, *tokenizer.all_special_ids, bos_id(tokenizer), pad_id(tokenizer)})


def digest(source: str | Path, *, offline: bool = False) -> str:
    """sha256 over the tokenizer's files: two models with one digest read text alike."""
    folder = locate(source, offline=offline).folder
    total = hashlib.sha256()
    for name in _FILES:
        path = folder / name
        if path.is_file():
            total.update(f"{name} {path.stat().st_size}\n".encode())
            total.update(path.read_bytes())
    return total.hexdigest()
