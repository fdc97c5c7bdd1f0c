from dataclasses import replace

import numpy as np
import pytest
from conftest import random_groups

from thinkmid.train import advantage
from thinkmid.train.advantage import advantages, units
from thinkmid.train.config import LossConfig

NAN = float("nan")
ESTIMATORS = ("dr_grpo", "grpo", "rloo", "token-mean")


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("dr_grpo", [0.75, -0.25, -0.25, -0.25]),
        ("token-mean", [0.75, -0.25, -0.25, -0.25]),
        ("rloo", [1.0, -1 / 3, -1 / 3, -1 / 3]),  # reward minus the mean of the others
        ("grpo", [3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)]),  # population std sqrt(3)/4
    ],
)
def test_advantages_by_hand(estimator, expected):
    np.testing.assert_allclose(advantages([1, 0, 0, 0], estimator), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [("dr_grpo", [0.5, NAN, -0.5, NAN]), ("rloo", [1, NAN, -1, NAN]), ("grpo", [1, NAN, -1, NAN])],
)
def test_a_failed_verdict_leaves_the_baseline(estimator, expected):
    np.testing.assert_allclose(advantages([1, NAN, 0, NAN], estimator), expected, rtol=1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("rewards", "expected"),
    [([0.1] * 3, [0, 0, 0]), ([NAN, 1, NAN], [NAN, 0, NAN]), ([NAN] * 3, [NAN] * 3), ([0.3, NAN, 0.3], [0, NAN, 0])],
)
def test_a_group_without_spread_has_no_advantage(estimator, rewards, expected):
    assert np.mean([0.1] * 3) != 0.1  # rounding alone must not bring a group to life
    np.testing.assert_array_equal(advantages(rewards, estimator), expected)
    (group,) = random_groups([rewards])
    assert advantage.is_dead(group)
    assert units([group], LossConfig(denom=1.0, estimator=estimator), 3) == []


def weights_of(groups, estimator, **options):
    cfg = LossConfig(denom=5.0, estimator=estimator, **options)
    return [[r.pg_w for r in u.replies] for u in units(groups, cfg, 3)]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_token_weights_by_hand(estimator):
    groups = random_groups([[1, NAN, 0], [0, 0, 0]], seed=2)
    drawn = [[s.drawn.sum() for s in g.samples] for g in groups]
    divisor = {
        "dr_grpo": [2 * 3 * 5.0] * 2,
        "rloo": [2 * 3 * 5.0] * 2,
        "grpo": [2 * 3 * drawn[0][0], 2 * 3 * drawn[0][2]],  # each sample by its own length
        "token-mean": [sum(map(sum, drawn))] * 2,  # failed and dead samples count
    }[estimator]
    (found,) = weights_of(groups, estimator)
    for w, sample, by in zip(found, (groups[0].samples[0], groups[0].samples[2]), divisor, strict=True):
        np.testing.assert_array_equal(w, sample.drawn.astype(np.float32) / np.float32(by))


def test_dead_and_failed_samples_stay_in_the_denominator():
    full = random_groups([[1, 0, 0]])
    failed = [replace(full[0], rewards=[1, NAN, 0])]
    dead = full + random_groups([[1, 1, 1]], seed=3)
    np.testing.assert_array_equal(weights_of(failed, "dr_grpo")[0][0], weights_of(full, "dr_grpo")[0][0])
    np.testing.assert_allclose(weights_of(dead, "dr_grpo")[0][0] * 2, weights_of(full, "dr_grpo")[0][0])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_with_the_scope_thought_the_suffix_weighs_nothing(estimator):
    (group,) = random_groups([[1, 0, 1, 0]])
    samples = [replace(s, num_think=(len(s.tokens) + 1) // 2) for s in group.samples]
    silent = [replace(s, drawn=s.drawn & (np.arange(len(s.drawn)) < s.num_think)) for s in samples]
    assert any(len(s.tokens) > s.num_think and s.drawn[s.num_think :].any() for s in samples)
    (found,) = weights_of([replace(group, samples=samples)], estimator, scope="thought")
    (expected,) = weights_of([replace(group, samples=silent)], estimator)
    for w, e in zip(found, expected, strict=True):
        np.testing.assert_array_equal(w, e)


def test_samples_of_average_reward_are_dropped_unless_asked_for():
    groups = random_groups([[1, 0.5, 0]])
    assert [len(x) for x in weights_of(groups, "dr_grpo")] == [2]
    assert [len(x) for x in weights_of(groups, "dr_grpo", kl=0.1)] == [3]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_sample_of_forced_tokens_alone_weighs_nothing(estimator):
    (group,) = random_groups([[1, 0]])
    samples = [replace(s, drawn=np.zeros_like(s.drawn)) for s in group.samples]
    for kept in (samples, [samples[0], group.samples[1]]):
        (found,) = weights_of([replace(group, samples=kept)], estimator)
        assert all(np.isfinite(w).all() for w in found)
        assert not found[0].any()
