"""The statistics hold their error rates on data without an effect, and find planted effects."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import ttest_ind

from greatctl import stats
from greatctl.features.adjust import icc
from greatctl.patching.tables import cell_table, effect_table


def test_bootstrap_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    table = rng.normal(1.0, 2.0, size=(40, 300))
    found = stats.bootstrap_interval(table, draws=500)
    covered = ((found.low < 1.0) & (found.high > 1.0)).mean()
    assert 0.88 < covered < 0.98
    assert np.allclose(found.mean, table.mean(axis=0))


def test_bootstrap_of_clusters_is_wider_than_of_their_members():
    rng = np.random.default_rng(1)
    clusters = np.repeat(np.arange(8), 10)
    values = rng.normal(size=8)[clusters] + 0.1 * rng.normal(size=80)
    alone = stats.bootstrap_interval(values)
    whole = stats.bootstrap_interval(values, clusters=clusters)
    assert (whole.high - whole.low)[0] > 2 * (alone.high - alone.low)[0]


def test_bootstrap_ratio_is_a_ratio_of_means_and_survives_one_tiny_denominator():
    found = stats.bootstrap_interval([1.0, 2.0, 0.5], over=[2.0, 4.0, 1e-9])
    assert found.mean[0] == pytest.approx(3.5 / 6.000000001)
    assert found.high[0] > found.mean[0] > found.low[0]


def test_bootstrap_of_one_unit_claims_no_interval():
    found = stats.bootstrap_interval([3.0])
    assert found.mean[0] == 3.0 and np.isnan(found.low[0]) and np.isnan(found.high[0])


def test_sign_flip_enumerates_small_samples_exactly():
    found = stats.sign_flip_max_t(np.array([[1.0, 1.0], [1.0, -1.0], [1.0, 2.0], [1.0, 0.5]]))
    assert found.floor == 2 / 2**4
    assert found.p[0] == found.floor
    sums = [abs(a * 1 + b * -1 + c * 2 + d * 0.5) for a in (1, -1) for b in (1, -1) for c in (1, -1) for d in (1, -1)]
    assert found.p[1] == pytest.approx(np.mean(np.array(sums) >= 2.5 - 1e-9))
    assert (found.p_max_t >= found.p).all()


def test_sign_flip_t_is_the_one_sample_t():
    from scipy.stats import ttest_1samp

    x = np.random.default_rng(2).normal(0.3, 1, size=(20, 5))
    assert np.allclose(stats.sign_flip_max_t(x, draws=50).t, ttest_1samp(x, 0).statistic)


def test_sign_flip_keeps_the_family_wise_error_on_null_sweeps_and_finds_a_planted_effect():
    rejected, found = 0, 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        shared = rng.normal(size=(16, 1))  # cells of one pair depend on each other
        effects = 0.7 * shared + rng.normal(size=(16, 60))
        effects *= rng.choice([-1.0, 1.0], size=(16, 1))
        rejected += stats.sign_flip_max_t(effects, draws=300, seed=seed).p_max_t.min() <= 0.05
        effects[:, 7] += 2.0
        found += stats.sign_flip_max_t(effects, draws=300, seed=seed).p_max_t[7] <= 0.05
    assert rejected <= 11  # 5 expected; 12 or more has probability .004
    assert found >= 90


def test_cells_without_any_effect_have_p_one():
    effects = np.zeros((20, 3))
    effects[:, 1] = np.random.default_rng(3).normal(2, 1, 20)
    found = stats.sign_flip_max_t(effects, draws=500)
    assert found.p_max_t[0] == found.p[2] == 1.0 and found.t[0] == 0.0
    assert found.p_max_t[1] == found.floor == 1 / 501


def test_label_permutation_null_rate_and_power():
    alone, family, planted = 0.0, 0, 0
    for seed in range(100):
        rng = np.random.default_rng(1000 + seed)
        values, labels = rng.normal(size=(24, 40)), np.arange(24) < 11
        found = stats.label_permutation(values, labels, draws=300, seed=seed)
        alone += (found.p <= 0.05).mean()
        family += found.p_max_t.min() <= 0.05
        values[labels, 3] += 2.5
        planted += stats.label_permutation(values, labels, draws=300, seed=seed).p_max_t[3] <= 0.05
    assert 0.03 < alone / 100 < 0.07
    assert family <= 11
    assert planted >= 90


def test_label_permutation_is_exact_when_few_arrangements_exist():
    found = stats.label_permutation([0.0, 0.1, 0.2, 5.0, 5.1, 5.2], [0, 0, 0, 1, 1, 1])
    assert found.exact and found.p[0] == found.floor == 2 / 20
    assert found.difference[0] == pytest.approx(5.0) and found.effect[0] == pytest.approx(50.0)
    uneven = stats.label_permutation([0.0, 0.1, 0.2, 0.3, 9.0], [0, 0, 0, 0, 1])
    assert uneven.p[0] == uneven.floor == 1 / 5


def test_label_permutation_of_a_constant_latent_says_nothing_and_no_spread_stays_finite():
    values = np.column_stack([np.full(8, 0.3), np.repeat([0.0, 1.0], 4)])
    found = stats.label_permutation(values, np.arange(8) >= 4)
    assert found.p[0] == 1.0 and found.effect[0] == 0.0
    assert found.effect[1] == stats.LARGEST_EFFECT


def test_the_studentised_statistic_keeps_its_level_where_the_smaller_group_spreads_more():
    plain = own = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        values = np.concatenate([rng.normal(scale=4, size=(6, 1)), rng.normal(size=(24, 1))])
        labels = np.arange(30) < 6
        plain += stats.label_permutation(values, labels, draws=199, seed=seed).p[0] <= 0.05
        own += stats.label_permutation(values, labels, draws=199, seed=seed, statistic="studentised").p[0] <= 0.05
    assert plain >= 15 and own <= 8


def test_the_studentised_statistic_orders_arrangements_as_welchs_t_does():
    rng = np.random.default_rng(0)
    values, labels = rng.normal(size=7), np.arange(7) < 3
    found = stats.label_permutation(values, labels, statistic="studentised")
    every = [np.isin(np.arange(7), chosen) for chosen in combinations(range(7), 3)]
    t = [abs(ttest_ind(values[mask], values[~mask], equal_var=False).statistic) for mask in every]
    assert found.exact and found.p[0] == np.mean(np.array(t) >= t[0] * (1 - 1e-9))


def test_one_empty_group_is_an_error():
    with pytest.raises(ValueError, match="both groups"):
        stats.label_permutation([1.0, 2.0], [False, False])
    with pytest.raises(ValueError, match="both groups"):
        stats.auroc([1.0, 2.0], [True, True])


def test_benjamini_hochberg_known_values_and_missing_ones():
    q = stats.benjamini_hochberg([0.01, 0.04, np.nan, 0.03, 0.005])
    assert np.allclose(q[[0, 1, 3, 4]], [0.02, 0.04, 0.04, 0.02]) and np.isnan(q[2])


def test_auroc_counts_pairs_with_ties_as_half():
    assert stats.auroc([1, 2, 3, 4], [0, 0, 1, 1])[0] == 1.0
    assert stats.auroc([1, 1, 1, 1], [0, 0, 1, 1])[0] == 0.5
    assert stats.auroc(np.array([[3.0, 1], [1, 2], [2, 3]]), [1, 0, 0]).tolist() == [1.0, 0.0]


def test_icc_recovers_the_share_of_variance_between_clusters():
    rng = np.random.default_rng(4)
    clusters = np.repeat(np.arange(400), rng.integers(3, 8, 400))
    values = np.sqrt(0.3) * rng.normal(size=400)[clusters] + np.sqrt(0.7) * rng.normal(size=len(clusters))
    assert icc(values[:, None], clusters)[0] == pytest.approx(0.3, abs=0.05)
    assert icc(rng.normal(size=(len(clusters), 1)), clusters)[0] < 0.06
    assert np.isnan(icc(np.array([[1.0], [2.0]]), np.array(["a", "b"]))[0])


def test_smallest_detectable_effect_matches_simulated_power():
    effect = stats.smallest_detectable_effect(15, 18)
    assert effect == pytest.approx(1.0, abs=0.05)
    from scipy.stats import ttest_ind

    rng = np.random.default_rng(5)
    power = (ttest_ind(rng.normal(effect, 1, (15, 2000)), rng.normal(0, 1, (18, 2000))).pvalue < 0.05).mean()
    assert power == pytest.approx(0.8, abs=0.04)
    assert stats.smallest_detectable_effect(1) == float("inf")
    assert stats.smallest_detectable_effect(24) < stats.smallest_detectable_effect(10)


# --- whole sweeps

LAYERS, PLACES, PAIRS = 3, 6, 32


def sweep(seed: int, *, swapped: bool, planted: float = 0.0) -> float:
    """The family-wise p-value of cell (1, 4) of a simulated sweep, or the smallest where pairs are swapped.

    Each pair's cells share a part, as cells of one prompt do, and layer 2 carries a large true effect unless
    clean and corrupted are swapped at random, pair by pair; then nothing is true.
    """
    rng = np.random.default_rng(seed)
    effect = 0.7 * rng.normal(size=(PAIRS, 1, 1)) + 0.7 * rng.normal(size=(PAIRS, LAYERS, PLACES))
    effect[:, 2] += 3.0 if swapped else 0.0
    effect[:, 1, 4] = rng.normal(planted, 1.0, PAIRS)
    clean, corrupted = rng.normal(4, 1, PAIRS), rng.normal(-4, 1, PAIRS)
    swap = rng.random(PAIRS) < (0.5 if swapped else 0.0)
    patched = np.where(swap[:, None, None], clean[:, None, None] - effect, corrupted[:, None, None] + effect)
    clean, corrupted = np.where(swap, corrupted, clean), np.where(swap, clean, corrupted)
    ids, tokens = [f"p{i}" for i in range(PAIRS)], [["a"] * PLACES] * PAIRS
    parts = [
        effect_table(
            ids, tokens, "resid_pre", layer, "denoising", {"logit-diff": (clean, corrupted, patched[:, layer])}
        )
        for layer in range(LAYERS)
    ]
    p = cell_table(pa.concat_tables(parts), draws=50, seed=seed)["p_max_t"].to_numpy()
    return float(p.min() if swapped else p[PLACES + 4])


def test_swapping_clean_and_corrupted_at_random_rejects_no_more_sweeps_than_it_says():
    rejected = sum(sweep(seed, swapped=True) <= 0.05 for seed in range(200))
    assert rejected <= 16  # 10 expected; 17 or more has probability .03


def test_an_effect_of_one_standard_deviation_over_32_pairs_is_found():
    assert sum(sweep(seed, swapped=False, planted=1.0) <= 0.05 for seed in range(50)) >= 40


def test_false_discovery_control_over_latents_keeps_its_rate_and_finds_the_planted_ones():
    false, found = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        effects = rng.normal(size=(24, 200))
        effects[:, :20] += 1.2
        q = stats.sign_flip_max_t(effects, draws=stats.draws_for(200), seed=seed).q
        hits = q <= 0.1
        false.append(hits[20:].sum() / max(hits.sum(), 1))
        found.append(hits[:20].mean())
    assert np.mean(false) < 0.13 and np.mean(found) > 0.9


def test_flipping_clusters_together_is_honest_where_flipping_pairs_is_not():
    """Eight templates of four alike pairs: each template has an effect of its own, and their mean is 0."""
    clusters = np.repeat(np.arange(8), 4)
    alone, together = 0, 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        effects = rng.normal(size=8)[clusters, None] + 0.1 * rng.normal(size=(32, 10))
        alone += stats.sign_flip_max_t(effects, draws=300, seed=seed).p_max_t.min() <= 0.05
        found = stats.sign_flip_max_t(effects, draws=300, seed=seed, clusters=clusters)
        together += found.p_max_t.min() <= 0.05
        assert found.n_units == 8 and found.floor == 2 / 2**8
    assert together <= 11 < 30 < alone


def test_power_is_that_of_simulated_t_tests_and_agrees_with_the_smallest_detectable_effect():
    from scipy.stats import ttest_1samp

    rng = np.random.default_rng(6)
    for n, effect, alpha in ((12, 0.9, 0.05), (32, 1.0, 0.05 / 768)):
        simulated = (ttest_1samp(rng.normal(effect, 1, (n, 4000)), 0).pvalue < alpha).mean()
        assert stats.detection_power(effect, n, alpha) == pytest.approx(simulated, abs=0.03)
    least = stats.smallest_detectable_effect(24, alpha=0.01)
    assert stats.detection_power(least, 24, 0.01) == pytest.approx(0.8, abs=0.02)
    assert stats.detection_power(5.0, 1) == 0.0
    assert stats.detection_power(0.0, 20, 0.05) == pytest.approx(0.05)


def test_a_floor_above_the_level_is_said_in_words():
    few = stats.sign_flip_max_t(np.ones((4, 3)))
    assert few.p_max_t.min() == few.floor == 0.125
    assert "no p-value can be below 0.12" in stats.out_of_reach(few.floor)
    assert stats.out_of_reach(2 / 2**6) == ""
    assert "768 looks" in stats.out_of_reach(1 / 5001, looks=768)
    assert stats.out_of_reach(1 / (stats.draws_for(768) + 1), looks=768) == ""


def test_missing_denominators_leave_an_interval_of_what_is_known():
    found = stats.bootstrap_interval([1.0, 2.0, 3.0], over=[0.0, 0.0, 1.0])
    assert found.mean[0] == 6.0 and np.isfinite(found.low[0]) and found.low[0] <= found.high[0]
