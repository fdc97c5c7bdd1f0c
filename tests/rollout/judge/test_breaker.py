import pytest

from thinkmid.rollout.judge.breaker import Breaker

QUIET_S = 30.0


@pytest.fixture
def clock():
    """A time that stands still: clock[0], in seconds."""
    return [1000.0]


@pytest.fixture
def breaker(clock):
    return Breaker(3, QUIET_S, lambda: clock[0])


def test_it_opens_after_so_many_in_a_row_once(breaker, clock):
    began = clock[0]
    clock[0] += QUIET_S
    assert [breaker.lost(began) for _ in range(4)] == [False, False, True, False]
    assert not breaker.admits()


def test_an_answer_in_between_starts_the_count_anew(breaker, clock):
    for _ in range(5):
        began = clock[0]
        clock[0] += QUIET_S
        assert not breaker.lost(began)
        assert not breaker.lost(began)
        assert not breaker.heard()
        assert breaker.admits()


def test_many_within_a_moment_are_not_enough(breaker, clock):
    """Nor is the time in which nobody asked."""
    breaker.heard()
    clock[0] += 10 * QUIET_S
    began = clock[0]
    assert not any(breaker.lost(began) for _ in range(50))
    assert breaker.admits()
    clock[0] += QUIET_S
    assert breaker.lost(clock[0])


def test_silence_counts_from_the_last_answer(breaker, clock):
    """Questions asked before it, and lost after it, do not make the silence longer."""
    began = clock[0]
    clock[0] += QUIET_S - 1
    breaker.heard()
    clock[0] += 1
    assert not any(breaker.lost(began) for _ in range(50))
    clock[0] += QUIET_S - 1
    assert breaker.lost(began)


def test_one_question_for_each_pause_and_an_answer_closes_it(breaker, clock):
    for _ in range(3):
        breaker.lost(clock[0] - QUIET_S)
    for _ in range(3):
        assert [breaker.admits() for _ in range(4)] == [False] * 4
        clock[0] += QUIET_S
        assert [breaker.admits() for _ in range(4)] == [True, False, False, False]
        clock[0] += QUIET_S / 2
        assert not breaker.lost(clock[0] - QUIET_S / 2), "it is open already"
    assert breaker.heard()
    assert [breaker.admits() for _ in range(4)] == [True] * 4
    assert not breaker.heard()
