import random
import re
from itertools import islice

import pytest
from interpreter import run

from thinkmid.errors import UserError
from thinkmid.mini import world
from thinkmid.mini.sentences import WORDINGS, read, say

DOCUMENTS = [row["text"] for row in world.documents(1, 3000)]
GENERAL = [row["text"] for row in world.general(1, 2000)]
QUESTIONS = {kind: list(world.questions(kind, 1, 300)) for kind in (*world.SETS, "train")}
TEMPLATES = {
    "held-out-a": ["comparison", "event"],
    "held-out-b": ["comparison", "hour"],
    "held-out-c": ["event", "sum"],
}


def families(result):
    """The families of the steps in order, each named once."""
    order = [family for family, _, _ in result.steps if family != "link"]
    return list(dict.fromkeys(order))


@pytest.mark.parametrize("kind", QUESTIONS)
def test_answers_follow_from_the_facts(kind):
    for row in QUESTIONS[kind]:
        (result,) = run(row["question"])
        assert row["answer"] == str(result.values[-1])
        assert (row["set"], row["question"][-7:]) == (kind, "Answer:")


def test_stated_results_follow_from_the_facts_and_stay_small():
    for text in DOCUMENTS:
        results = run(text)
        assert results
        for result in results:
            assert result.stated == result.values[-1]
            assert all(1 <= value <= world.LARGEST for value in result.values)
            changes = {change for family, _, change in result.steps if family != "link"}
            assert changes <= {"*2", "/2"} | {f"{sign}{n}" for sign in "+-" for n in range(1, world.CHANGE + 1)}


def test_a_set_of_k_steps_takes_k_steps_of_one_family():
    for k in (1, 2, 3, 4):
        for row in QUESTIONS[f"{k}-step"]:
            (result,) = run(row["question"])
            assert len(families(result)) == 1
            assert len([step for step in result.steps if step[0] != "link"]) == k


@pytest.mark.parametrize("kind", TEMPLATES)
def test_held_out_questions_join_two_families_which_no_training_text_does(kind):
    for row in QUESTIONS[kind]:
        (result,) = run(row["question"])
        assert families(result) == TEMPLATES[kind]
        assert len([step for step in result.steps if step[0] != "link"]) in (2, 3)
    trained = [*DOCUMENTS, *GENERAL, *(row["question"] for row in QUESTIONS["train"])]
    assert all(len(families(result)) == 1 for text in trained for result in run(text))


def test_held_out_questions_hold_no_sentence_type_that_training_lacks():
    def kinds(texts):
        told = [re.sub("^Question: | Answer:.*", "", text) for text in texts]
        return {read(sentence)[0] for text in told for sentence in re.split(r"(?<=[.?]) ", text)}

    assert kinds(row["question"] for kind in TEMPLATES for row in QUESTIONS[kind]) <= kinds(DOCUMENTS)


def test_a_value_is_copied_only_from_a_stated_count():
    for text in DOCUMENTS:
        for result in run(text):
            assert "link" not in [family for family, _, _ in result.steps[1:]]


def test_every_wording_is_read_back_as_what_was_said():
    words = {"who": "Ana", "other": "Ben", "box": "jar", "x": "p", "y": "q", "day": "Monday", "hour": "two"}
    for kind, wordings in WORDINGS.items():
        for n in (1, 2, world.LARGEST):
            for sentence in {say(random.Random(i), kind, thing="pen", n=n, **words) for i in range(60)}:
                back, found = read(sentence)
                assert back == kind or (sentence.startswith("Answer: It") and back.endswith("answer"))
                assert found.items() <= (words | {"thing": "pen", "n": n}).items()
        assert len({say(random.Random(i), kind, thing="pen", n=2, **words) for i in range(60)}) == len(wordings)


def test_shares_of_questions_continuations_and_notes():
    questions = sum(text.startswith("Question:") for text in DOCUMENTS) / len(DOCUMENTS)
    people = [run(text) for text in DOCUMENTS if not text.startswith("Question:")]
    people = [results for results in people if results[0].steps[-1][0] in ("event", "comparison")]
    changes = [change for text in DOCUMENTS for r in run(text) for family, _, change in r.steps if family != "link"]
    assert 0.2 < sum(change[0] in "*/" for change in changes) / len(changes) <= world.SCALED
    assert abs(questions - 0.20) < 0.03
    assert abs(sum(len(results) == 2 for results in people) / len(people) - 0.5) < 0.05
    assert sum(not run(text) for text in GENERAL) == len(GENERAL) / 2


def test_every_number_is_digits_after_a_space():
    for text in [*DOCUMENTS, *GENERAL]:
        assert all(text[at.start() - 1] == " " and 1 <= int(at[0]) <= world.LARGEST for at in re.finditer(r"\d+", text))


def test_one_thing_is_singular_and_more_are_plural():
    for text in [*DOCUMENTS, *GENERAL]:
        for n, thing in re.findall(r"(\d+) (?:more |fewer )?(coin|book|card|pen|shell|stamp|stone|apple)\b", text):
            assert n == "1", (thing, text)
        assert not re.search(r" 1 (more |fewer )?(coin|book|card|pen|shell|stamp|stone|apple)s", text)


def test_the_list_of_words_is_small():
    questions = [row["question"] for rows in QUESTIONS.values() for row in rows]
    assert len({word for text in [*DOCUMENTS, *GENERAL, *questions] for word in re.findall(r"\w+|[.,:?]", text)}) < 220


@pytest.mark.parametrize("source", [world.documents, world.general, lambda *args: world.questions("2-step", *args)])
def test_a_seed_gives_one_sequence_and_a_longer_run_begins_with_the_shorter(source):
    long = list(source(5, 50))
    assert list(source(5, 20)) == long[:20]
    assert list(islice(source(5, 10**18), 50)) == long
    assert list(source(6, 50)) != long


def test_an_unknown_set_is_refused_by_name():
    with pytest.raises(UserError, match="'5-step'"):
        list(world.questions("5-step", 0, 1))
