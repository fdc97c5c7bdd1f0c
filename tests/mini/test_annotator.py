import json
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from interpreter import changed, run

from thinkmid import thoughts
from thinkmid.errors import UserError
from thinkmid.mini import world
from thinkmid.mini.annotator import MIX, annotate, style_of

DOCUMENTS = [row["text"] for row in world.documents(2, 2000)]
PURE = {"hunch": (1.0, 0.0, 0.0), "merge": (0.0, 1.0, 0.0), "full": (0.0, 0.0, 1.0)}


def found_in(woven):
    """(thought, the sentence after it) in order."""
    pieces = thoughts.split(woven)
    after = [re.match(r"[^.]*\.", text)[0] for _, text in pieces[1:]]
    return [(piece, sentence) for (is_thought, piece), sentence in zip(pieces, after, strict=False) if is_thought]


def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text)]


@pytest.mark.parametrize("mix", [MIX, *PURE.values()])
def test_without_its_thoughts_an_annotated_document_is_the_document(mix):
    for text in DOCUMENTS:
        woven = annotate(text, mix)
        assert woven != text
        assert thoughts.strip(woven).encode() == text.encode()


@pytest.mark.parametrize("mix", PURE.values())
def test_one_thought_before_each_stated_result_ends_with_it(mix):
    for text in DOCUMENTS:
        found = found_in(annotate(text, mix))
        assert [numbers(sentence) for _, sentence in found] == [[result.stated] for result in run(text)]
        assert all(numbers(thought)[-1:] == numbers(sentence) for thought, sentence in found)
        assert all(thought[0] == sentence[0] == " " and thought[-1] == "." for thought, sentence in found)


def test_full_thoughts_take_every_step_once_and_add_up():
    for text in DOCUMENTS:
        for (thought, _), result in zip(found_in(annotate(text, PURE["full"])), run(text), strict=True):
            sums = re.findall(r" (\w+): (\d+)(?: ([+*/-]) (\d+) = (\d+))?\.", thought)
            assert [int(last or first) for _, first, _, _, last in sums] == result.values
            assert [key for key, *_ in sums[1:]] == [key for _, key, _ in result.steps]
            for _, first, sign, amount, last in sums:
                assert not sign or changed(int(first), sign + amount) == int(last)


def test_merged_thoughts_are_one_right_formula():
    for text in DOCUMENTS:
        for (thought, _), result in zip(found_in(annotate(text, PURE["merge"])), run(text), strict=True):
            left, right = thought.rstrip(".").split(" = ")
            assert re.fullmatch(r"[ ()0-9+*/-]+", left)
            assert eval(left) == int(right)
            changes = [change for family, _, change in result.steps if family != "link"]
            assert re.findall(r"[+*/-]\d+", re.sub(r"[ ()]", "", left)) == changes


@pytest.mark.parametrize(
    ("text", "at", "merged", "worked"),
    [
        (
            "Compared with Dan, Cleo has 3 fewer coins. Ana has 21 coins. Finn owns 5 books. "
            "Next to Ana, Dan has 1 more. Now Cleo has 19 coins.",
            -23,
            " 21 + 1 - 3 = 19.",
            " Ana: 21. Dan: 21 + 1 = 22. Cleo: 22 - 3 = 19.",
        ),
        (
            "Question: Ana has 4 pens. A bag contains as many pens as Ana has. At two Gus removes 3 pens. "
            "It rains all day. How many pens does the bag hold? Answer: It is 1.",
            -9,
            " 4 - 3 = 1.",
            " Ana: 4. bag: 4. two: 4 - 3 = 1.",
        ),
        (
            "Ana owns 8 pens. On Monday Ana finds 3 more. On Friday Ana gets as many again. On Sunday Ana loses half. "
            "In the end Ana has 11 pens.",
            -28,
            " (8 + 3) * 2 / 2 = 11.",
            " Ana: 8. Monday: 8 + 3 = 11. Friday: 11 * 2 = 22. Sunday: 22 / 2 = 11.",
        ),
        (
            "Suppose r is 9. Take r plus 4 to get s. We see that s minus 2 is t. In the end t must be 11.",
            -25,
            " 9 + 4 - 2 = 11.",
            " r: 9. s: 9 + 4 = 13. t: 13 - 2 = 11.",
        ),
        (
            "Question: Ana has 12 coins. Next to Ana, Jo has 2 more. On Monday Jo gives 1 to Ben. How many coins does "
            "Jo have? Answer: Jo has 13 coins.",
            -17,
            " 12 + 2 - 1 = 13.",
            " Ana: 12. Jo: 12 + 2 = 14. Monday: 14 - 1 = 13.",
        ),
    ],
)
def test_worked_examples(text, at, merged, worked):
    assert annotate(text, PURE["merge"]) == f"{text[:at]}<think>{merged}</think>{text[at:]}"
    assert annotate(text, PURE["full"]) == f"{text[:at]}<think>{worked}</think>{text[at:]}"


