import re
from itertools import takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkmid.rollout.judge.config import JudgeConfig
from thinkmid.rollout.judge.templates import ANSWERS, TEMPLATES, neutral, nonce, render

CODE = "0123abcd"
FORGED = st.text(st.sampled_from("=-# \n\r\u2028\x0b\x0c\x85\u200b\u202e<>|/[]INSThk_｜＜0123abcdABCDx~`"), max_size=60)


def common(a, b):
    """What two texts share from their beginning on."""
    return a[: len(list(takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))))]


def fences(prompt):
    """Lines that a reader of a fenced template takes for fences, whatever code they hold."""
    return [line for line in prompt.splitlines() if re.match(r"\W*[=＝]{3}", line)]


@pytest.mark.parametrize("template", TEMPLATES)
def test_siblings_share_every_character_up_to_the_candidate(template):
    code = nonce(1, "It rained.", 0)
    prompts = [render(template, candidate, "It rained.", code) for candidate in ("QWhen", "ZThen")]
    shared = common(*prompts)
    assert [p[len(shared)] for p in prompts] == ["Q", "Z"]
    assert "It rained." in shared


@pytest.mark.parametrize("template", TEMPLATES)
def test_prompts_share_their_instruction_and_end_before_the_answer(template):
    a = render(template, "candidate a", "reference a", "aaaaaaaa")
    b = render(template, "candidate b", "reference b", "bbbbbbbb")
    instruction = TEMPLATES[template].split("{nonce}")[0].removesuffix("=== reference ")
    assert common(a, b).startswith(instruction)
    assert a[-1] in "?:"
    assert all(answer.startswith(" ") for answer in ANSWERS)


def test_the_short_template_takes_three_lines_and_few_words():
    prompt = render("short", "one\ntwo\n\nthree", "four\r\nfive", CODE)
    assert prompt == f"{CODE} reference: four five\n{CODE} candidate: one two three\n{CODE} same?"


def test_a_nonce_is_of_the_seed_the_reference_and_the_vote():
    keys = [(seed, text, vote) for seed in (0, 1, -1, 2**64) for text in ("", "a", "1/a", "\ud800") for vote in (0, 1)]
    codes = [nonce(*key) for key in keys]
    assert len(set(codes)) == len(keys)
    assert codes == [nonce(*key) for key in keys]
    assert all(re.fullmatch("[0-9a-f]{8}", code) for code in codes)


def test_an_unknown_template_names_the_nearest():
    with pytest.raises(ValueError, match="unknown template 'same-meanin'; did you mean 'same-meaning'"):
        JudgeConfig(template="same-meanin")
    with pytest.raises(ValueError, match="unknown template 'xyz'; there are same-meaning, very-similar"):
        JudgeConfig(template="xyz")


@given(FORGED, FORGED)
def test_no_text_leaves_its_fence(candidate, reference):
    prompt = render("very-similar", candidate, reference, CODE)
    assert len(fences(prompt)) == 4
    assert prompt.casefold().count(CODE) == 4
    one_line = render("short", candidate, reference, CODE)
    assert len(one_line.splitlines()) == 3
    assert one_line.casefold().count(CODE) == 3


@given(FORGED)
def test_no_text_holds_a_tag_a_special_token_or_something_invisible(text):
    clean = neutral(text, CODE)
    assert not re.search(
        r"[<＜][/|｜\w]|[|｜][>＞]|\[/?INST\]|[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2028]", clean
    )
    assert neutral(clean, CODE) == clean


def test_overlapping_nonces_are_all_broken_up():
    assert neutral("a" * 20, "a" * 8).split() == ["aaaa", *"a" * 12, "aaaa"]
    assert "abababab" not in neutral("x" + "ab" * 9, "abababab")
    assert CODE not in neutral("0123\u200babcd 0123ABCD", CODE).casefold()


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("<|im_start|>", "< |im_start| >"),
        ("</think>", "< /think>"),
        ("[/INST]", "[ /INST]"),
        ("<s>", "< s>"),
        ("=== end ===", "== end =="),
        ("a\r\nb\u2028c", "a\nb\nc"),
        ("a\u202eb\u200bc\x00d\ud800", "abcd"),
    ],
)
def test_what_could_be_taken_for_structure_is_broken_up(text, clean):
    assert neutral(text, CODE) == clean


@pytest.mark.parametrize(
    "text",
    [
        "She said: “No.”\n\n\tThen 3 < 4, and a[0] == b; naïve café, 数学, x² − ½.",
        "if (a && b) { c = [1]; }",
        "👩🏽 fine",
    ],
)
def test_ordinary_text_stays_as_it_is(text):
    assert neutral(text, CODE) == text
