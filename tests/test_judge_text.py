"""Authors with unequal amounts of text: cut down to equal ones before their labels are exchanged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from judge_tables import null_corpus, sparse, unequal_table

from greatctl.features import judge
from greatctl.features.exposure import _cut, _mates, _texts, on_equal_text
from greatctl.features.judgement import weigh
from greatctl.features.units import Parts, gather


def table(characters: tuple[int, int, int], controls: tuple[int, int, int]) -> list[dict]:
    """One row a window of so many authors with so many works of so many windows each."""
    return [
        {"author": f"{role} {a}", "work": f"{role} {a} {w}", "role": role}
        for role, (n, works, windows) in (("character", characters), ("control", controls))
        for a in range(n) for w in range(works) for _ in range(windows)
    ]  # fmt: skip


UNEQUAL = {
    "characters have little": unequal_table(characters_have_much=False),
    "characters have much": unequal_table(characters_have_much=True),
}


def effects(rows: Sequence[dict], seed: int, *, parts: bool) -> int:
    """Null latents that are called an effect at .05, with and without knowing the works' parts."""
    cells = gather(sparse(null_corpus(rows, seed, 100)), rows)
    found = weigh(cells if parts else replace(cells, parts=None), seed=seed).rows
    return sum(float(str(row["q_value"])) <= 0.05 for row in found)


@pytest.mark.parametrize(("who", "seeds"), [("characters have little", (7, 10)), ("characters have much", (0,))])
def test_sparse_latents_of_authors_with_unequal_amounts_of_text_are_not_taken_for_the_role(
    who: str, seeds: tuple[int, ...]
) -> None:
    """The roles differ in spread and skew alone, which in one of seven such corpora looks like an effect."""
    for seed in seeds:
        assert effects(UNEQUAL[who], seed, parts=False) > 0, "a corpus that fools the test over all the text"
        assert effects(UNEQUAL[who], seed, parts=True) == 0


@pytest.mark.slow
@pytest.mark.parametrize("who", UNEQUAL)
def test_of_200_such_corpora_at_most_10_contain_an_effect_at_level_05(who: str) -> None:
    assert sum(effects(UNEQUAL[who], seed, parts=True) > 0 for seed in range(200)) <= 10


def test_what_is_gone_on_equal_amounts_of_text_is_not_supported_and_the_reason_says_so() -> None:
    rows = UNEQUAL["characters have little"]
    reasons = [
        str(row["reason"])
        for seed in (7, 10)
        for row in judge(sparse(null_corpus(rows, seed, 100)), rows, seed=seed)
        if "on equal amounts of text" in str(row["reason"])
    ]
    assert reasons, "of these corpora some differ in what there is of them"
    assert all(reason.startswith("role over all authors: q ") for reason in reasons)


def test_a_true_difference_survives_and_is_measured_on_all_the_text() -> None:
    rows = UNEQUAL["characters have little"]
    x = null_corpus(rows, 3, 20)
    x[:, 0] += 3.0 * np.array([row["role"] == "character" for row in rows])
    cells = gather(x, rows)
    row = weigh(cells).rows[0]
    assert row["verdict"] == "supported" and float(str(row["q_value"])) < 0.01
    whole = cells.author_means[cells.author_role, 0].mean() - cells.author_means[~cells.author_role, 0].mean()
    assert whole == pytest.approx(3.0, abs=0.6) and float(str(row["effect"])) > 2


def test_authors_are_cut_to_the_works_and_windows_of_one_of_the_other_role() -> None:
    rows = table((4, 1, 5), (4, 3, 9)) + table((2, 2, 7), (2, 2, 7))
    cells = gather(np.zeros((len(rows), 1)), [{**r, "author": f"{r['author']} {i >= 128}"} for i, r in enumerate(rows)])
    assert cells.parts is not None
    texts = _texts(cells, cells.parts)
    mates = _mates(texts, cells.author_role)
    assert (cells.author_role[mates] == ~cells.author_role).all()
    rng = np.random.default_rng(0)
    sizes = [sorted(len(work) for work in _cut(texts[a], texts[mates[a]], rng)) for a in range(len(texts))]
    roles = {side: sorted(s for s, r in zip(sizes, cells.author_role, strict=True) if r == side) for side in (0, 1)}
    assert roles[0] == roles[1] == [[5]] * 4 + [[7, 7]] * 2
    kept = [set(np.concatenate(_cut(texts[0], texts[mates[0]], np.random.default_rng(s)))) for s in range(4)]
    assert all(part <= set(np.concatenate([w.parts for w in texts[0]])) for part in kept)


@pytest.mark.parametrize("sizes", [((5, 2, 6), (7, 2, 6)), ((5, 1, 1), (7, 1, 1))])
def test_nothing_is_cut_where_amounts_are_equal(sizes: tuple) -> None:
    rows = table(*sizes)
    assert on_equal_text(gather(null_corpus(rows, 0), rows)) is None


def test_stretches_of_documents_serve_as_windows_do() -> None:
    rows = UNEQUAL["characters have much"]
    x = sparse(null_corpus(rows, 1))
    works, of = np.unique([row["work"] for row in rows], return_inverse=True)
    first = [int(np.flatnonzero(of == w)[0]) for w in range(len(works))]
    means = np.stack([x[of == w].mean(axis=0) for w in range(len(works))])
    parts = Parts(x, np.full(len(x), 200.0), of)
    windows, stretches = (
        on_equal_text(c) for c in (gather(x, rows), gather(means, [rows[i] for i in first], parts=parts))
    )
    assert windows is not None and stretches is not None
    assert np.array_equal(windows.p_max_t, stretches.p_max_t)
    alone = on_equal_text(gather(means, [rows[i] for i in first]))
    assert alone is not None, "without stretches whole works are left out"
