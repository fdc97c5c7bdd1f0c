import pytest

from thinkmid.rollout.judge.rule import match


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
    verdict = match(candidate, reference)
    assert verdict.value == value, verdict.why


def test_match_needs_the_stated_share_of_words():
    pair = ("red green blue", "red green white grey")  # 2 common of 3 and 4: F1 = 4/7
    assert [match(*pair, overlap=x).value for x in (0.57, 0.58)] == [1, 0]
