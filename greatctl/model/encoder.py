"""Text into token ids at the speed of the Rust tokenizer, with the character at which each token ends.

The tokenizer library can give offsets, but builds a Python tuple for each token, which costs as much as the
tokenizing itself. For byte-level tokenizers (Llama 3, GPT-2, Qwen) they follow from the ids: a token is as many
bytes as its vocabulary entry has letters, so ends are a running sum over bytes, mapped to characters. A text for
which that sum does not come out is done the slow way, and so is every text of other tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from .tokenizer import encode_batch

__all__ = ["Encoder"]

Encoded = tuple[np.ndarray, np.ndarray]


class Encoder:
    """Texts -> per text (ids int32 [n], ends int32 [n]); see `greatctl.model.tokenizer.encode_batch`.

    No special token is ever among the ids: literal special-token text is read as plain characters. All cores are used
    (one text to a core), and the interpreter is free meanwhile.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lengths = _byte_lengths(tokenizer)

    def __call__(self, texts: Sequence[str]) -> Sequence[Encoded]:
        """Encode a batch; equal to encoding each text by itself."""
        if self._lengths is None:
            return encode_batch(self._tokenizer, texts)
        backend = self._tokenizer.backend_tokenizer
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        return _Found(self, texts, backend.encode_batch_fast(list(texts), add_special_tokens=False))

    def unpacked(self, text: str, encoding: Any) -> Encoded:
        """Ids and ends of one text from what the Rust tokenizer made of it."""
        assert self._lengths is not None
        ids = np.array(encoding.ids, dtype=np.int32)
        ends = _ends(text, self._lengths[ids])
        return (ids, ends) if ends is not None else encode_batch(self._tokenizer, [text])[0]


class _Found(Sequence[Encoded]):
    """A batch as the Rust tokenizer left it, unpacked when it is looked at.

    Unpacking holds the interpreter, tokenizing does not: so whoever tokenizes ahead in a thread leaves this to the reader.
    """

    def __init__(self, encoder: Encoder, texts: Sequence[str], encodings: Sequence[Any]) -> None:
        self._encoder, self._texts, self._encodings = encoder, texts, encodings

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        i = int(at)
        return self._encoder.unpacked(self._texts[i], self._encodings[i])


def _byte_lengths(tokenizer: Any) -> np.ndarray | None:
    """Bytes of each token id, or None where the tokenizer is not plainly byte-level."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    if backend.get("normalizer") or not _plainly_byte_level(backend.get("pre_tokenizer")):
        return None
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    lengths = np.zeros(1 + max(vocabulary.values()), dtype=np.int64)
    for token, number in vocabulary.items():
        lengths[number] = len(token)  # its alphabet has one letter a byte
    return lengths


def _plainly_byte_level(step: dict | None) -> bool:
    """Whether a pre-tokenizer ends in ByteLevel and adds no space in front."""
    if step is None:
        return False
    steps = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    return any(s["type"] == "ByteLevel" and not s.get("add_prefix_space") for s in steps)


def _ends(text: str, lengths: np.ndarray) -> np.ndarray | None:
    """The character at which each token ends, int32 [n]; None where the tokens' bytes are not the text's."""
    raw = text.encode()
    ends = lengths.cumsum()
    if (int(ends[-1]) if len(ends) else 0) != len(raw):
        return None
    if len(raw) != len(text):
        begun = ((np.frombuffer(raw, dtype=np.uint8) & 0xC0) != 0x80).cumsum()  # characters begun up to a byte
        ends = begun[ends - 1]
    return ends.astype(np.int32)
