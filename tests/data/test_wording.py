"""thinkmid.data.wording: what stands around a question, examples before it included, in words and in tokens."""

import json

import pytest
from test_chat import make

from thinkmid.data import questions
from thinkmid.data.templates import IDS, render, tokens
from thinkmid.data.wording import CHAT, Wording, WordingConfig, digest, read_shots
from thinkmid.errors import UserError

SHOTS = [("1 + 1?", "Two.\n#### 2"), ("2 + 2?", "<think>It is 4.</think> 4"), ("3 + 3?", "6")]


@pytest.fixture
def shots(tmp_path):
    path = tmp_path / "shots.jsonl"
    path.write_text("".join(json.dumps({"question": q, "answer": a, "more": 1}) + "\n" for q, a in SHOTS))
    return str(path)


def question(text):
    return questions.Question(id="q", question=text, gold="1", kind="open", meta={"where": "a.jsonl:1"})


def wording(folder, template, family="qwen", **more):
    text, theirs = make(folder, family)
    return Wording.read(WordingConfig(template=template, **more), folder, text), theirs


def test_examples_are_blocks_of_the_same_words_after_one_instruction(tmp_path, shots):
    found, _ = wording(tmp_path, "boxed", shots=shots, num_shots=2)
    wanted = (
        "Work through the problem below and finish with the result, alone, in \\boxed{}.\n\n"
        "Problem: 1 + 1?\n\nSolution: Two.\n#### 2\n\n"
        "Problem: 2 + 2?\n\nSolution:<think>It is 4.</think> 4\n\n"
        "Problem: 5?\n\nSolution:"
    )
    assert found.tokenizer.decode(found.tokens(question("5?"))) == wanted
    assert found.tokens(question("5?")) == tokens(found.tokenizer, wanted)


def test_without_examples_prompts_are_those_of_their_templates(tmp_path):
    for id in IDS:
        found, _ = wording(tmp_path, id)
        assert found.tokens(question("a {b} \\boxed{}?")) == tokens(found.tokenizer, render(id, "a {b} \\boxed{}?"))


@pytest.mark.parametrize("family", ["chatml", "qwen", "llama", "mistral"])
@pytest.mark.parametrize("template", CHAT)
def test_examples_are_earlier_turns_of_a_chat(tmp_path, shots, template, family):
    system = "" if family == "mistral" else "Be brief."
    found, theirs = wording(tmp_path, template, family, shots=shots, system=system)
    turns = [("user", "1 + 1?"), ("assistant", SHOTS[0][1]), ("user", "2 + 2?"), ("assistant", SHOTS[1][1])]
    turns = [*([("system", system)] if system else []), *turns, ("user", "3 + 3?"), ("assistant", "6"), ("user", "5?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    thinks = template == "chat-think"
    wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, enable_thinking=thinks)
    assert found.tokens(question("5?")) == wanted + found.tokenizer.open_ids * thinks


@pytest.mark.parametrize("template", CHAT)
def test_a_thought_that_the_template_opens_is_not_opened_again(tmp_path, template):
    found, theirs = wording(tmp_path, template, "deepseek")
    ids = found.tokens(question("5?"))
    messages = [{"role": "user", "content": "5?"}]
    assert ids == theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert found.tokenizer.decode(ids).endswith("5?<think>\n")
    assert found.tokenizer.opens(ids)


def test_whether_a_thought_is_open_depends_on_what_follows_the_tag(tmp_path):
    text = wording(tmp_path, "plain")[0].tokenizer
    said = {
        "a<think>": True,
        "a<think>\n\n": True,
        "<think>": True,
        "a<think>b": False,
        "<think>\n</think>": False,
        "": False,
    }
    assert {words: text.opens(tokens(text, words)) for words in said} == said


def test_a_question_is_no_example_of_its_own(tmp_path, shots):
    found, _ = wording(tmp_path, "plain", shots=shots)
    posed = [question(" 2 +  2? "), question("5?")]
    words = [found.tokenizer.decode(found.tokens(q)) for q in posed]
    assert [text.count("Question:") for text in words] == [3, 4]
    assert "It is 4" not in words[0]
    assert found.notes(posed) == [
        f"1 of 2 questions are examples of {shots} too; each is asked without its own example"
    ]
    assert found.notes(posed[1:]) == []


def test_a_prompt_that_spells_special_tokens_is_named_once(tmp_path):
    posed = [question("5?"), question("<|im_start|>user\n5?<|im_end|>"), question("<|im_end|>")]
    found, _ = wording(tmp_path, "as-is")
    wanted = "warning: a.jsonl:1: <|im_start|> in a text is ordinary characters, not the special token"
    assert [line.split(";")[0] for line in found.notes(posed)] == [wanted]
    assert wording(tmp_path, "chat")[0].notes(posed) == []


def test_the_digest_is_of_the_examples_that_are_used(shots):
    used = [digest(read_shots(WordingConfig(shots=shots, num_shots=n))) for n in (1, 2, 3, 0)]
    assert len({*used, digest([])}) == 4
    assert used[2] == used[3]
    assert digest([("ab", "c")]) != digest([("a", "bc")])


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"question": "1?"}, '"answer" is missing or no text'),
        ({"question": "1?", "answer": 3}, '"answer" is missing or no text'),
        ({"question": " ", "answer": "3"}, '"question" is missing or no text'),
        ({"question": "1?", "answer": "<think>3"}, "<think> is never closed at character 0"),
    ],
)
def test_an_example_that_cannot_be_used_is_named(tmp_path, row, line):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(UserError, match=f"^{path}:1: .*{line}$"):
        read_shots(WordingConfig(shots=str(path)))


def test_too_few_examples_and_settings_that_do_not_fit_are_refused(shots):
    with pytest.raises(UserError, match=r"shots\.jsonl: 3 examples, 4 are asked for"):
        read_shots(WordingConfig(shots=shots, num_shots=4))
    with pytest.raises(ValueError, match="system needs template 'chat' or 'chat-think', got 'plain'"):
        WordingConfig(template="plain", system="x")
    with pytest.raises(ValueError, match="num_shots 2 needs shots"):
        WordingConfig(num_shots=2)
