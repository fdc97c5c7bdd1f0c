import math

import pytest
from conftest import join_ranks, spawn

from thinkmid.errors import UserError
from thinkmid.train.rollouts import finished, merged

# what a judge says on each rank; the second had fewer prompts and none of them asked
TOLD = (
    {"judge_asked": 3, "judge_failed": 1, "judge_wait_s": (6.0, 3), "judge_p_yes": (1.5, 2), "judge_canary": (0.8, 1)},
    {"judge_asked": 0, "judge_failed": 0, "judge_wait_s": (0.0, 0), "judge_p_yes": (0, 0), "judge_canary": (0.9, 1)},
)
ALL = {"judge_asked": 3, "judge_failed": 1, "judge_wait_s": 2, "judge_p_yes": 0.75, "judge_canary": 0.85}


class Told:
    """A reward whose judge says this; an exception is raised."""

    def __init__(self, tally):
        self.tally = tally

    def finish(self, step):
        if isinstance(self.tally, Exception):
            raise self.tally
        return self.tally


def two_ranks_worker(rank, folder):
    ranks = join_ranks(rank, 2, folder)
    assert finished(Told(TOLD[rank]), 1, ranks, 1) == pytest.approx(ALL)
    assert list(finished(Told(TOLD[rank]), 1, ranks, 1)) == list(ALL)
    # two neighbours with the groups of one engine
    assert finished(Told(TOLD[0]), 1, ranks, 2) == pytest.approx(ALL | {"judge_canary": 0.8})
    # a rank without anything to tell, either of them, and ranks that tell of different things
    for silent in (0, 1):
        assert finished(Told({} if rank == silent else TOLD[0]), 1, ranks, 1)["judge_asked"] == 3
    assert finished(Told({f"of_{rank}": rank + 5}), 1, ranks, 1) == {"of_0": 5, "of_1": 6}
    assert finished(Told({}), 1, ranks, 1) == {}
    with pytest.raises(UserError, match="cannot be trusted"):
        finished(Told(UserError("cannot be trusted") if rank else TOLD[0]), 1, ranks, 1)
    assert finished(Told(TOLD[rank]), 1, ranks, 1) == pytest.approx(ALL)


def test_a_rewards_metrics_are_those_of_all_ranks(tmp_path):
    spawn(two_ranks_worker, 2, str(tmp_path))


def test_counts_add_up_and_a_mean_of_means_is_weighted():
    assert merged([{"n": 2, "mean": (8.0, 4)}, {"n": 5, "mean": (1.0, 1)}]) == {"n": 7, "mean": 9 / 5}
    assert merged([{}, {"mean": (3.0, 2)}, {}]) == {"mean": 1.5}
    assert math.isnan(merged([{"mean": (0.0, 0)}] * 2)["mean"])
    assert merged([]) == merged([{}, {}]) == {}
