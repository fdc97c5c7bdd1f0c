"""thinkmid.data.templates: every id says what its name says, and an opened tag is the tag of SFT and RLMT."""

from __future__ import annotations

import pytest

from thinkmid.data.templates import IDS, TEMPLATES, render, stops, tokens
from thinkmid.errors import UserError
from thinkmid.thoughts import before_stop
from thinkmid.tokenizer import Tokenizer, train_tokenizer

QUESTION = "What is {x} in $\\frac{1}{x}=2$?\n\nA. 1\nB. {question}"


@pytest.mark.parametrize("choice", [False, True])
@pytest.mark.parametrize("id", IDS)
def test_a_prompt_holds_the_question_as_it_is_and_ends_open_if_the_id_says_so(id, choice):
    prompt = render(id, QUESTION, choice=choice)
    assert prompt.count(QUESTION) == 1
    assert prompt.count("<think>") == prompt.endswith("<think>") == id.endswith("-think")
    assert prompt.removesuffix("<think>") == render(id.removesuffix("-think"), QUESTION, choice=choice)
    assert prompt == prompt.rstrip()  # a space at the end would be no token that models have seen there
    assert ("\\boxed{}" in prompt) == id.startswith("boxed")
    assert ("letter" in prompt) == (choice and not id.startswith(("as-is", "plain")))


def test_nothing_is_added_where_nothing_is_wanted():
    assert render("as-is", "Question: 1+1? Answer:") == "Question: 1+1? Answer:"
    assert render("plain-think", "1+1?") == "Question: 1+1?\nAnswer:<think>"


def test_an_unknown_id_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"unknown template 'boxed-thnik'; did you mean 'boxed-think'\?"):
        render("boxed-thnik", "3?")
    assert len(IDS) == 2 * len(TEMPLATES)


@pytest.mark.parametrize("kind", ["added", "plain"])
def test_an_opened_tag_has_the_ids_it_has_in_training_data(tmp_path, kind):
    train_tokenizer(["Question: 1+1?\nAnswer:<think>"] * 9, 320, tmp_path, kind)
    text = Tokenizer.load(tmp_path)
    pieces = [(False, "Question: 1+1?\nAnswer:"), (True, " two"), (False, " 2")]
    [(woven, _)] = text.encode_woven_many([pieces])
    ids = tokens(text, render("plain-think", "1+1?"))
    assert woven[: len(ids)] == ids
    assert text.decode(ids).endswith("Answer:<think>")
    assert tokens(text, "1+1?") == text.encode("1+1?")


@pytest.mark.parametrize("choice", [False, True])
@pytest.mark.parametrize("id", IDS)
def test_an_answer_is_over_where_the_same_template_begins_again(id, choice):
    following = render(id, "What is 1+1?", choice=choice)
    found = stops(id, True, ("\n\nQ:",))
    assert found[-1] == "\n\nQ:"
    assert stops(id, False, ("\n\nQ:", "\n\nQ:")) == ("\n\nQ:",)
    if id.startswith("as-is"):
        assert found == ("\n\nQ:",)
        return
    words = " It is 7.\nThe problem: a question.\nSolution: 7"
    assert before_stop(f"{words}\n\n{following} 2", found).rstrip() == words
    problem = following[following.index("Problem:" if "Problem:" in following else "Question:") :]
    assert before_stop(f"{words}\n\n{problem} 2", found).rstrip() == words
    assert before_stop(words, found) == words
    if id.startswith("plain"):  # its own lines are one line break apart
        assert before_stop(f"{words}\n{problem} 2", found).rstrip() == words
