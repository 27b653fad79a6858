"""Verdicts on planted truth, null corpora, and every rule that can take a verdict away."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from judge_tables import between_authors, characters, column, made_up_table, null_corpus, real_table

from greatctl.errors import UsageError
from greatctl.features import judge
from greatctl.features.adjust import _Grouped
from greatctl.features.judgement import weigh
from greatctl.features.units import gather

ROWS = real_table()
SD = between_authors(ROWS)
HARD = np.array([row["hard"] for row in ROWS], dtype=float)


def verdicts(x: np.ndarray, rows=ROWS, **more) -> list[str]:
    return [row["verdict"] for row in judge(x, rows, **more)]


def planted(seed: int = 0, n_latents: int = 30) -> np.ndarray:
    """Null latents, but for the first seven (see the test)."""
    x = null_corpus(ROWS, seed, n_latents)
    x[:, 0] += 3 * SD * characters(ROWS)
    x[:, 1] += 10 * SD * column(ROWS, "author", "Charles Darwin")
    x[:, 2] += 5 * SD * column(ROWS, "era", "18c")
    x[:, 3] += 5 * SD * column(ROWS, "genre", "letters")
    x[:, 4] += 5 * SD * column(ROWS, "topic", "war")
    x[:, 5] += 6 * SD * column(ROWS, "translated", True)
    x[:, 6] += 4 * SD * (characters(ROWS) + HARD)
    return x


def test_over_the_real_table_exactly_the_latent_that_follows_role_is_supported() -> None:
    found = verdicts(planted())
    assert found[:5] == [
        "supported",
        "not-separable-author",
        "not-separable-era",
        "not-separable-genre",
        "not-separable-topic",
    ]
    assert found[5] == "not-separable-genre", "a translation is a way of writing"
    assert found[6] == "not-separable-topic", "what fires on praise of the great as well has found the subject"
    assert found.count("supported") == 1
    assert set(found[7:]) == {"not-supported"}


def test_the_reason_holds_the_numbers_that_decided() -> None:
    rows = judge(planted(), ROWS)
    assert "Charles Darwin alone" in rows[1]["reason"] and "it follows era" in rows[2]["reason"]
    assert "translation" in rows[5]["reason"] and "left against the hard controls" in rows[6]["reason"]
    for word in ("matched pairs", "hard controls", "within translation", "held-out authors (4 against 7)"):
        assert word in rows[0]["reason"], word
    assert "may be missed" in rows[10]["reason"]


def test_null_corpora_and_planted_effects_in_small() -> None:
    """The full numbers are in the slow tests below; here a rule that is lost or wild would show."""
    false = sum("supported" in verdicts(null_corpus(ROWS, s, 40), seed=s) for s in range(6))
    assert false <= 2
    hits = 0
    for seed in range(6):
        x = null_corpus(ROWS, 50 + seed, 40)
        x[:, 9] += 2.5 * SD * characters(ROWS)
        hits += verdicts(x, seed=seed)[9] == "supported"
    assert hits >= 4


@pytest.mark.slow
@pytest.mark.parametrize("made_up", [False, True])
def test_of_200_null_corpora_at_most_16_contain_a_supported_latent(made_up: bool) -> None:
    false = 0
    for seed in range(200):
        rows = made_up_table(seed) if made_up else ROWS
        false += "supported" in verdicts(null_corpus(rows, seed, 100), rows, seed=seed)
    assert false <= 16


@pytest.mark.slow
@pytest.mark.parametrize("made_up", [False, True])
def test_an_effect_of_two_and_a_half_deviations_is_supported_in_40_of_50(made_up: bool) -> None:
    hits = 0
    for seed in range(50):
        rows = made_up_table(seed) if made_up else ROWS
        x = null_corpus(rows, 1000 + seed, 100)
        x[:, 7] += 2.5 * between_authors(rows) * characters(rows)
        hits += verdicts(x, rows, seed=seed)[7] == "supported"
    assert hits >= 40


def test_the_same_seed_gives_the_same_rows() -> None:
    x = planted(1)
    assert judge(x, ROWS, seed=5) == judge(x, list(ROWS), seed=5)


def test_a_difference_that_is_gone_between_a_control_and_its_matched_works_is_unstable() -> None:
    rows = [{**row, "hard": False} for row in ROWS]
    x = null_corpus(rows, 2)
    x[:, 0] += 4 * SD * characters(rows)
    cells = gather(x, rows)
    assert len(cells.matched) >= 10 and weigh(cells).rows[0]["verdict"] == "supported"
    # the same corpus, but every control names the works that it resembles: a single character without the trait
    quiet = [{**row, "matches": "emerson" if row["role"] == "control" else ""} for row in rows]
    x[:, 0] -= 4 * SD * column(rows, "character", "emerson")
    found = judge(x, quiet)[0]
    assert found["verdict"] == "unstable" and "matched pairs" in found["reason"]


def test_a_difference_that_kept_apart_works_of_the_same_authors_lack_is_unstable() -> None:
    rows = [{**row, "matches": [], "hard": False} for row in ROWS]
    x = null_corpus(rows, 4)
    apart = column(rows, "split", "heldout-work")
    x[:, 0] += 7 * SD * characters(rows) * (1 - 1.2 * apart)
    found = judge(x, rows)[0]
    assert found["verdict"] in ("unstable", "not-separable-author"), found
    x = null_corpus(rows, 4)
    x[:, 0] += 3 * SD * characters(rows)
    assert weigh(gather(x, rows)).rows[0]["works_auroc"] > 0.8


@pytest.mark.parametrize(
    ("causal", "verdict"),
    [
        ({"effect": 1.0, "placebo": 0.4, "p_value": 0.008, "dose": 1.0}, "supported"),
        ({"effect": 0.3, "placebo": 0.4, "p_value": 0.008, "dose": 1.0}, "no-causal-effect"),
        ({"effect": -1.0, "placebo": 0.4, "p_value": 0.008, "dose": 1.0}, "no-causal-effect"),
        ({"effect": 1.0, "placebo": 0.4, "p_value": 0.2, "dose": 1.0}, "no-causal-effect"),
        ({"effect": 1.0, "placebo": 0.4, "p_value": 0.008, "dose": 0.5}, "no-causal-effect"),
        ({"effect": float("nan"), "placebo": 0.4}, "no-causal-effect"),
        ({"effect": 1.0, "placebo": 0.4, "p_value": 0.01, "p_max_t": 0.09}, "no-causal-effect"),
        ({"effect": 1.0}, "supported"),
        ({"effect": 0.1, "placebo_low": -0.2, "placebo_high": 0.2}, "no-causal-effect"),
    ],
)
def test_an_intervention_must_move_the_concept_as_role_predicts(causal: dict, verdict: str) -> None:
    x = planted(0, 8)
    assert verdicts(x, causal={0: causal})[0] == verdict
    assert verdicts(x, causal={3: causal})[3] == "not-separable-genre", "an intervention supports nothing by itself"
    mirrored = {**causal, "effect": -causal["effect"]}
    if "placebo_low" not in causal:
        assert verdicts(-x, causal={0: mirrored})[0] == verdict, "a latent that is lower must push the other way"


def test_tables_without_the_optional_columns_and_with_one_author_a_side_are_judged() -> None:
    bare = [{k: row[k] for k in ("author", "work", "role")} for row in ROWS]
    found = judge(planted(), bare)
    assert found[0]["verdict"] == "supported" and "not adjusted for era, genre, topic" in found[0]["reason"]
    pair = [i for i, r in enumerate(ROWS) if r["author"] in ("Charles Darwin", "J. G. Wood")]
    assert set(verdicts(planted()[pair], [ROWS[i] for i in pair])) == {"underpowered"}
    assert judge(np.zeros((0, 2)), [])[0]["verdict"] == "underpowered"
    assert judge(np.zeros((len(ROWS), 0)), ROWS) == []


def test_passage_level_tests_fail_where_the_judge_does_not() -> None:
    from scipy import stats

    role = characters(ROWS) > 0
    x = null_corpus(ROWS, 8, 60)
    passages = stats.ttest_ind(x[role], x[~role]).pvalue
    assert np.mean(passages < 0.05) > 0.3
    assert verdicts(x).count("supported") == 0


@pytest.mark.parametrize("kind", ["columns", "arrays", "pyarrow", "pandas-like"])
def test_a_table_of_any_make_is_judged_as_its_rows_are(kind: str) -> None:
    names = ("author", "work", "role", "era", "split", "matches", "hard")
    rows = [{name: row[name] for name in names} for row in ROWS]
    columns: dict = {name: [row[name] for row in rows] for name in names}
    columns["genre"] = [float("nan")] * len(rows)  # how a table may say that nothing is known
    if kind == "arrays":
        columns = {k: np.array([*v, None], dtype=object)[:-1] for k, v in columns.items()}
    elif kind == "pyarrow":
        columns = pa.table(columns)
    elif kind == "pandas-like":
        columns = Frame(columns)
    x = planted()[:, :4]
    assert judge(x, columns) == judge(x, rows)


class Frame:
    """What pandas and polars tables have in common."""

    def __init__(self, columns: dict) -> None:
        self._columns, self.columns = columns, list(columns)

    def __len__(self) -> int:
        return len(self._columns["author"])

    def __getitem__(self, name: str) -> np.ndarray:
        return np.array([*self._columns[name], None], dtype=object)[:-1]


@pytest.mark.parametrize(
    ("documents", "causal"),
    [
        ({"author": ["a", "b"], "role": ["control"]}, None),
        (["author", "role"], None),
        ([{"author": "a", "role": "control"}] * 2, {0: {"p_value": 0.1}}),
        ([{"author": "a", "role": "control"}] * 2, {0: 1.0}),
    ],
)
def test_tables_that_make_no_sense_are_refused_with_a_reason(documents: object, causal: dict | None) -> None:
    with pytest.raises(UsageError) as caught:
        judge(np.zeros((2, 1)), documents, causal=causal)
    assert caught.value.why


def test_topics_that_change_with_the_window_cost_no_more_than_works() -> None:
    cells = gather(null_corpus(ROWS, 1, 5), [{**row, "topic": str(i % 5)} for i, row in enumerate(ROWS)])
    y = cells.means - cells.means.mean(axis=0)
    x = np.stack([np.ones(len(y)), cells.role], axis=1)
    same = [(g[:, None] == g[None, :]).astype(float) for g in (cells.author, cells.factors["topic"])]
    inverse = np.linalg.inv(np.eye(len(y)) + 0.3 * same[0] + 3.0 * same[1])
    log_size, information, xy, yy = _Grouped(y, x, cells.author, cells.factors["topic"]).at(0.3, 3.0)
    assert np.isclose(log_size, -np.linalg.slogdet(inverse)[1])
    assert np.allclose(information, x.T @ inverse @ x) and np.allclose(xy, x.T @ inverse @ y)
    assert np.allclose(yy, (y * (inverse @ y)).sum(axis=0))
