"""Prompt pairs under a tokenizer: what can be patched, where its places correspond, and what is refused.

Whether a pair can be patched depends on the tokenizer in use: position 7 of both prompts must be the same
place, or marked spans must say which places are. What does not fit is refused and listed with its reason;
nothing is padded, cut or guessed. Answers are tokenised after their prompt, because " great" alone and
" great" after a word need not be the same token. Tokens that all answers begin with become part of the
prompts, so that the answer position is where the answers part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .pair_files import Pair, read_pairs
from .spans import Places, align, place

__all__ = ["EncodedPair", "Pair", "Refusal", "clusters_of", "encode_pairs", "read_pairs"]

Encode = Callable[[str], Sequence[int]]
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class EncodedPair:
    """A pair that can be patched. Left out, the last four are those of two prompts of one length with one id an
    answer.

    Attributes:
        pair: the texts.
        clean_ids, corrupted_ids: the prompts, BOS first, with the first tokens that all answers share.
        answer_id, wrong_answer_id: first token of the first right and of the first wrong answer.
        answers, wrong_answers: the alternatives, each of one token or more.
        alignment: (clean position, corrupted position) of places that correspond, in order; a position
            without counterpart is not in it.
        spans: name -> (clean positions, corrupted positions) of the marked spans.
    """

    pair: Pair
    clean_ids: Tokens
    corrupted_ids: Tokens
    answer_id: int
    wrong_answer_id: int
    answers: Sequence[Tokens] = ()
    wrong_answers: Sequence[Tokens] = ()
    alignment: tuple[tuple[int, int], ...] = ()
    spans: Places = field(default_factory=dict)

    def __post_init__(self) -> None:
        same = tuple((i, i) for i in range(len(self.clean_ids)))
        for name, value in (
            ("answers", ((self.answer_id,),)),
            ("wrong_answers", ((self.wrong_answer_id,),)),
            ("alignment", same),
        ):
            if not getattr(self, name):
                object.__setattr__(self, name, value)

    @property
    def length(self) -> int:
        """Tokens of the clean prompt, BOS included; of both where they are equally long."""
        return len(self.clean_ids)

    @property
    def first_difference(self) -> int:
        """The first clean position that is not the same token at the same place of the corrupted prompt."""
        same = {i for i, j in self.alignment if i == j and self.clean_ids[i] == self.corrupted_ids[j]}
        return next((i for i in range(self.length) if i not in same), self.length)

    @property
    def plain(self) -> bool:
        """One right and one wrong answer, each of one token."""
        return all(len(some) == 1 and len(some[0]) == 1 for some in (self.answers, self.wrong_answers))

    @property
    def equally_long(self) -> bool:
        """Both prompts have the same number of tokens and correspond one by one."""
        return len(self.clean_ids) == len(self.corrupted_ids) == len(self.alignment)


@dataclass(frozen=True)
class Refusal:
    """A pair that was not executed, and why."""

    pair: Pair
    reason: str


def encode_pairs(
    pairs: Sequence[Pair], encode: Encode, *, n_ctx: int | None = None, plain: bool = True
) -> tuple[list[EncodedPair], list[Refusal]]:
    """Encode every pair, or say why it cannot be used; the order of `pairs` is kept in both lists.

    Args:
        pairs: the pairs.
        encode: text -> token ids with exactly one BOS in front.
        n_ctx: the model's context; longer prompts (with the answers behind them) are refused.
        plain: refuse what only some methods can use: answers of several tokens, sets of answers, and prompts
            of unequal length that marked spans align.
    """
    encoded: list[EncodedPair] = []
    refused: list[Refusal] = []
    for pair in pairs:
        result = _encode(pair, encode, n_ctx)
        if plain and isinstance(result, EncodedPair):
            result = _not_plain(result) or result
        if isinstance(result, str):
            refused.append(Refusal(pair, result))
        else:
            encoded.append(result)
    return encoded, refused


def clusters_of(pairs: Sequence[Pair]) -> list[str]:
    """The cluster [n] that each pair is resampled with.

    Pairs of one template are one cluster. Where all are of a single one, the pairs themselves are the units:
    intervals then speak of further fillings of this template, not of other templates.
    """
    labels = [pair.cluster for pair in pairs]
    return labels if len(set(labels)) > 1 else [pair.id for pair in pairs]


def _encode(pair: Pair, encode: Encode, n_ctx: int | None) -> EncodedPair | str:
    clean, corrupted = tuple(encode(pair.clean)), tuple(encode(pair.corrupted))
    if clean == corrupted:
        return "the clean and the corrupted prompt are the same tokens"
    aligned = _aligned(pair, clean, corrupted, encode)
    if isinstance(aligned, str):
        return aligned
    alignment, spans = aligned
    answers = _answers(pair, clean, corrupted, encode)
    if isinstance(answers, str):
        return answers
    right, wrong = answers
    fault = _clash(right, wrong)
    if fault:
        return fault
    shared = _shared([*right, *wrong])
    longest = max(len(clean), len(corrupted)) + max(map(len, (*right, *wrong))) - 1
    if n_ctx is not None and longest > n_ctx:
        return f"{longest} tokens do not fit into the model's context of {n_ctx}"
    more = right[0][:shared]
    alignment += tuple((len(clean) + i, len(corrupted) + i) for i in range(shared))
    right, wrong = (tuple(dict.fromkeys(ids[shared:] for ids in some)) for some in (right, wrong))
    return EncodedPair(
        pair, clean + more, corrupted + more, right[0][0], wrong[0][0], right, wrong, alignment, spans
    )  # fmt: skip


def _aligned(
    pair: Pair, clean: Tokens, corrupted: Tokens, encode: Encode
) -> tuple[tuple[tuple[int, int], ...], Places] | str:
    """Which positions correspond, and where the marked spans lie."""
    unequal = f"unequal lengths: the clean prompt has {len(clean)} tokens, the corrupted one {len(corrupted)}"
    if not pair.spans:
        same = tuple((i, i) for i in range(len(clean)))
        return (same, {}) if len(clean) == len(corrupted) else f"{unequal}, and no spans are marked"
    placed: list[Mapping[str, range]] = []
    for which, (prompt, ids) in enumerate(((pair.clean, clean), (pair.corrupted, corrupted))):
        texts = {name: both[which] for name, both in pair.spans.items()}
        found = place(prompt, ids, texts, encode)
        if isinstance(found, str):
            return found
        placed.append(found)
    spans = {name: (placed[0][name], placed[1][name]) for name in pair.spans}
    alignment = align(clean, corrupted, spans)
    if isinstance(alignment, str):
        return f"{unequal}, and {alignment}" if len(clean) != len(corrupted) else alignment
    return alignment, {name: (tuple(a), tuple(b)) for name, (a, b) in spans.items()}


def _answers(
    pair: Pair, clean: Tokens, corrupted: Tokens, encode: Encode
) -> tuple[tuple[Tokens, ...], tuple[Tokens, ...]] | str:
    """Token ids of the right and of the wrong answers, the same after both prompts."""
    found: list[tuple[Tokens, ...]] = []
    for name, words in (("answer", pair.answers), ("wrong answer", pair.wrong_answers)):
        ids: list[Tokens] = []
        for word in words:
            after_clean = _continuation(clean, tuple(encode(pair.clean + word)))
            after_corrupted = _continuation(corrupted, tuple(encode(pair.corrupted + word)))
            if not after_clean or not after_corrupted:
                return f"the {name} {word!r} merges with the end of the prompt (does the prompt end in a space?)"
            if after_clean != after_corrupted:
                return f"the {name} {word!r} is another token after the corrupted prompt"
            ids.append(after_clean)
        found.append(tuple(ids))
    return found[0], found[1]


def _continuation(prompt: Tokens, whole: Tokens) -> Tokens | None:
    """What follows `prompt` in `whole`, or None where `whole` does not begin with it."""
    return whole[len(prompt) :] if whole[: len(prompt)] == prompt else None


def _clash(right: Sequence[Tokens], wrong: Sequence[Tokens]) -> str:
    """Why these answers cannot be told apart: one is another, or its beginning (and so counts it twice)."""
    for ids in right:
        if ids in wrong:
            return f"both answers are token {ids[0]}" if len(ids) == 1 else "a right answer is a wrong one too"
    everyone = [*right, *wrong]
    for i, ids in enumerate(everyone):
        for j, other in enumerate(everyone):
            if i != j and other[: len(ids)] == ids:
                return f"one answer (tokens {list(ids)}) is the beginning of another (tokens {list(other)})"
    return ""


def _shared(answers: Sequence[Tokens]) -> int:
    """How many first tokens all answers have in common; none is the beginning of another."""
    shortest = min(map(len, answers))
    return next((i for i in range(shortest) if len({ids[i] for ids in answers}) > 1), shortest)


def _not_plain(pair: EncodedPair) -> str:
    """Why a pair is not plain, or "" where it is."""
    if not pair.equally_long:
        return (
            f"unequal lengths: the clean prompt has {pair.length} tokens, the corrupted one {len(pair.corrupted_ids)}"
        )
    for name, some in (("answer", pair.answers), ("wrong answer", pair.wrong_answers)):
        if len(some) > 1:
            return f"there are {len(some)} {name}s, not one"
        if len(some[0]) > 1:
            return f"the {name} is {len(some[0])} tokens, not one"
    return ""
