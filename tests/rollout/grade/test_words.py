"""Gold answers that are text get 1 or 0 by their words; those of algebra go to algebra as before."""

import re

import pytest
from golds import GOLDS, bare
from hypothesis import given
from hypothesis import strategies as st

from thinkmid.rollout.grade.config import VerifyConfig
from thinkmid.rollout.grade.grader import MathGrader
from thinkmid.rollout.grade.rules import canonical, decide
from thinkmid.rollout.grade.words import prose

# answers, and the gold answer that each of them is
RIGHT = [
    # words, without case, however they are set
    ("Even", "even"), ("YES", "yes"), ("True", "true"), ("North", "north"), ("NORTH", "north"), ("Draw", "draw"),
    ("Isosceles", "isosceles"), ("no", "No"), (r"\text{No}", "no"), (r"\mathrm{even}", "Even"), ("Sky", "sky"),
    (r"\textbf{Odd}", r"\mathrm{odd}"), (r"\mbox{Odd}", "odd"), (r"\texttt{true}", r"\text{True}"),
    (r"\textbf{\text{even}}", r"\textsf{Even}"), ("even.", "Even"), ("Yes!", "yes"), ("“Yes”", "yes"), ("(yes)", "Yes"),
    (r"\text{Even}.", r"$\text{even}$"), ("x = even", "Even"), (r"\text{ Even }", "even"), ("mcdonald", "McDonald"),
    # articles, hyphens, apostrophes, Unicode
    ("the cat", "cat"), ("cat", r"\text{the cat}"), ("An ellipse", "ellipse"), ("Right angled", r"\text{right-angled}"),
    ("Euler’s line", "Euler's line"), ("JOSÉ", "José"), ("Jose\u0301", "José"), (r"\text{Poincar\'e}", "Poincaré"),
    ("ＹＥＳ", "yes"), ("STRASSE", "straße"), ("Да", "да"), ("偶数", r"\text{偶数}"), ("x-Axis", "x-axis"),
    # several words, lists
    ("Right Triangle", "right triangle"), ("Blue,red", "red, blue"), ("red and blue", "Red, Blue"),
    ("BLUE", r"\textbf{blue}"),
    (r"\{\text{blue}, \text{Red}\}", r"\{\text{red}, \text{blue}\}"), ("Ann & Tom", r"\text{Tom \& Ann}"),
    ("room 12", "Room 12"), (r"\text{room 12}", r"\text{Room } 12"), ("i and iii only", r"\text{I and III only}"),
    ("plan B", r"\text{Plan } B"), ("5 feet and 6 inches", "5 feet, 6 inches"), ("N is even", "n is even"),
    # words of mathematics
    ("No Solution", "no solution"), ("no solutions", r"\text{No solution}"), ("dne", "DNE"), ("None", "none"),
    ("does not exist", "DNE"), ("Undefined", "undefined"), (r"\infty", "infinity"), (r"+\infty", "Infinity"),
    ("Infinitely many", r"\text{infinitely many}"), ("All Real Numbers", "all real numbers"), (r"\theta", "theta"),
    ("1st", "first"), (r"\text{Third}", "third"), ("3", r"\text{three}"), ("iv", "IV"), ("Seconds", "seconds"),
    # times
    ("4:30 PM", r"\text{4:30 p.m.}"), ("4:30pm", r"4:30 \text{ p.m.}"), ("4:30", r"4:30\text{ p.m.}"),
    ("16:30", "4:30 p.m."), ("04:30 P. M", "4:30 p.m."), ("10:00 AM", r"10 \text{ a.m.}"), ("10", r"10 \text{ a.m.}"),
    ("12 p.m.", "noon"), ("Noon", "12 noon"), ("midnight", "12:00 a.m."), ("5:00", "5 o'clock"),
    ("5 O’Clock", "5:00 pm"),
    (r"\text{Friday, 4:30 PM}", r"\text{4:30 p.m., Friday}"),
    # dates
    ("20 June", r"\text{June 20}"), ("june 20th", "June 20"), ("the 20th of June", "20 June"), ("Jan. 5", "January 5"),
    ("June 20, 2004", "20 June 2004"), ("Monday June 20", "Monday, June 20"), ("friday", r"\text{Friday}"),
    (r"\text{6/20/2004}", "6/20/2004"),
]  # fmt: skip

