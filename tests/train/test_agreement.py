import math

import numpy as np
import pytest

from thinkmid.train.agreement import describe, too_far


def test_the_gap_is_described_by_numbers_worked_out_by_hand():
    row = describe(np.array([0.0, math.log(2), -math.log(2), math.log(4)], np.float32), cap=1.5)
    assert row["probe_gap_mean"] == pytest.approx(math.log(2))
    assert row["probe_gap_max"] == pytest.approx(math.log(4))
    # ratios 1, 2, 1/2, 4: the mean of r - 1 - log r
    assert row["probe_kl"] == pytest.approx((0 + (1 - math.log(2)) + (-0.5 + math.log(2)) + (3 - math.log(4))) / 4)
    assert row["probe_capped"] == 0.5
    assert row["probe_tokens"] == 4
    assert 0.5 <= row["probe_ratio_p01"] < 0.55
    assert 3.9 < row["probe_ratio_p99"] <= 4


def test_equal_log_probs_have_no_gap_and_no_tokens_no_row():
    row = describe(np.zeros(5, np.float32), cap=2.0)
    assert (row["probe_gap_max"], row["probe_kl"], row["probe_capped"]) == (0, 0, 0)
    assert describe(np.zeros(0, np.float32), cap=2.0) == {}
    assert not too_far({}, 0.1)


@pytest.mark.parametrize(("gap", "far"), [(0.05, False), (0.11, True), (math.nan, True), (math.inf, True)])
def test_a_gap_beyond_the_bound_or_not_a_number_is_too_far(gap, far):
    assert too_far(describe(np.array([gap], np.float32), cap=2.0), 0.1) == far
