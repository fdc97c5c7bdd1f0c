"""thinkmid.eval.stats: estimators against enumeration, intervals against simulation."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinkmid.eval import stats

NAN = math.nan
scores_of_one = st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=7)


@settings(deadline=None)
@given(scores_of_one, st.data())
def test_pass_at_k_is_the_share_of_all_choices_of_k_samples_that_hold_a_right_one(scores, data):
    k = data.draw(st.integers(1, len(scores)))
    chosen = [max(some) for some in itertools.combinations(scores, k)]
    assert stats.pass_at(np.array([scores]), k)[0] == pytest.approx(sum(chosen) / len(chosen), abs=1e-12)


def test_pass_at_k_is_unbiased_where_the_plug_in_estimate_is_not():
    rng, p, n, k = np.random.default_rng(0), 0.2, 6, 4
    scores = (rng.random((40_000, n)) < p).astype(float)
    truth = 1 - (1 - p) ** k
    assert stats.pass_at(scores, k).mean() == pytest.approx(truth, abs=0.006)  # 4 standard errors
    assert np.mean(1 - (1 - scores.mean(1)) ** k) < truth - 0.03


def test_missing_verdicts_are_left_out_of_means_and_of_pass_at_k():
    scores = np.array([[1, NAN, 0, 1], [NAN, NAN, NAN, NAN], [0, 0, 0, NAN]])
    np.testing.assert_allclose(stats.mean_at(scores), [2 / 3, NAN, 0])
    np.testing.assert_allclose(stats.pass_at(scores, 2), [1 - 0 / 3, NAN, 0])
    np.testing.assert_allclose(stats.pass_at(scores, 4), [NAN, NAN, NAN])
    estimate = stats.proportion(stats.mean_at(scores))
    assert (estimate.mean, estimate.num_questions) == (pytest.approx(1 / 3), 2)


@pytest.mark.parametrize("k", [0, 5])
def test_k_beyond_the_samples_is_refused(k):
    with pytest.raises(ValueError, match=f"within 1 and the 4 samples of a question, not {k}"):
        stats.pass_at(np.zeros((2, 4)), k)
    with pytest.raises(ValueError, match="scores of 0 and 1"):
        stats.pass_at(np.full((2, 4), 0.5), 2)


# --- majority


def voted(answers, gold, k):
    """Expected score of the winner, ties broken by lot: by hand, over every run of k."""
    found = []
    for at in range(0, len(answers) - k + 1, k):
        votes = Counter(a for a in answers[at : at + k] if a is not None).most_common()
        winners = [a for a, count in votes if count == votes[0][1]]
        found.append(sum(a == gold for a in winners) / len(winners) if winners else 0)
    return sum(found) / len(found)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["1", "2", "3", None]), min_size=1, max_size=9), st.data())
def test_maj_at_k_is_the_score_of_the_most_frequent_answer(answers, data):
    k = data.draw(st.integers(1, len(answers)))
    scores = np.array([[float(a == "1") for a in answers]])
    assert stats.maj_at([answers], scores, k)[0] == pytest.approx(voted(answers, "1", k))


@settings(deadline=None)
@given(st.permutations(["1", "1", "2", "2", "3", None]))
def test_the_order_of_samples_decides_no_vote(answers):
    scores = np.array([[float(a == "2") for a in answers]])
    assert stats.maj_at([answers], scores, 6)[0] == 0.5


def test_unparsed_answers_have_no_vote_and_failed_verdicts_no_score():
    assert stats.majority([None, None, None, "7"], [0, 0, 0, 1]) == 1
    assert stats.majority(["7", "7", "8"], [NAN, 1, 0]) == 1
    assert math.isnan(stats.majority(["7", "7", "8"], [NAN, NAN, 0]))
    assert stats.majority([None, None], [0, 0]) == 0
    with pytest.raises(ValueError, match=r"answers must be \(1, 2\)"):
        stats.maj_at([["1"]], np.zeros((1, 2)), 1)


# --- intervals


def test_the_standard_error_is_that_of_the_cluster_robust_formula():
    """Of a regression of all samples on a constant, residuals summed within each question: CR1 of the textbooks."""
    scores = (np.random.default_rng(1).random((30, 8)) < np.linspace(0, 1, 30)[:, None]).astype(float)
    residuals = scores - scores.mean()
    robust = math.sqrt((residuals.sum(1) ** 2).sum() / scores.size**2 * 30 / 29)
    assert stats.proportion(stats.mean_at(scores)).se == pytest.approx(robust)
    assert robust > 1.5 * math.sqrt(scores.mean() * (1 - scores.mean()) / scores.size)  # what ignores the questions


def simulated(rng, mean, spread, questions, samples):
    """Scores of a model whose chance on a question is drawn from Beta(mean * spread, (1 - mean) * spread)."""
    chance = rng.beta(mean * spread, (1 - mean) * spread, questions)
    return (rng.random((questions, samples)) < chance[:, None]).astype(float)


@pytest.mark.parametrize(
    ("mean", "spread", "questions", "level", "least"),
    [
        (0.2, 0.5, 40, 0.95, 0.935),  # AMC23
        (0.5, 5.0, 40, 0.95, 0.935),
        (0.2, 0.5, 40, 0.8, 0.785),
        (0.1, 0.5, 200, 0.95, 0.935),
        (0.02, 0.5, 500, 0.95, 0.92),
        (0.97, 0.5, 500, 0.95, 0.93),
        (0.003, 0.3, 40, 0.95, 0.87),  # a base model on AMC23: mean +- t se covers in 21 of 100
    ],
)
def test_intervals_cover_the_truth_at_the_stated_rate(mean, spread, questions, level, least):
    rng, rounds, hits = np.random.default_rng(7), 3000, 0
    for _ in range(rounds):
        estimate = stats.proportion(stats.mean_at(simulated(rng, mean, spread, questions, 16)), level)
        assert 0 <= estimate.low <= estimate.mean <= estimate.high <= 1
        hits += estimate.low <= mean <= estimate.high
    assert least <= hits / rounds <= level + 0.025


def test_an_interval_that_takes_samples_for_questions_would_cover_far_less():
    """The claim behind clustering: the test above can fail."""
    rng, hits = np.random.default_rng(7), 0
    for _ in range(500):
        scores = simulated(rng, 0.2, 0.5, 40, 16)
        half = 1.96 * math.sqrt(scores.mean() * (1 - scores.mean()) / scores.size)
        hits += abs(scores.mean() - 0.2) <= half
    assert hits / 500 < 0.6


def test_the_bootstrap_agrees_with_the_formula_and_repeats_itself():
    scores = simulated(np.random.default_rng(3), 0.4, 1.0, 500, 16)
    means = stats.mean_at(scores)
    estimate, low_high = stats.proportion(means), stats.bootstrap(means, seed=5)
    np.testing.assert_allclose(low_high, [estimate.low, estimate.high], atol=0.1 * (estimate.high - estimate.low))
    assert low_high == stats.bootstrap(means, seed=5) != stats.bootstrap(means, seed=6)
    assert stats.bootstrap(np.array([1, NAN]), seed=0) == (1, 1)


def test_the_bootstrap_is_pinned_so_that_old_tables_come_out_again():
    low_high = stats.bootstrap(np.array([0, 0.25, 0.5, 1]), seed=0, rounds=50)
    assert low_high == pytest.approx((0.1390625, 0.6875))


def test_all_right_or_all_wrong_leaves_room():
    none, all_ = stats.proportion(np.zeros(40)), stats.proportion(np.ones(40))
    assert (none.low, all_.high) == (0, 1)
    assert 0.05 < none.high < 0.1 < 0.9 < all_.low < 0.95
    assert stats.proportion(np.full(40, 0.5)).high > 0.6  # no spread is no certainty


def test_few_questions_give_no_false_certainty():
    assert (stats.proportion(np.array([0.5])).low, stats.proportion(np.array([0.5])).high) == (0, 1)
    assert math.isnan(stats.proportion(np.array([NAN])).mean)
    assert stats.clustered(np.array([0.5])).high == math.inf


def test_another_sampling_of_the_same_questions_differs_by_the_rerun_error():
    rng = np.random.default_rng(2)
    chance = rng.beta(0.2, 0.8, 50)
    means, errors = [], []
    for _ in range(2000):
        scores = (rng.random((50, 8)) < chance[:, None]).astype(float)
        means.append(scores.mean())
        errors.append(stats.sampling_se(scores) ** 2)
    assert math.sqrt(np.mean(errors)) == pytest.approx(np.std(means), rel=0.06)
    assert math.isnan(stats.sampling_se(np.ones((3, 1))))
    assert stats.sampling_se(np.array([[1, 0, NAN], [NAN] * 3])) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("level", "freedom", "table"), [(0.95, 39, 2.02269), (0.95, 5, 2.57058), (0.99, 9, 3.24984), (0.9, 1e9, 1.64485)]
)
def test_quantiles_of_t_are_those_of_the_tables(level, freedom, table):
    assert stats.t_quantile(level, freedom) == pytest.approx(table, rel=2e-4)


# 90, 95 and 99 % by scipy 1.17.1, stats.t.ppf((1 + level) / 2, freedom)
EXACT = {
    1: (6.313751514675037, 12.706204736174694, 63.656741162871526),
    2: (2.9199855803537242, 4.302652729749462, 9.924843200918287),
    3: (2.3533634348018233, 3.1824463052837078, 5.840909309733355),
    4: (2.1318467863266495, 2.7764451051977934, 4.604094871349992),
    10: (1.8124611228116756, 2.228138851986274, 3.16927267261695),
    30: (1.697260886593957, 2.0422724563012378, 2.7499956535672254),
}


@pytest.mark.parametrize("freedom", EXACT)
def test_quantiles_of_t_are_exact_for_few_degrees_of_freedom(freedom):
    found = [stats.t_quantile(level, freedom) for level in (0.90, 0.95, 0.99)]
    assert found == pytest.approx(EXACT[freedom], rel=1e-12 if freedom < 30 else 2e-7)


def test_quantiles_of_t_fall_without_a_step_where_the_expansion_takes_over():
    found = [stats.t_quantile(0.95, freedom) for freedom in range(1, 60)]
    steps = np.diff(found)
    assert (steps < 0).all()
    assert (np.diff(steps) > 0).all()


# --- pairs


def test_pairing_sees_a_difference_that_two_intervals_hide():
    rng = np.random.default_rng(4)
    hard = rng.random(60)
    a, b = np.clip(hard + 0.05, 0, 1), hard + 0.02 * rng.standard_normal(60)
    found = stats.paired([(a, b)], seed=0)
    assert 0 < found.difference.low < 0.05 < found.difference.high < 0.1
    assert found.p < 0.001
    assert found.better > found.worse
    apart = [stats.proportion(x.clip(0, 1)) for x in (a, b)]
    assert apart[1].high > apart[0].low
    swapped = stats.paired([(b, a)], seed=0)
    assert (swapped.difference.mean, swapped.p) == (pytest.approx(-found.difference.mean), found.p)


@settings(deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=8))
def test_p_is_that_of_all_ways_to_swap_the_runs(differences):
    a = np.array(differences, float)
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
            for signs in itertools.product((1, -1), repeat=len(differences))]  # fmt: skip
    expected = sum(s >= abs(sum(differences)) for s in sums) / len(sums)
    assert stats.paired([(a, np.zeros(len(a)))], seed=0).p == pytest.approx(expected)
    drawn = stats.sign_flip_p(a, seed=1, rounds=2) if len(a[a != 0]) > 1 else 1
    assert drawn > 0  # a p of random rounds is never 0


def test_random_and_enumerated_swaps_agree():
    d = np.random.default_rng(0).standard_normal(12) + 0.4
    assert stats.sign_flip_p(d, seed=0, rounds=4000) == pytest.approx(
        stats.sign_flip_p(d, seed=0, rounds=4096), abs=0.03
    )


def test_equal_runs_are_called_different_at_the_stated_rate():
    rng, found = np.random.default_rng(11), []
    for _ in range(400):
        chance = rng.beta(0.3, 0.7, 40)
        a, b = ((rng.random((40, 8)) < chance[:, None]).mean(1) for _ in "ab")
        found.append(stats.paired([(a, b)], seed=0, rounds=400))
    assert 0.02 < np.mean([f.p <= 0.05 for f in found]) < 0.09  # 0.05, three standard errors of 0.011
    assert 0.91 < np.mean([f.difference.low <= 0 <= f.difference.high for f in found]) < 0.98


def test_questions_that_either_run_lacks_are_left_out():
    found = stats.paired([(np.array([1, NAN, 0.5]), np.array([0, 1, 0.5]))], seed=0)
    assert (found.difference.mean, found.difference.num_questions) == (0.5, 2)
    assert (found.better, found.worse) == (1, 0)
    with pytest.raises(ValueError, match="the same questions"):
        stats.paired([(np.zeros(2), np.zeros(3))], seed=0)


# --- averages of sets


def test_the_average_of_sets_covers_the_average_truth():
    rng, truths, sizes, hits = np.random.default_rng(9), (0.7, 0.4, 0.12, 0.16, 0.31), (400, 200, 200, 40, 100), 0
    for _ in range(1500):
        sets = [
            stats.proportion(stats.mean_at(simulated(rng, p, 0.5, n, 4))) for p, n in zip(truths, sizes, strict=True)
        ]
        average = stats.average(sets)
        hits += average.low <= np.mean(truths) <= average.high
    assert 0.935 <= hits / 1500 <= 0.97


def test_sets_count_alike_whatever_their_size():
    sets = [stats.proportion(np.repeat([0, 1], [n - ones, ones])) for n, ones in ((1000, 100), (10, 5))]
    average = stats.average(sets)
    assert average.mean == pytest.approx(0.3)
    assert average.se == pytest.approx(math.hypot(sets[0].se, sets[1].se) / 2)
    alone = stats.average(sets[:1])
    assert (alone.low, alone.high) == (pytest.approx(sets[0].low), pytest.approx(sets[0].high))
    with pytest.raises(ValueError, match="at least one"):
        stats.average([])
