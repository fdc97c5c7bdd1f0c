import math
from dataclasses import replace

import numpy as np
import pytest

from thinkmid.rollout.judge import Verdict, judge_groups, match
from thinkmid.text import Text, train_tokenizer
from thinkmid.types import Group, Prompt, Sample

SENTENCES = ["The sum of 3 and 4 is 7.", "Mia has 12 apples, and Tom has 5.", "So 7 remain."]


@pytest.fixture(scope="module", params=["added", "plain"])
def text(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(SENTENCES, 290, folder, request.param)
    return Text.load(folder)


def make_group(text, reference, written):
    samples = []
    for w in written:
        tokens = np.array(text.encode(w), np.int32)
        zeros = np.zeros(len(tokens), np.float32)
        samples.append(
            Sample(tokens=tokens, logp=zeros, drawn=zeros == 0, finish="suffix", num_think=len(tokens), version=0)
        )
    return Group(prompt=Prompt(id="p", tokens=[1], meta={"reference": reference}), samples=samples)


def never(pairs):
    raise AssertionError(f"asked about {pairs}")


@pytest.mark.parametrize(
    ("candidate", "reference", "value"),
    [
        ("It costs 1,000 dollars.", "The price is 1000.", 1),
        ("It costs 1,000 dollars.", "The price is 100.", 0),
        ("1,234,567 it is.", "1234567", 1),
        ("That is 3.0 in all.", "3 remain.", 1),
        ("That is 3.05.", "3.5 remain.", 0),
        ("It is -4 degrees.", "4 degrees.", 0),
        ("It is -4 degrees.", "The answer is -4.", 1),
        ("12 - 5 = 7.", "12 - 5 = 7.", 1),
        ("5 and 12 make it.", "12 and 5 make it.", 0),  # order counts
        ("7 remain. Tom has 5.", "7 remain. Mia has 12.", 1),  # the first sentence alone
        ("7 remain\nTom has 5.", "7 remain.", 1),
        ("Tom knows. 7 remain.", "7 remain.", 0),
        ("  7 remain.", "7 remain.", 1),
        ("Pi is 3.14 here.", "3.14", 1),  # a decimal point ends no sentence
        ("x7 and 7b remain.", "7 remain.", 0),  # parts of words are no numbers
        ("Some remain.", "7 remain.", 0),
        ("7 remain.", "Some remain.", 0),
        ("The cat sat on the mat.", "the CAT sat on the mat!", 1),
        ("The cat sat.", "A dog ran home.", 0),
        ("the the the", "the cat sat", 0),  # a word counts as often as it stands
        ("", "7 remain.", 0),
        ("", "", 0),
        ("   \n", "7 remain.", 0),
        ("...", "Some remain.", 0),
    ],
)
def test_match_compares_the_first_sentences(candidate, reference, value):
    (verdict,) = match([(candidate, reference)])
    assert verdict.value == value, verdict.why


def test_match_needs_the_stated_share_of_words():
    pair = ("red green blue", "red green white grey")  # 2 common of 3 and 4: F1 = 4/7
    assert [match([pair], overlap=x)[0].value for x in (0.57, 0.58)] == [1, 0]


def test_without_exactly_one_closing_tag_nobody_is_asked(text):
    group = make_group(text, "So 7 remain.", ["So 7 remain.", "a</think> So 7 remain.</think>", "", "7</thin k>"])
    (verdicts,) = judge_groups([group], text, never, 10)
    assert [v.value for v in verdicts] == [0, 0, 0, 0]
    assert [v.why for v in verdicts] == ["unclosed", "closed more than once", "unclosed", "unclosed"]


def test_the_reference_is_cut_as_the_suffix_is(text):
    reference, asked = " So 7 remain. Mia has 12 apples, and Tom has 5.", []

    def judge(pairs):
        asked.extend(pairs)
        return [Verdict(1, "") for _ in pairs]

    cut = text.encode(reference)[:4]
    group = make_group(text, reference, ["12 - 5</think>" + text.decode(cut)])
    judge_groups([group], text, judge, 4)
    assert asked == [(text.decode(cut), text.decode(cut))]
    assert len(text.decode(cut)) < len(reference)


def test_a_suffix_past_the_cut_is_not_shown(text):
    """The engine ends at the cut; a sample that does not, from another engine, must gain nothing by it."""
    suffix, asked = text.encode(" So 7 remain. Mia has 12 apples."), []
    group = make_group(text, "7", ["12</think>"])
    long = [replace(s, tokens=np.append(s.tokens, suffix)) for s in group.samples]
    group = replace(group, samples=long)
    judge_groups([group], text, lambda pairs: asked.extend(pairs) or [Verdict(1, "") for _ in pairs], 3)
    assert [candidate for candidate, _ in asked] == [text.decode(suffix[:3])]


def test_verdicts_stand_where_their_samples_stand(text):
    groups = [
        make_group(text, "7", ["a</think> 1", "no tag", "b</think> 2"]),
        make_group(text, "8", ["no tag", "c</think> 3"]),
        make_group(text, "9", ["no tag"]),
    ]

    def judge(pairs):
        return [Verdict(1, f"{candidate.strip()} for {reference}") for candidate, reference in pairs]

    whys = [[v.why for v in verdicts] for verdicts in judge_groups(groups, text, judge, 10)]
    assert whys == [["1 for 7", "unclosed", "2 for 7"], ["unclosed", "3 for 8"], ["unclosed"]]


def test_a_failed_verdict_is_no_zero(text):
    group = make_group(text, "7", ["a</think> 7", "b</think> 8"])
    (verdicts,) = judge_groups([group], text, lambda pairs: [Verdict(None, "timeout"), Verdict(0, "no")], 10)
    assert math.isnan(verdicts[0].reward)
    assert verdicts[1].reward == 0.0


def test_a_judge_that_answers_too_little_is_noticed(text):
    group = make_group(text, "7", ["a</think> 7", "b</think> 8"])
    with pytest.raises(ValueError, match="zip"):
        judge_groups([group], text, lambda pairs: [Verdict(1, "")], 10)