# answers, and a gold answer that they are not
WRONG = [
    ("no", "on"), ("on", "no"), ("act", "cat"), ("ACT", "CAT"), ("male", "meal"), ("left", "felt"), ("Left", "FELT"),
    ("true", "false"), ("south", "north"), ("stop", "post"), (r"\text{on}", r"\mathrm{no}"), ("odd", r"\mathbf{even}"),
    ("silent", "listen"), ("e \\cdot v \\cdot e \\cdot n", "even"), ("evens", "even"), ("not even", "even"),
    ("x", "even"),
    ("2", "even"), ("cats", "the cat"), ("Jose", "José"), ("Bloe", "Zoë"), ("non-zero", "zero"), ("奇数", "偶数"),
    ("red, green", "red, blue"), ("red", "red, blue"), ("red, blue, blue", "red, blue"), ("der, blue", "red, blue"),
    ("red or blue", "red and blue"), ("red cat, blue dog", "red dog, blue cat"), ("Room 21", "Room 12"),
    ("12", "Room 12"),
    ("Plan A", r"\text{Plan } B"), (r"n \text{ is odd}", r"n \text{ is even}"), ("no", "no solution"),
    (r"\emptyset", "DNE"),
    (r"\Theta", "theta"), ("undefined", "DNE"), (r"-\infty", "infinity"), (r"\infty", "negative infinity"),
    ("infinitely many", "infinity"), ("VI", "IV"), ("XI", "IX"), ("II", "III"), ("3rd", "second"), ("4", "three"),
    ("meters", "feet"), ("5 feet 7 inches", "5 feet 6 inches"), ("ton", "not"), ("yes, no", "yes"),
    ("4:30 a.m.", r"4:30 \text{ p.m.}"), ("04:30 am", r"\text{4:30 p.m.}"), ("16:30", "4:30 a.m."),
    ("4:31", "4:30 p.m."),
    ("10 a.m.", r"10 \text{ p.m.}"), ("45", "9 p.m."), ("21", "9 p.m."), ("4", "4:30 p.m."), ("midnight", "12 noon"),
    ("12 midnight", "12 noon"), ("6 o'clock", "5 o'clock"),
    ("20 July", "20 June"), ("21 June", "June 20"), ("20", "20 June"), ("June 20, 2005", "June 20, 2004"),
    ("Monday", r"\text{Friday}"), ("1978", "2004-06-20"), ("3/10/2004", "6/20/2004"), ("Alice", "Celia"),
]  # fmt: skip

# golds of the kinds that competition problems have
TEXTS = [
    r"\text{4:30 p.m.}", r"4:30 \text{ p.m.}", r"10\!:\!08 \text{ a.m.}", r"\text{noon}", r"3 \text{ o'clock}",
    r"\text{June 20}", r"\text{Friday, May } 13", r"\text{Saturday}", r"\text{Wednesday}", r"\text{Evelyn}",
    r"\text{Briana and Carlos}", r"\text{D'Angelo}", r"\text{Mr. O'Neil}", r"\text{neither}", r"\text{odd function}",
    r"\text{hyperbola}", r"\text{two lines}", r"\text{acute and isosceles}", r"\text{Yes}", r"\text{no real roots}",
    r"\text{south-west}", r"\text{Quadrant IV}", r"\mathrm{true}", r"\textbf{FALSE}", r"\mbox{parallelogram}",
    r"\text{Row 3, seat 7}", r"\text{green}, \text{blue}, \text{red}", r"\text{Stage } 4", r"\text{at least one}",
    r"\text{the empty set}", r"\text{heptagon (7 sides)}", r"\text{Line } AB",
]  # fmt: skip

