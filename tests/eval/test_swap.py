"""thinkmid.eval.swap: nobody keeps a thought on the own question, and as few as possible one with the own answer."""

from __future__ import annotations

import random
from itertools import permutations

import pytest

from thinkmid.eval.swap import swap


def samples(golds, counts=4):
    """Golds by (question, sample): counts samples of a question, or that many each."""
    counts = [counts] * len(golds) if isinstance(counts, int) else counts
    return {(f"q{i}", k): gold for i, (gold, n) in enumerate(zip(golds, counts, strict=True)) for k in range(n)}


def num_equal(golds, donors):
    return sum(golds[a] == golds[b] for a, b in donors.items())


@pytest.mark.parametrize("run_seed", range(20))
@pytest.mark.parametrize("num", [2, 3, 4, 17])
def test_each_sample_takes_from_another_question_and_each_thought_is_taken_once(num, run_seed):
    golds = samples([str(i) for i in range(num)])
    donors = swap(golds, run_seed)
    assert donors.keys() == golds.keys()
    assert sorted(donors.values()) == sorted(golds)
    assert all(a[0] != b[0] for a, b in donors.items())


def test_without_a_second_question_nothing_is_swapped():
    assert swap(samples(["1"]), 0) == swap({}, 0) == {}


def test_questions_of_unlike_many_samples_take_in_turn():
    golds = samples(["1", "2"], [5, 2])
    donors = swap(golds, 0)
    assert [donors["q0", k] for k in range(5)] == [("q1", k % 2) for k in range(5)]
    assert [donors["q1", k] for k in range(2)] == [("q0", k) for k in range(2)]


@pytest.mark.parametrize("run_seed", range(60))
def test_no_derangement_has_fewer_equal_answers(run_seed):
    rng = random.Random(run_seed)
    answers = [rng.choice("112345") for _ in range(rng.randint(2, 7))]
    golds, places = samples(answers, 3), range(len(answers))
    derangements = [to for to in permutations(places) if all(i != to[i] for i in places)]
    fewest = min(sum(answers[i] == answers[to[i]] for i in places) for to in derangements)
    donors = swap(golds, run_seed)
    assert num_equal(golds, donors) == 3 * fewest
    assert all(a[0] != b[0] for a, b in donors.items())


def test_letters_that_turn_from_sample_to_sample_meet_no_equal_letter():
    golds = {(f"q{i}", k): "ABCD"[(i * 7 + k) % 4] for i in range(30) for k in range(16)}
    donors = swap(golds, 1)
    assert num_equal(golds, donors) == 0
    assert sorted(donors.values()) == sorted(golds)


def test_two_questions_whose_letters_turn_alike_exchange_samples_of_unlike_letters():
    golds = {(q, k): "ABCD"[k % 4] for q in ("q0", "q1") for k in range(8)}
    assert num_equal(golds, swap(golds, 0)) == 0


def test_the_seed_decides_and_the_order_of_samples_does_not():
    golds = samples([str(i % 5) for i in range(30)])
    backwards = dict(reversed(golds.items()))
    assert swap(golds, 3) == swap(backwards, 3) != swap(golds, 4)
