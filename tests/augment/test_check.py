import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkmid import thoughts
from thinkmid.augment import insert, rewrite
from thinkmid.augment.annotators import AnnotatorConfig, Reply, by_model
from thinkmid.augment.check import NAMES, Refused, accept, normalise

TEXT = "  The sky is grey.\n\nSo it may rain: 60 % they say. We go out  anyway.\n"


def framed(body):
    return f"=== answer ===\n{body}\n=== end ==="


def reason(call, *args, **options):
    with pytest.raises(Refused) as error:
        call(*args, **options)
    return str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_in_every_spelling_becomes_the_one_pair(name):
    spellings = {name, name.upper(), name.replace("-", "_"), name.replace("-", "")}
    for written in spellings:
        for opened, closed in ((f"<{written}>", f"</{written}>"), (f'< {written} id="1">', f"</ {written} >")):
            assert normalise(f"a{opened}b{closed}c") == "a<think>b</think>c"
        assert normalise(f"a[[{written}]]b[[/{name}]]c") == "a<think>b</think>c"


def test_what_looks_like_a_tag_and_is_none_stays():
    for text in ("a < b", "<b>x</b>", "[1]", "[note 3]", "[[wiki]]", "[context]", "<thinker>", "i<think", "think>"):
        assert normalise(text) == text


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("<think>a<think>b</think></think>", "nested tags"),
        ("<plan>a<python>1</python></plan>", "nested tags"),
        ("<think>a", "unbalanced tags"),
        ("a</think>", "unbalanced tags"),
        ("<plan>a</goal>", "unbalanced tags"),
        ("</think>a<think>", "unbalanced tags"),
        ("a<think/>b", "empty thought"),
        ("a<plan id='1'/>b", "empty thought"),
    ],
)
def test_tags_out_of_order_are_refused_by_reason(written, why):
    assert reason(normalise, written) == why


@pytest.mark.parametrize(
    ("woven", "why"),
    [
        ("Ab. <think>t</think>Cd", "altered text"),
        ("Ab.<think>t</think> cd.", "altered text"),
        ("Ab.<think>t</think> Cd.\n", "altered text"),
        ("<think>t</think>", "altered text"),
        ("Ab. Cd.", "too few thoughts"),
        ("Ab.<think> \n</think> Cd.", "empty thought"),
        ("Ab.<think>12345678901</think> Cd.", "thought too long"),
        ("Ab.<think>a</think><think>b</think> Cd.", "two thoughts at one place"),
        ("Ab.<think>a</think></think> Cd.", "unbalanced tags"),
        ("Ab.<think>a\x1b[2J</think> Cd.", "control characters"),
        ("Ab.<think>a</plan</think> Cd.", "broken tag"),
    ],
)
def test_the_last_gate_lets_only_the_chunk_itself_through(woven, why):
    assert reason(accept, "Ab. Cd.", woven, max_thought=10) == why


def test_a_thought_that_recites_what_follows_is_refused():
    follows = " and then the whole long sentence follows, word for word, as it stands there in the text."
    woven = "Ab.<think>It says: " + " ".join(follows.split()) + "</think>" + follows
    assert reason(accept, "Ab." + follows, woven) == "copies the text"
    shorter = "Ab.<think>" + follows[:40] + "</think>" + follows
    assert accept("Ab." + follows, shorter) == shorter


@given(st.text(alphabet="ab. \n!?é。<>/think", max_size=60).filter(lambda s: not thoughts.TAG.search(s)), st.data())
def test_insert_only_gives_the_text_back_whatever_places_are_named(chunk, data):
    at = insert.places(chunk)
    assert re.sub("⟦\\d+⟧", "", insert.show(chunk)) == chunk
    chosen = data.draw(st.sets(st.integers(1, len(at)), min_size=1))
    woven = insert.read(chunk, framed("\n".join(f"@{k}\nthought {k}" for k in chosen)))
    assert re.sub("<think>thought \\d+</think>", "", woven) == chunk
    stood = [chunk.find("", at[k - 1]) for k in sorted(chosen)]
    assert [(k, len(thoughts.strip(woven[: woven.index(f"<think>thought {k}<")]))) for k in sorted(chosen)] == list(
        zip(sorted(chosen), stood, strict=True)
    )