# answers and gold answers that are no text, with the verdict of algebra or of numbers
ALGEBRA = [
    ("ba", "ab", 1), ("yx", "xy", 1), ("zyx", "xyz", 1), ("cab", "abc", 1), ("qp", "pq", 1), ("BA", "AB", 1),
    ("CBA", "ABC", 1), ("DCBA", "ABCD", 1),
    ("EDCBA", "ABCDE", 1), ("rqp", "pqr", 1), ("cxa", "acx", 1), ("yax", "axy", 1), ("hgm", "mgh", 1),
    ("TRn", "nRT", 1), ("BA", r"\mathrm{AB}", 1), ("X", "x", 1), ("y", "x", 0), ("act", "x", 0), ("cat", "abc", 0),
    ("yes", "x+1", 0), ("even", "2k", 0), ("c+ba", "ab+c", 1), (r"\text{no}", "0", 0), ("5x", r"5x \text{ inches}", 1),
    ("5y", r"5x \text{ inches}", 0), ("5, 7", r"\text{7 and 5}", 1), ("4, 3", "3 or 4", 1),
    ("y, x", r"x \text{ and } y", 1),
    ("C, A", r"\text{A, C}", 1), ("infinity", r"\infty", 1), ("-infinity", r"-\infty", 1), ("even", r"\infty", 0),
    ("cos x", "sin x", 0), (r"\cos x", r"\sin x", 0), (r"2\ln 2", r"\ln 4", 1), ("b", "B", 1),
    ("(A)", r"\text{(B)}", 0),
    ("H_{2}O", "H_2O", 1), ("CO_2", "H_2O", 0), ("4:2", "2:1", 1), ("2pm", "2 p m", 1),
    ("18 dollars", "18", 1), ("3", "3rd", 1),
    ("4 hours", r"4 \text{ minutes}", 0), (r"x \cdot \sin(\theta)", r"\sin(\theta) \cdot x", 1),
]  # fmt: skip


@pytest.fixture(scope="module")
def grader():
    grader = MathGrader(VerifyConfig(workers=1, cpu_s=5))
    yield grader
    grader.close()


@pytest.mark.parametrize(("pairs", "value"), [(RIGHT, 1), (WRONG, 0)])
def test_text_is_compared_word_by_word_without_algebra(pairs, value):
    said = [(answer, gold, decide(answer, gold)) for answer, gold in pairs]
    assert not [one for one in said if one[2] is None or one[2].value != value]


@given(st.text("aeinorst", min_size=3, max_size=8), st.randoms(use_true_random=False))
def test_an_anagram_is_another_word_and_capitals_are_none(word, random):
    anagram = "".join(random.sample(word, len(word)))
    if prose(word):
        assert decide(anagram, word).value == int(anagram == word)
        assert [decide(same, word).value for same in (word.upper(), word.title(), rf"\text{{{word}}}")] == [1, 1, 1]


def test_what_is_no_text_is_graded_as_ever(grader):
    said = [(answer, gold, grader(rf"\boxed{{{answer}}}", gold), value) for answer, gold, value in ALGEBRA]
    assert not [(answer, gold) for answer, gold, pending, value in said if pending.result().value != value]
    assert not [gold for _, gold, _ in ALGEBRA if prose(gold) is not None]


@pytest.mark.parametrize("gold", TEXTS)
def test_a_gold_answer_that_is_text_always_has_a_verdict(gold):
    capitals = "".join(part if part[0] == "\\" else part.upper() for part in re.findall(r"\\\w+|[^\\]+|\\", gold))
    for answer in (gold, capitals, gold.replace("{", "{ ")):
        assert decide(answer, gold).value == 1
    others = ["4", "x+1", r"\frac{1}{2}", r"\sin x", r"\text{", "9^{9^{9}}", r"\sum_k k", "?", "\x00", "(A)"]
    for answer in TEXTS + others:
        if answer != gold and {answer, gold} != set(TEXTS[:2]):
            assert decide(answer, gold).value == 0, answer


def test_a_gold_answer_of_the_benchmarks_is_text_only_where_it_is_words():
    texts = {gold for golds in GOLDS.values() for gold in map(bare, golds) if prose(gold) is not None}
    assert texts == {r"\text{Evelyn}", r"\text{even}"}


def test_words_that_stand_in_the_question_are_an_answer():
    assert decide("Right-angled", r"\text{right-angled}", "Is it Right-angled or acute?").value == 1
    assert decide("6/20/2004", "20 June 2004", "Which is later, 6/20/2004 or 6/19/2004?").value == 0


@pytest.mark.parametrize(
    "spellings",
    [
        ["even", "Even", r"\text{EVEN}", "even."],
        ["4:30 p.m.", "4:30PM"],
        ["20 June", "June 20th"],
        ["1 red, 2", "2 and one red"],
    ],
)
def test_votes_for_one_text_are_counted_together(spellings):
    assert len({canonical(spelling) for spelling in spellings}) == 1
    assert canonical("no") != canonical("on")
    assert canonical("10 a.m.") != canonical("10 p.m.")
