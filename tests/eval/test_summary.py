"""thinkmid.eval.summary: a scripted model of known accuracy, asked in every layout, comes out with that accuracy."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from test_questions import LAYOUTS, write

from thinkmid.data.questions import base_answer, load, posed
from thinkmid.eval.summary import Graded, compare_sets, summarise, tabulate

K = 16


def enlarged(task, n):
    """n rows that differ, in the first layout of the task."""
    base, rows = LAYOUTS[task][0], []
    for i in range(n):
        row = dict(base[i % len(base)])
        for name in ("question", "problem", "Question"):
            if name in row:
                row[name] = f"{row[name]} ({i})"
        if task == "dapo":
            row["prompt"] = f"What is {i}?"
        rows.append({name: value for name, value in row.items() if name not in ("id", "Record ID")})
    return rows


def scripted(questions, chance, seed):
    """Graded samples of a model that knows the answer to what it is asked with each question's chance; it answers the
    same letter else, whichever is wrong, and now and then says nothing or runs on."""
    rng = random.Random(seed)
    for q, p in zip(questions, chance, strict=True):
        for sample in range(K):
            asked = posed(q, sample)
            wrong = "A" if q.kind == "choice" and asked.gold != "A" else "B" if q.kind == "choice" else "-77"
            said = asked.gold if rng.random() < p else rng.choice([wrong, None])
            answer = None if said is None else base_answer(q, sample, said)
            yield Graded(
                question=q.id, sample=sample, score=float(said == asked.gold), answer=answer,
                truncated=said is None, num_think=10 if said else 30, unclosed=said is None,
            )  # fmt: skip


@pytest.mark.parametrize("task", LAYOUTS)
def test_a_scripted_model_of_known_accuracy_has_that_accuracy_in_every_set(tmp_path, task):
    questions = load(task, write(tmp_path / "a.jsonl", enlarged(task, 150))).questions
    assert len(questions) == 150
    chance = np.random.default_rng(1).permutation(np.linspace(0, 0.8, 150))
    rows = list(scripted(questions, chance, 0))
    found = summarise(rows, ks=(1, 4, 16, 64), seed=0)
    assert found["low"] < 0.4 < found["high"]
    # this very set of questions: what is left is the noise of sampling
    assert abs(found["mean"] - chance.mean()) < 4 * found["se_rerun"] < 0.04
    assert found["pass@1"] == pytest.approx(found["mean"])
    assert found["pass@4"] == pytest.approx(np.mean(1 - (1 - chance) ** 4), abs=0.03)
    assert found["mean"] < found["maj@16"]  # wrong answers are split between silence and one more
    assert "pass@64" not in found
    wrong = 1 - found["mean"]
    assert found["unparsed"] == found["truncated"] == found["unclosed"] == pytest.approx(wrong / 2, abs=0.03)
    assert found["mean_think"] == pytest.approx(10 + 20 * found["unparsed"])
    assert (found["num_questions"], found["num_samples"], found["failed"]) == (150, K, 0)
    assert found["boot_low"] == pytest.approx(found["low"], abs=0.01)


def test_a_model_that_always_says_one_letter_scores_a_quarter_exactly_and_has_no_majority(tmp_path):
    questions = load("gpqa-diamond", write(tmp_path / "a.csv", LAYOUTS["gpqa-diamond"][0])).questions
    rows = [
        Graded(
            question=q.id, sample=sample, score=float(posed(q, sample).gold == "C"),
            answer=base_answer(q, sample, "C"), truncated=False, num_think=0,
        )
        for q in questions for sample in range(K)
    ]  # fmt: skip
    found = summarise(rows, ks=(16,))
    assert found["mean"] == found["maj@16"] == 0.25
    assert found["se"] == 0


def row(question, sample, score, answer="1", **rest):
    return Graded(question=question, sample=sample, score=score, answer=answer, truncated=False, num_think=1, **rest)


def test_failed_graders_and_missing_samples_are_no_zeros():
    rows = [row("a", 0, 1), row("a", 1, None), row("b", 0, 0), row("b", 1, 1), row("c", 1, 1)]
    found = summarise(rows, ks=(1,))
    assert found["mean"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert found["failed"] == 1 / 5
    np.testing.assert_array_equal(tabulate(rows).scores, [[1, np.nan], [0, 1], [np.nan, 1]])


def test_the_order_of_rows_changes_nothing():
    rows = [
        row(q, s, float(random.Random(f"{q}{s}").random() < 0.5), answer=f"{s % 2}")
        for q in "abcdefg"
        for s in range(4)
    ]
    shuffled = random.Random(0).sample(rows, len(rows))
    assert summarise(rows, ks=(1, 2, 4), seed=3) == summarise(shuffled, ks=(1, 2, 4), seed=3)


def compare(a, b):
    by_set, over_sets = compare_sets({"one": a}, {"one": b})
    assert by_set == {"one": over_sets}
    return over_sets


def test_runs_are_paired_by_question_and_not_by_place():
    a = [row(q, 0, score) for q, score in zip("abcdef", (1, 1, 1, 0, 0, 0), strict=True)]
    assert compare(a, a[::-1]).difference.mean == compare(a, a[::-1]).difference.se == 0
    better = [replace(r, score=1.0) for r in a]
    found = compare(better, a)
    assert (found.difference.mean, found.better, found.worse) == (0.5, 3, 0)
    assert found.p == 2 / 2**3


def test_runs_of_different_questions_and_doubled_samples_are_refused():
    with pytest.raises(ValueError, match="set 'one': 2 questions are in one run alone, 'b' for one"):
        compare([row("a", 0, 1), row("b", 0, 1)], [row("a", 0, 1), row("c", 0, 1)])
    with pytest.raises(ValueError, match="sample 0 of question 'a' stands twice"):
        tabulate([row("a", 0, 1), row("a", 0, 0)])
    with pytest.raises(ValueError, match="no graded sample"):
        tabulate([])