def test_thoughts_stand_before_the_space_that_leads_a_sentence_and_may_have_several_lines():
    woven = insert.read("One is 1. Two is 2.", framed("@2\nFirst\n\n  @x second \n"))
    assert woven == "One is 1.<think>First\n\n  @x second</think> Two is 2."


def test_rewriting_takes_places_from_the_reply_and_the_text_from_the_chunk():
    said = "The sky is grey. <reflect>Wet.</reflect>\n"
    said += "So it may rain:  60 % they say.\n<think> Hm. </think>\nWe go out\tanyway."
    want = (
        "  The sky is grey.<think>Wet.</think>\n\nSo it may rain: 60 % they say.<think>Hm.</think> We go out  anyway.\n"
    )
    assert rewrite.read(TEXT, framed(said)) == want


@given(st.text(alphabet="ab .\n。", min_size=1, max_size=40).filter(str.strip), st.data())
def test_a_rewriting_with_any_white_space_gives_the_chunk_exactly(chunk, data):
    at = data.draw(st.integers(0, len(chunk)))
    spaced = re.sub(r"\s+", lambda _: data.draw(st.sampled_from([" ", "\n", "  "])), chunk[:at])
    said = framed(f"{spaced} <think>t</think> {chunk[at:]}")
    # in the middle of "ab"
    if at and chunk[at - 1 : at + 1].isalpha() and len(chunk[at - 1 : at + 1]) == 2 and "。" not in chunk[at]:
        assert reason(rewrite.read, chunk, said) == "inside a word"
    else:
        assert rewrite.read(chunk, said).replace("<think>t</think>", "") == chunk


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (TEXT.replace("grey", "gray") + "<think>a</think>", "altered text"),
        (TEXT.replace("60 %", "60%.") + "<think>a</think>", "altered text"),
        (TEXT.replace("We", "<think>a</think>"), "altered text"),
        (TEXT + " And more. <think>a</think>", "altered text"),
        ("```\n" + TEXT + "<think>a</think>\n```", "altered text"),
        (TEXT.replace("rain", "r<think>a</think>ain"), "inside a word"),
        (TEXT.replace("We", "<think>a</think><plan>b</plan>We"), "two thoughts at one place"),
        (TEXT.replace("We", "<think>a<plan>b</plan></think>We"), "nested tags"),
    ],
)
def test_a_rewriting_that_changes_anything_visible_is_refused(said, why):
    assert reason(rewrite.read, TEXT, framed(said)) == why


def test_a_refused_answer_is_asked_for_again_with_the_reason_and_all_is_counted():
    cfg, asked = AnnotatorConfig(retries=2), []
    answers = [[framed("@1\nGood.")], ["", framed("@2\nGood.")], [framed("@9\nx"), framed("@1\n "), ""]]
    outcomes = []
    for chunk, texts in zip(["One. Two.", "Three. Four.", "Five. Six."], answers, strict=True):
        left = iter(texts)

        def write(prompt, left=left):
            asked.append(prompt)
            return Reply(next(left), prompt_tokens=10, written_tokens=2)

        outcomes.append(by_model(chunk, cfg, write))
        assert next(left, None) is None
    first, second, third = outcomes
    assert "An earlier answer could not be used: no such place." in asked[4]
    assert asked[5].count("An earlier answer") == 1
    assert (first.text, first.calls, first.retried) == ("<think>Good.</think>One. Two.", 1, {})
    assert (second.text, second.calls) == ("Three.<think>Good.</think> Four.", 2)
    assert second.retried == {"empty answer": 1}
    assert (third.text, third.refused, third.calls, third.prompt_tokens) == (None, "empty answer", 3, 30)
    assert third.retried == {"no such place": 1, "empty thought": 1}


def test_chunks_that_cannot_be_annotated_are_not_asked_about():
    def never(prompt):
        raise AssertionError("asked")

    cases = [("insert", "a <think> b", "tags in the text"), ("rewrite", "a [[plan]] b", "tags in the text")]
    for strategy, chunk, why in [*cases, ("insert", " \n", "blank")]:
        out = by_model(chunk, AnnotatorConfig(strategy=strategy), never)
        assert (out.text, out.refused, out.calls) == (None, why, 0)
    # what insert-only never reads back may hold any other tag
    out = by_model("a [[plan]] b. c", AnnotatorConfig(), lambda prompt: Reply(framed("@2 t")))
    assert out.text == "a [[plan]] b.<think>t</think> c"
