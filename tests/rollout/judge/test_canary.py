import math

import pytest
from gullible import gullible, read
from later import Later, Ready

from thinkmid.rollout.judge import attacks, canary
from thinkmid.rollout.judge.model import JudgeError

PAIRS = [
    ("Snow fell on the pass, and no mail came.", "The river rose overnight, and the bridge was closed."),
    ("The sum of 3 and 4 is 7.", "Mia sold her 12 apples at the market."),
    ("He signed the lease on the first of May.", "Cells divide faster when they are warm."),
]


def honest(prompt):
    texts = read(prompt)
    return Ready(float(texts["candidate"].split() == texts["reference"].split()))


def test_attacks_are_many_all_different_and_always_the_same():
    assert len(canary.ATTACKS) >= 200
    assert len(set(canary.ATTACKS)) == len(canary.ATTACKS)
    assert attacks.attacks() == canary.ATTACKS


@pytest.mark.parametrize("template", ["same-meaning", "short"])
def test_an_honest_judge_passes_and_others_show_their_weakness(template):
    report = canary.run(honest, template, 1, PAIRS)
    assert report.share == 1
    assert report.right == {"same": [True] * 3, "other": [True] * 3, "attack": [True] * 8}
    assert report.faults == []
    yes = canary.run(lambda prompt: Ready(1.0), template, 1, PAIRS)
    assert (yes.share, yes.shares["same"]) == (0, 1)
    no = canary.run(lambda prompt: Ready(0.5), template, 1, PAIRS)
    assert (no.share, no.weakest, no.shares["attack"]) == (0, "same", 1)


def test_a_gullible_judge_is_found_out():
    """No guard stands before the canaries."""
    report = canary.run(lambda prompt: Ready(gullible(prompt)), "short", 2, PAIRS, num_attacks=100)
    assert report.weakest == "attack"
    assert report.share < 0.5
    assert f"weakest: attack ({report.share:.0%})" in report.line()
    assert "same 3/3, other 3/3" in report.line()


def test_questions_depend_on_the_seed_alone_and_cover_the_asked_number():
    def asked(seed, num):
        prompts = []
        canary.run(lambda p: prompts.append(p) or Ready(0.0), "short", seed, PAIRS, num)
        return prompts

    assert asked(1, 8) == asked(1, 8)
    assert [p[9:] for p in asked(1, 8)] != [p[9:] for p in asked(2, 8)]
    assert [len(asked(1, num)) for num in (0, 1, 10**6)] == [6, 7, 6 + len(canary.ATTACKS)]


def test_all_are_asked_before_the_first_answer_is_read():
    asked = []

    def ask(prompt):
        asked.append(prompt)
        return Later(lambda: 0.0 if len(asked) == 14 else pytest.fail(f"read after {len(asked)}"))

    canary.run(ask, "short", 1, PAIRS)


def test_failures_are_neither_right_nor_wrong():
    def answer(p):
        if p is None:
            raise JudgeError("timeout")
        return p

    answers = iter([1.0, None, math.nan, 0.0, 1.0, None, 0.0, 0.0])
    report = canary.run(lambda prompt: Later(lambda: answer(next(answers))), "short", 1, PAIRS, num_attacks=2)
    assert report.right == {"same": [True], "other": [True, False], "attack": [True, True]}
    assert len(report.faults) == 3
    assert report.share == 0.5
    why = "3 failed, most of them for: timeout"
    assert report.line() == f"judge canaries: same 1/1, other 1/2, attack 2/2 right, {why}; weakest: other (50%)"
    silent = canary.run(lambda prompt: Later(lambda: answer(None)), "short", 1, PAIRS)
    assert silent.share == 0, "who never answers is not trusted"