def test_a_second_result_starts_from_the_first():
    text = "Ana has 5 pens. On Monday Ana finds 2 more. So Ana has 7 pens. On Tuesday Ana sells 1. Now Ana has 6 pens."
    assert [thought for thought, _ in found_in(annotate(text, PURE["full"]))] == [
        " Ana: 5. Monday: 5 + 2 = 7.",
        " Ana: 7. Tuesday: 7 - 1 = 6.",
    ]


def test_the_text_alone_decides():
    before = {text: annotate(text) for text in DOCUMENTS[:300]}
    random.seed(99)
    list(world.documents(77, 10))
    for line in [json.dumps({"text": text}) for text in reversed(before)]:
        text = json.loads(line)["text"]
        assert annotate(text) == before[text]


@pytest.mark.parametrize(
    "text",
    [
        "Ana has 5 pens. On Monday Ana finds 2 more. So Ana has 8 pens.",  # wrong
        "Ana has 5 pens. On Monday Ana sells half of the pens. So Ana has 2 pens.",  # no whole number
        "Ana has 5 pens. On Monday Ana eats 2. So Ana has 3 pens.",  # no such sentence
        "Ana has 5 pens. On Monday Ben finds 2 more. So Ben has 2 pens.",  # nobody said what Ben had
        "Next to Ana, Ben has 2 more. Next to Ben, Ana has 2 fewer. So Ben has 5 pens.",  # a circle
        "Question: Ana has 5 pens. Ben has 4 pens. How many pens does Ana have? Answer: Ben has 4 pens.",  # not asked
        "Ana has 5 pens. Answer: It is 5.",  # nothing was asked
        "Ana has 5 pens. So Ana has 5 pens. And so",  # unfinished
        "Ana has 5 pens.?? So Ana has 5 pens.",  # no sentence in between
        "Ana has 5 pens. <think> Five.</think> So Ana has 5 pens.",  # has a thought already
        f"Ana has {'9' * 5000} pens. So Ana has 5 pens.",
        "Let p be 3.\n\nSo q is 3.",
        "",
    ],
)
def test_what_cannot_be_read_is_left_as_it_is(text):
    assert annotate(text) == text


SENTENCES = sorted({s for text in DOCUMENTS[:400] for s in re.findall(r" ?[^.?]+[.?]", text)})


@given(st.lists(st.sampled_from(SENTENCES) | st.text(max_size=5), max_size=6))
def test_no_mixture_of_sentences_is_ever_altered(sentences):
    text = "".join(sentences)
    woven = annotate(text, PURE["full"])
    assert woven == text or thoughts.strip(woven) == text


@pytest.mark.parametrize("mix", [MIX, (0.2, 0.5, 0.3), (0.0, 0.0, 1.0)])
def test_the_share_of_styles_follows_the_mix(mix):
    drawn = [style_of(text, mix) for text in DOCUMENTS]
    for share, style in zip(mix, ("hunch", "merge", "full"), strict=True):
        spread = (share * (1 - share) / len(DOCUMENTS)) ** 0.5
        assert abs(drawn.count(style) / len(DOCUMENTS) - share) <= 4 * spread
    assert all(annotate(text, mix) == annotate(text, PURE[style]) for text, style in zip(DOCUMENTS, drawn, strict=True))


@pytest.mark.parametrize("mix", [(0.5, 0.5, 0.5), (1.5, -0.5, 0.0), (float("nan"), 0.5, 0.5)])
def test_shares_that_are_none_are_refused(mix):
    with pytest.raises(UserError, match="sum to 1"):
        style_of("Let p be 3.", mix)
