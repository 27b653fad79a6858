"""Marked spans: which places of two prompts of unequal length are the same place.

    spans = { person = ["George Washington", "Tom"] }

names a piece of the clean prompt and its counterpart in the corrupted one. Spans are aligned at their ends,
since a causal model has read a name only at its last token; everything outside of the spans must agree
token by token. Without such marks prompts of unequal length are refused: no alignment is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

__all__ = ["Places", "Spans", "align", "place", "unfit"]

Encode = Callable[[str], Sequence[int]]
Spans = Mapping[str, tuple[str, str]]  # name -> (text in the clean prompt, text in the corrupted one)
Places = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  # name -> (clean positions, corrupted positions)


def unfit(clean: str, corrupted: str, spans: Spans) -> str:
    """Why these spans do not mark these prompts, or "" where they do; needs no tokenizer."""
    found: list[list[tuple[int, int, str]]] = []
    for prompt, which, what in ((clean, 0, "clean"), (corrupted, 1, "corrupted")):
        here = []
        for name, texts in spans.items():
            times = prompt.count(texts[which]) if texts[which] else 0
            if times != 1:
                return f"the text {texts[which]!r} of span {name!r} stands {times} times in the {what} prompt, not once"
            start = prompt.index(texts[which])
            here.append((start, start + len(texts[which]), name))
        here.sort()
        for (_, end, first), (start, _, second) in pairwise(here):
            if start < end:
                return f"the spans {first!r} and {second!r} overlap in the {what} prompt"
        found.append(here)
    if [name for *_, name in found[0]] != [name for *_, name in found[1]]:
        return "the spans stand in another order in the corrupted prompt"
    return ""


def place(prompt: str, ids: Sequence[int], texts: Mapping[str, str], encode: Encode) -> dict[str, range] | str:
    """Token positions of each span of a prompt, or why they cannot be told.

    A space before the span's text belongs to its first token, as tokenizers have it. Positions are found by
    encoding the prompt up to either end, which holds for any tokenizer: what is encoded must be the
    beginning of `ids`.

    Args:
        prompt: the whole prompt.
        ids: its token ids.
        texts: name -> text, each once in the prompt.
        encode: text -> token ids, BOS first.
    """
    found: dict[str, range] = {}
    for name, text in texts.items():
        start = prompt.index(text)
        begin = _tokens_of(prompt[:start], ids, encode)
        if begin is None and prompt[:start].endswith(" "):
            begin = _tokens_of(prompt[: start - 1], ids, encode)
        end = _tokens_of(prompt[: start + len(text)], ids, encode)
        if begin is None or end is None or begin >= end:
            return f"the span {name!r} ({text!r}) does not begin and end with a token"
        found[name] = range(begin, end)
    return found


def align(
    clean: Sequence[int], corrupted: Sequence[int], spans: Mapping[str, tuple[range, range]]
) -> tuple[tuple[int, int], ...] | str:
    """Pairs of (clean, corrupted) positions that correspond, in order, or why there are none.

    Prompts of equal length whose spans lie at the same positions correspond one by one. Otherwise spans are
    aligned at their ends, and the tokens outside of them must agree one by one.

    Args:
        clean, corrupted: token ids.
        spans: name -> (positions in clean, in corrupted), in the same order in both.
    """
    if len(clean) == len(corrupted) and all(a == b for a, b in spans.values()):
        return tuple((i, i) for i in range(len(clean)))
    pairs: list[tuple[int, int]] = []
    ours, theirs = 0, 0
    ends = (range(len(clean), len(clean)), range(len(corrupted), len(corrupted)))
    for here, there in [*sorted(spans.values(), key=lambda both: both[0].start), ends]:
        outside = list(range(ours, here.start)), list(range(theirs, there.start))
        if [clean[i] for i in outside[0]] != [corrupted[i] for i in outside[1]]:
            return (
                "the prompts differ outside of the marked spans: tokens "
                f"{ours}-{here.start - 1} of the clean and {theirs}-{there.start - 1} of the corrupted one"
            )
        pairs += zip(*outside, strict=True)
        shared = min(len(here), len(there))
        pairs += zip(here[len(here) - shared :], there[len(there) - shared :], strict=True)
        ours, theirs = here.stop, there.stop
    return tuple(pairs)


def _tokens_of(beginning: str, ids: Sequence[int], encode: Encode) -> int | None:
    """How many tokens of `ids` the text `beginning` makes up; None where a token reaches across its end."""
    some = tuple(encode(beginning))
    return len(some) if tuple(ids[: len(some)]) == some else None
