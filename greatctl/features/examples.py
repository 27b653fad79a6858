"""From token ids back to text that a person can read.

A byte-level token may be half a character ("é" is two bytes), so a single id cannot always be decoded. Spans
can: text is cut where the decoded prefix is whole, and a token that ends inside a character shows up together
with the one that completes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .best import AFTER, BEFORE

__all__ = ["Decoder", "Passage"]


@dataclass(frozen=True)
class Passage:
    """Text around one token: `pieces` are the tokens' texts, `first` the place of the first in the window."""

    before: str
    token: str
    after: str
    pieces: list[str]
    first: int


class Decoder:
    """Token ids to text with one tokenizer; remembers the text of every id it has met.

    Args:
        tokenizer: a Hugging Face tokenizer (`decode` is all that is used).
        special_ids: ids that are no text; their piece is empty.
    """

    def __init__(self, tokenizer: Any, special_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(special_ids)
        self._single: dict[int, str] = {}
        self._joins = _is_byte_level(tokenizer)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a span, special ids left out."""
        plain = [int(i) for i in ids if int(i) not in self._special]
        return self._tokenizer.decode(plain, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def one(self, token_id: int) -> str:
        """The text of one id for a list of tokens; an incomplete character stays a replacement mark."""
        if token_id not in self._single:
            self._single[token_id] = self.decode([token_id])
        return self._single[token_id]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """One text a token; together they are the decoded span.

        A token that ends inside a character gets an empty piece; the one that completes it, the character.
        """
        quick = [self._single.get(i) or self.one(i) for i in map(int, ids)]
        joined = "".join(quick)
        if self._joins and "\ufffd" not in joined:
            return quick  # whole characters one after the other
        whole = self.decode(ids)
        if "\ufffd" not in whole and joined == whole:
            return quick
        pieces, done = [], 0
        for end in range(1, len(ids) + 1):
            prefix = self.decode(ids[:end])
            last = end == len(ids)
            if last or (len(prefix) >= done and whole.startswith(prefix) and not prefix.endswith("\ufffd")):
                pieces.append(whole[done : len(whole) if last else len(prefix)])
                done = len(prefix)
            else:
                pieces.append("")
        return pieces

    def passage(self, ids: Sequence[int], position: int, *, before: int = BEFORE, after: int = AFTER) -> Passage:
        """The text around `position` of a window's ids (without padding).

        Where the token ends inside a character, `token` is the character that it begins.
        """
        first, stop = max(0, position - before), min(len(ids), position + after + 1)
        pieces = self.pieces(ids[first:stop])
        here = position - first
        end = here
        while not pieces[end] and end + 1 < len(pieces):
            end += 1
        return Passage("".join(pieces[:here]), pieces[end], "".join(pieces[end + 1 :]), pieces, first)


def _is_byte_level(tokenizer: Any) -> bool:
    """Whether text is the tokens' bytes one after the other, with nothing stripped or put between."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return type(getattr(backend, "decoder", None)).__name__ == "ByteLevel"
