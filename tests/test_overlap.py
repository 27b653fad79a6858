"""What works repeat of each other is found word for word and given to the earlier; a cap is shared out evenly."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from greatctl import manifest
from greatctl.corpus.balance import within_cap
from greatctl.corpus.gutenberg import Gutenberg
from greatctl.corpus.overlap import leaks, overlaps, table

MIRROR = Path(__file__).resolve().parents[2] / "shared" / "mirror" / "gutenberg"
needs_mirror = pytest.mark.skipif(not MIRROR.is_dir(), reason="the folder of real texts (../shared/mirror) is not here")
QUOTE = "Early to bed, and early to rise, makes a man healthy, wealthy and wise, as Poor Richard says."


def prose(seed: int, words: int = 200) -> str:
    """Words that no other seed has."""
    chance = random.Random(seed)
    return " ".join(f"{chance.choice('abcdefgh')}{seed}x{chance.randrange(10**6)}" for _ in range(words))


def test_the_later_work_loses_the_passage_and_its_closing_mark() -> None:
    later = f"{prose(2)}\n\n{QUOTE} {prose(3)}\n"
    (leak,) = leaks({"first": f"{prose(1)} {QUOTE}", "second": later})
    assert (leak.keeper, leak.loser, leak.shared) == ("first", "second", len(QUOTE.split()) - 12)
    assert [later[start:end].strip() for start, end in leak.spans] == [QUOTE]
    assert leak.fraction == pytest.approx(leak.shared / (len(later.split()) - 12))


def test_case_punctuation_and_line_ends_do_not_hide_a_passage() -> None:
    told = "EARLY to bed and\nearly to rise;\n\nmakes a man (healthy) wealthy, and wise. As poor Richard says!"
    (leak,) = leaks({"a": QUOTE, "b": told})
    assert leak.shared == len(QUOTE.split()) - 12 and leak.spans == [(0, len(told))]


def test_twelve_words_are_no_passage_and_thirteen_are() -> None:
    twelve, thirteen = " ".join(QUOTE.split()[:12]), " ".join(QUOTE.split()[:13])
    assert leaks({"a": QUOTE, "b": f"{prose(1)} {twelve} {prose(2)}"}) == []
    assert leaks({"a": QUOTE, "b": f"{prose(1)} {thirteen} {prose(2)}"})[0].shared == 1


def test_one_word_in_the_middle_parts_two_passages() -> None:
    words = prose(5, 60).split()
    changed = [*words[:30], "otherwise", *words[31:]]
    (leak,) = leaks({"a": " ".join(words), "b": " ".join(changed)})
    assert len(leak.spans) == 2 and leak.shared == (30 - 12) + (29 - 12)


def test_a_passage_that_three_works_hold_stays_with_the_first() -> None:
    texts = {name: f"{prose(i)} {QUOTE} {prose(i + 10)}" for i, name in enumerate(("seed", "work", "control"))}
    assert [(leak.keeper, leak.loser) for leak in leaks(texts)] == [("seed", "work"), ("seed", "control")]


def test_what_is_taken_out_leaves_nothing_shared() -> None:
    chance = random.Random(3)
    passages = [prose(100 + i, 40) for i in range(6)]
    texts = {
        f"w{i}": "\n\n".join(chance.sample([*passages, *(prose(1000 * i + j, 30) for j in range(9))], 12))
        for i in range(5)
    }
    for leak in leaks(texts):
        for start, end in sorted(leak.spans, reverse=True):
            texts[leak.loser] = texts[leak.loser][:start] + "\n\n|\n\n" + texts[leak.loser][end:]
    assert leaks({name: text.replace("|", f"{name}stop") for name, text in texts.items()}) == []


def test_short_and_empty_texts_hold_no_passage() -> None:
    assert leaks({"a": "", "b": "one two", "c": QUOTE, "d": ""}) == []
    assert overlaps({}) == [] and table([]).num_rows == 0


def test_the_table_has_a_row_a_passage() -> None:
    found = leaks({"a": QUOTE, "b": f"{QUOTE} {prose(1)} {QUOTE}"})
    rows = table(found).to_pylist()
    assert [(row["loser"], row["keeper"]) for row in rows] == [("b", "a")] * 2
    assert rows[0]["char_start"] == 0 < rows[0]["char_end"] < rows[1]["char_start"]


@needs_mirror
def test_the_known_overlaps_of_the_real_works_are_found() -> None:
    known = {e.pg: e for e in manifest.load(manifest.packaged_path()).entries if e.pg}

    def text(number: int, **fields: object) -> str:
        entry = known[number].model_copy(update=fields)
        return Gutenberg().read(entry, {"o": (MIRROR / f"cache/epub/{number}/pg{number}.txt").read_bytes()}).text

    def shared(one: int, other: int, **fields: object) -> tuple[int, float]:
        rows = overlaps({"one": text(one, **fields), "other": text(other, **fields)})
        return rows[0][2:] if rows else (0, 0.0)

    assert shared(40461, 10366)[1] == pytest.approx(0.091, abs=0.003)
    assert shared(2088, 2010)[0] > 0
    # across two presidents, whole files: the founding papers, which the spans of the manifest leave out
    assert abs(shared(16781, 11314, text_from=None)[0] - 899) <= 20  # 899 with marks and notes in place
    assert shared(16781, 11314) == (0, 0.0)


# the cap


def capped(sizes: dict[str, list[int]], unit: str = "x", cap: int = 100) -> dict[str, list[int]]:
    """Numbers of the windows that stay, by work; `sizes` are tokens of each window."""
    works = list(sizes)
    owner = np.repeat(np.arange(len(works)), [len(v) for v in sizes.values()])
    tokens = np.concatenate([np.asarray(v) for v in sizes.values()])
    keep = within_cap([unit] * len(works), works, owner, tokens, cap=cap)
    return {work: np.flatnonzero(keep[owner == i]).tolist() for i, work in enumerate(works)}


def test_under_the_cap_everything_stays() -> None:
    assert capped({"a": [10] * 5, "b": [10] * 5}) == {"a": [0, 1, 2, 3, 4], "b": [0, 1, 2, 3, 4]}


def test_works_share_the_cap_and_a_short_one_leaves_its_rest_to_the_others() -> None:
    stays = capped({"long": [10] * 50, "short": [10] * 2, "other": [10] * 50})
    assert [len(stays[work]) for work in ("long", "short", "other")] == [4, 2, 4]


def test_windows_that_stay_are_spread_along_the_work() -> None:
    (stays,) = capped({"a": [10] * 97}).values()
    assert len(stays) == 10
    assert {b - a for a, b in pairwise(stays)} <= {9, 10}
    assert stays[0] >= 4 and stays[-1] <= 92


def test_the_cap_is_a_characters_and_not_a_works() -> None:
    owner, tokens = np.repeat([0, 1], 20), np.full(40, 10)
    keep = within_cap(["x", "y"], ["a", "b"], owner, tokens, cap=100)
    assert keep[:20].sum() == keep[20:].sum() == 10
    keep = within_cap(["x", "x"], ["a", "b"], owner, tokens, cap=100)
    assert keep[:20].sum() == keep[20:].sum() == 5


def test_the_choice_depends_on_nothing_but_the_sizes() -> None:
    sizes = {"a": [10] * 31, "b": [7] * 90}
    assert capped(sizes, "x") == capped(sizes, "y")
