import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkmid import thoughts
from thinkmid.errors import UserError

# the characters of the tags themselves, so that halves of tags meet the inserted ones
tagless = st.text(alphabet="<>/think \né", max_size=40).filter(lambda s: "<think>" not in s and "</think>" not in s)


@st.composite
def texts_with_thoughts(draw):
    text = draw(tagless)
    return text, draw(st.lists(st.tuples(st.integers(0, len(text)), tagless), max_size=5))


@given(texts_with_thoughts())
def test_strip_undoes_insert(case):
    text, placed = case
    assert thoughts.strip(thoughts.insert(text, placed)) == text


@given(texts_with_thoughts())
def test_split_gives_back_the_thoughts_and_where_they_stood(case):
    text, placed = case
    found, at = [], 0
    for is_thought, piece in thoughts.split(thoughts.insert(text, placed)):
        if is_thought:
            found.append((at, piece))
        else:
            at += len(piece)
    by_offset = [pair for i in range(len(text) + 1) for pair in placed if pair[0] == i]
    assert found == by_offset


def test_the_tags_stand_around_the_thought_and_nothing_else_is_added():
    assert thoughts.insert("It rains. So it is wet.", [(9, " Rain!")]) == "It rains.<think> Rain!</think> So it is wet."
    assert thoughts.split("a<think>b</think>c") == [(False, "a"), (True, "b"), (False, "c")]
    assert thoughts.split("<think></think>") == [(True, "")]
    assert thoughts.split("") == []


@pytest.mark.parametrize(
    ("woven", "fault"),
    [
        ("ab<think>c<think>d</think></think>", "<think> inside a thought at character 10"),
        ("ab<think>c</think>de<think>f", "<think> is never closed at character 20"),
        ("ab</think>c", "</think> without <think> at character 2"),
        ("ab<think>c</think></think>", "</think> without <think> at character 18"),
    ],
)
def test_a_tag_out_of_place_is_named(woven, fault):
    for read in (thoughts.split, thoughts.strip):
        with pytest.raises(UserError) as error:
            read(woven)
        assert str(error.value) == fault


@pytest.mark.parametrize(
    ("text", "thought"), [("a</think>b", (1, "x")), ("ab", (1, "<think>")), ("ab", (3, "x")), ("ab", (-1, "x"))]
)
def test_what_could_not_be_stripped_again_is_refused(text, thought):
    with pytest.raises(UserError, match="character"):
        thoughts.insert(text, [thought])


@pytest.mark.parametrize(
    ("text", "stops", "is_open", "kept"),
    [
        ("18\n\nProblem: 1", ["\n\nProblem:"], False, "18"),
        ("18\n\nProblem", ["\n\nProblem:"], False, "18\n\nProblem"),
        ("aXbY", ["Y", "X"], False, "a"),
        ("aXYb", ["XYb", "Y"], False, "aX"),  # the first to be complete, not the first to begin
        ("aXYb", ["Y", "XY"], False, "a"),  # complete together
        ("X", ["X"], False, ""),
        ("aX<think>b", ["X"], False, "a"),
        ("a<think>bXc</think>dXe", ["X"], False, "a<think>bXc</think>d"),
        ("bXc</think>dXe", ["X"], True, "bXc</think>d"),
        ("bXc", ["X"], True, "bXc"),
        ("bXc</think>d<think>X</think>eX", ["X"], True, "bXc</think>d<think>X</think>e"),
        ("<think>X", ["X"], False, "<think>X"),
        ("a</think>bX", ["X"], False, "a</think>b"),  # a tag that closes nothing
        ("</think>>\n", [">\n", "k>>"], True, "</think>"),  # none begins in a tag
        ("<think>\n</think>", [">\n", ">"], False, "<think>\n</think>"),
        ("a<b<think>", ["<b", "<th"], False, "a"),
        ("a<think>", ["a<th"], False, ""),
        ("anything</think>", [], True, "anything</think>"),
    ],
)
def test_a_text_ends_before_the_first_stop_text_outside_its_thoughts(text, stops, is_open, kept):
    assert thoughts.before_stop(text, stops, is_open=is_open) == kept
