"""Baselines that find what is planted for them, and the gate that decides what may be said."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
from judge_tables import between_authors, characters, null_corpus, real_table

from greatctl.features import baselines as rivals
from greatctl.features import probes
from greatctl.features.baselines import BASELINES, Material, baselines, beats, margin
from greatctl.features.concepts import concepts_named
from greatctl.features.gate import CHECKS, Candidate, check, claim, settle
from greatctl.features.hypotheses import Known, _parts, assemble, weigh_concept
from greatctl.features.probes import column, strongest, training
from greatctl.features.style import character_ngrams, function_words
from greatctl.features.units import gather

ROWS = list(real_table(1))  # one row a work
SD = between_authors(real_table(6))
ROLE = characters(ROWS)
rng = np.random.default_rng(0)


def latents(effect: float = 3.0, n: int = 40) -> np.ndarray:
    """Means of works; latent 0 follows role."""
    x = null_corpus(real_table(6), 0, n)
    x[:, 0] += effect * SD * characters(real_table(6))
    return x.reshape(len(ROWS), 6, n).mean(axis=1)


@functools.cache
def texts(*, differ: bool) -> list[str]:
    draw = np.random.default_rng(1)
    plain = ["the ship of a man and his house", "it was for us to do", "with them by the sea", "no one should say so"]
    great = ["whilst one hath thus upon himself", "nor am i myself in this", "yet again i must such honour have"]
    return [" ".join(draw.choice(plain + great * (4 if differ and role else 0), 200)) for role in ROLE]


def material(**more) -> Material:
    draw = np.random.default_rng(2)
    raw = draw.normal(size=(len(ROWS), 24)) + 2.0 * ROLE[:, None] * (np.arange(24) < 3)
    return Material(**{"residual": raw, "texts": texts(differ=True), **more})  # type: ignore[arg-type]


def measured(**more) -> dict[str, rivals.Baseline]:
    cells = gather(latents(), ROWS)
    return {one.name: one for one in baselines(cells, ROWS, material(**more), n_candidates=10)}


def test_every_baseline_finds_what_is_there_for_it_and_meaningless_labels_find_nothing() -> None:
    found = measured(controls={rivals.FROZEN: [latents(3.0)], rivals.SEEDS: [latents(0.0), latents(3.0)]})
    assert list(found) == list(BASELINES)
    bars = {name: one.bar[0] for name, one in found.items() if one.bar}
    for name in (rivals.MEANS, rivals.PROBE, rivals.NEURONS, rivals.PARTS, rivals.NGRAMS, rivals.WORDS):
        assert bars[name] > 0.9, name
    assert bars[rivals.ARBITRARY] < 0.9
    frozen = found[rivals.FROZEN].score
    assert frozen is not None and frozen.what == "latent 0" and frozen.auroc > 0.9
    assert bars[rivals.SEEDS] >= bars[rivals.FROZEN] - 1e-9, "of several companions the strongest counts"
    assert rivals.UNTRAINED not in bars and "train --controls" in found[rivals.UNTRAINED].why


def test_baselines_without_a_difference_stay_near_chance_and_missing_material_is_said() -> None:
    draw = np.random.default_rng(3)
    found = measured(residual=draw.normal(size=(len(ROWS), 24)), texts=texts(differ=False))
    for name in (rivals.MEANS, rivals.PROBE, rivals.NGRAMS, rivals.WORDS):
        bar = found[name].bar
        assert bar is not None and bar[0] < 0.9, name
    bare = measured(residual=None, texts=None)
    assert "not summed" in bare[rivals.PROBE].why and "not read" in bare[rivals.NGRAMS].why


def test_fitting_and_choosing_never_look_at_held_out_authors_or_works() -> None:
    cells = gather(latents(), ROWS)
    spoiled = latents()
    apart = np.array([row["split"] != "train" for row in ROWS])
    spoiled[apart] = 99.0 * rng.normal(size=(int(apart.sum()), spoiled.shape[1]))
    other = gather(spoiled, ROWS)
    assert strongest(*training(cells), 5) == strongest(*training(other), 5)
    for fit in (rivals.probes.logistic, rivals.probes.difference_of_means):
        assert np.allclose(fit(cells).authors[~cells.heldout & ~_partly_apart(cells)],
                           fit(other).authors[~cells.heldout & ~_partly_apart(cells)])  # fmt: skip


def _partly_apart(cells) -> np.ndarray:
    return np.bincount(cells.work_author, cells.work_heldout, len(cells.authors)) > 0


def test_without_held_out_authors_every_baseline_is_missing_and_says_why() -> None:
    rows = [{**row, "split": "train"} for row in ROWS]
    cells = gather(latents(), rows)
    assert not probes.testable(cells)
    assert all(one.bar is None and "held out" in one.why for one in baselines(cells, rows, material(), n_candidates=5))


def test_a_margin_is_the_difference_of_aurocs_inside_its_interval() -> None:
    cells = gather(latents(), ROWS)
    score = column(cells, 0, "latent")
    found = measured()
    for name in (rivals.NEURONS, rivals.SHUFFLED):
        value, low, high = margin(cells, score, found[name])
        assert value == pytest.approx(score.auroc - found[name].bar[0]) and low <= value <= high  # type: ignore[index]
        assert beats(score, found[name]) == (value > 0)


def test_style_is_counted_without_case_and_line_breaks() -> None:
    a, b = character_ngrams(["The  man\nand HIS dog", "the man and his dog"])
    assert np.array_equal(a, b) and (a**2).sum() == pytest.approx(3.0)
    words = function_words(["the man and the dog", "zebra"])
    assert words[0].sum() == pytest.approx(3 / 5) and words[1].sum() == 0
    assert character_ngrams([]).shape[0] == 0 and not character_ngrams([""]).any()


# --- the gate -----------------------------------------------------------------------------------------------------


def evidence(effect: float = 3.0, known: Known | None = None, **more):
    (concept,) = concepts_named(["greatness"])
    x = latents(effect)
    documents = [{**row, "source_id": row["work"]} for row in ROWS]
    weighed = weigh_concept(concept, x, documents, "author", list(range(x.shape[1])), n_candidates=8)
    part = material(**{"texts": texts(differ=False), "residual": rng.normal(size=(len(ROWS), 24)), **more})
    part = replace(part, residual=part.residual[weighed.places])  # type: ignore[index]
    return assemble(weighed, baselines(weighed.cells, weighed.rows, part, n_candidates=8), known or Known())


COMPLEMENT = {"complement": 0.3, "complement_placebo": 0.1, "complement_p": 0.04, "complement_gap": 2.0, "n_pairs": 8.0}
MOVES = {"effect": 1.0, "placebo": 0.2, "p_value": 0.01, "dose": 1.0, "damage_kl": 0.1, **COMPLEMENT}
FULL = Known(
    cosines={0: [0.8, 0.9]},
    on_words={0: 0.1},
    token_share={0: 0.2},
    position_share={0: 0.0},
    whole_range=True,
    causal={0: MOVES},
)


def test_a_true_difference_beyond_its_baselines_keeps_its_support_and_its_checks() -> None:
    null = [latents(0.0)]
    found = evidence(known=FULL, controls={rivals.FROZEN: null, rivals.UNTRAINED: null, rivals.SEEDS: [latents()]})
    row = next(r for r in found.rows if r["latent"] == 0)
    assert found.rows[0] is row and row["verdict"] == "supported", row["reason"]
    states = {c.name: c.state for c in found.checks[0]}
    passed = ("specificity", "random baselines", "label nulls", "seed stability", "author-level test", "confounds")
    assert all(states[name] == "passed" for name in (*passed, "held out by author and work", "causal"))
    assert states["sensitivity"] == states["set sufficiency"] == states["label quality"] == "missing"
    assert row["claim"] == "fires more in, changes", "what was never tried is never claimed"


def test_style_that_does_as_well_takes_the_support_away_and_is_named() -> None:
    row = evidence(texts=texts(differ=True)).rows
    first = next(r for r in row if r["latent"] == 0)
    assert first["verdict"] == "not-supported" and "character n-grams" in first["reason"]
    assert first["heldout_auroc"] > 0.8, "its number stays"


def test_a_frozen_decoder_that_does_as_well_takes_the_support_away() -> None:
    strong = latents(3.0)
    strong[:, :8] = 5 * ROLE[:, None] + 0.01 * rng.normal(size=(len(ROWS), 8))
    first = next(r for r in evidence(controls={rivals.FROZEN: [strong]}).rows if r["latent"] == 0)
    assert first["verdict"] == "not-supported" and "frozen decoder" in first["reason"]


def test_a_latent_of_names_and_words_is_a_topic_and_a_still_one_has_no_causal_effect() -> None:
    words = evidence(known=replace(FULL, on_words={0: 0.8}))
    row = next(r for r in words.rows if r["latent"] == 0)
    assert row["verdict"] == "not-separable-topic" and "80%" in row["reason"]
    still = evidence(known=replace(FULL, causal={0: {**MOVES, "effect": 0.1}}))
    row = next(r for r in still.rows if r["latent"] == 0)
    assert row["verdict"] == "no-causal-effect" and row["causal_effect"] == 0.1
    assert next(c for c in still.checks[0] if c.name == "causal").state == "failed"


@pytest.mark.parametrize(
    ("changed", "state", "said"),
    [
        ({}, "passed", "30.0% of the difference of 8 pairs is left (p 0.04, random directions up to 10.0%)"),
        ({"complement": 0.1}, "failed", "10.0% of the difference"),
        ({"complement": -0.3}, "failed", "-30.0% of the difference"),
        ({"complement_p": 0.2}, "failed", "p 0.2"),
        ({"complement_placebo": float("nan")}, "passed", "(p 0.04)"),
        ({"complement": float("nan"), "complement_gap": -0.5}, "missing", "does not tell the pairs' prompts apart"),
        ({"complement": float("nan")}, "missing", "was not patched"),
        ({"effect": 0.1}, "failed", "30.0% of the difference"),
        ({"effect": 0.1, "complement_gap": 0.0}, "failed", "does not tell"),
    ],
)
def test_a_push_counts_where_the_latent_also_carries_some_of_the_models_own_difference(
    changed: dict, state: str, said: str
) -> None:
    row = {"verdict": "supported", "reason": "x", "effect": 1.0, "q_value": 0.01}
    found = check(Candidate(row=row, causal={**MOVES, **changed}))[10]
    assert found.state == state and said in found.reason, found
    assert found.value == {**MOVES, **changed}["effect"]


def test_sensitivity_names_kept_apart_works_beside_held_out_authors_and_what_was_not_tried() -> None:
    found = evidence(known=FULL)
    apart = found.weighed.cells.work_heldout
    assert apart.any()
    row = next(c for c in found.checks[0] if c.name == "sensitivity")
    assert "of the held-out characters and" in row.reason and "works that were kept apart are found" in row.reason
    assert row.state == "missing" and "no text was written" in row.reason and row.value == found.rows[0]["recall"]


def test_stretches_bring_authors_to_equal_amounts_of_text() -> None:
    (concept,) = concepts_named(["greatness"])
    x = latents(0.0, 6)
    tokens = np.full((len(ROWS), 4), 100)
    tokens[ROLE > 0, 1:] = 0  # characters are short
    totals = 100.0 * np.repeat(x[:, None], 4, axis=1).astype(np.float32)
    parts = _parts(tokens, totals, [3, 5, 8], [0, 2, 5])
    assert parts.values.shape == (int((tokens[[3, 5, 8]] > 0).sum()), 3)
    assert np.allclose(parts.values, x[[3, 5, 8]][parts.of][:, [0, 2, 5]], atol=1e-5) and set(parts.amount) == {100.0}
    x[:, 0] += 1.2 * SD * ROLE
    documents = [{**row, "source_id": row["work"]} for row in ROWS]
    rows = [
        weigh_concept(concept, x, documents, "author", range(6), n_candidates=2, stretches=of).judgement.rows
        for of in (None, (tokens, 100.0 * np.repeat(x[:, None], 4, axis=1)))
    ]
    assert all(
        one["effect"] == other["effect"] and one["verdict"] == other["verdict"]
        for one, other in zip(*rows, strict=True)
    ), "stretches that are all alike take nothing away"


def test_wording_follows_the_checks() -> None:
    bare = Candidate(row={"verdict": "not-supported", "reason": "x", "effect": -1.0, "q_value": 0.5})
    checks = check(bare)
    assert [c.name for c in checks] == list(CHECKS) and claim(checks, -1.0) == "nothing yet"
    assert {c.state for c in checks} == {"missing", "failed"} and settle(bare) == ("not-supported", "x")
    by_number = {n: replace(c, state="passed") for n, c in enumerate(checks, 1)}

    def said(*numbers: int) -> str:
        return claim([by_number[n] if n in numbers else checks[n - 1] for n in range(1, 15)], -1.0)

    assert said(8, 9) == "fires less in" and said(8) == "nothing yet"
    assert said(*range(1, 7)) == "predicts" and said(8, 9, 11) == "fires less in, changes"
    assert said(*range(1, 15)) == "is about"
