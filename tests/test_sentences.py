"""Where sentences end and where not, in texts in which | marks every end; the end of a text is none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkmid.sentences import ends

CASES = r"""
Mia has 12 apples.| Tom has 5.
Is it so?| Yes!| It is.
Dr. Smith came.| He left.
Mr. and Mrs. Jones met Prof. Lee.| They ate.
He met Gen. Grant, Sen. Warren and Rev. King.| They spoke.
I saw Lt. Col. Brown there.| Nobody else did.
We drove to St. Louis.| It rained.
He lives on Main St.| The house is red.
Mt. Everest is high.| Few climb it.
J. Smith and A. B. Jones wrote it.| We read it.
George W. Bush spoke.| Then he left.
J. R. R. Tolkien wrote books.| They sell.
It is Plan B.| The first one failed.
It was I.| Nobody else knew.
He came to the U.S. in May.| He stayed.
The U.S. Bank failed.| Others did not.
He came to the U.S.| He stayed.
Officials in Washington, D.C. and the U.K. agreed.| Others did not.
We met at 5 p.m. on Monday.| It was late.
We met at 5 p.m.| Then we left.
The train left at 9 a.m. Monday.| It was full.
Use a tool, e.g. this one.| It helps.
Use one, i.e. the best.| It helps.
Use a tool (e.g. Word) here.| It helps.
Compare cf. Smith (1990) here.| It helps.
Brown vs. Board was decided.| It mattered.
Apples, pears, etc. are fruit.| Beans are not.
He sold apples, pears, etc.| Then he left.
Smith et al. showed it.| Others agreed.
Acme Inc. makes tools.| They sell.
He works for Acme Inc.| He likes it.
Warner Bros. Pictures made it.| It sold.
Apple Co. Ltd. is big.| Others are small.
John Smith Jr. won.| His father lost.
Sammy Davis Jr. Boulevard is long.| We walked.
She has a Ph.D. in physics.| She teaches.
She has a Ph.D.| She teaches.
On Jan. 5 it snowed.| We stayed.
On Feb. 29, 2020 it rained.| We stayed.
It was Sept. Police came.
It snowed in Dec.| The lake froze.
See No. 5 on the list.| It is short.
He said no.| Five others agreed.
The answer is no.| Tom left.
See Fig. 2 and Eq. 3.| They differ.
See Vol. 2, pp. 3 to 5, and p. 7.| They differ.
He was born c. 1900.| He died young.
It costs approx. five dollars.| That is little.
Pi is 3.14 or so.| E is 2.7.
It costs $5.50.| That is little.
Version 2.0.1 is out.| Get it.
He is 6 ft. 2 in. tall.| She is not.
It weighs 5 lbs. or more.| We carried it.
The board is 5 ft.| The saw is long.
He came in.| Tom left.
1. Open the box.| Look.
2. Close it.| Go.
 a. First thing.| Look.
IV. Results are here.| Look.
Henry VIII.| The king died.
There were 12.| Then 5 more came.
"I left."| Then he came.
He said, "I left."| Then he came.
"Stop!" she cried.| He ran.
"Why?" he asked.| She left.
“Who are you?”| “I am Tom.”
(He left.)| Then she came.
He left (I think).| Then she came.
He read it [twice].| Then she came.
He was late ...| The bus had left.
Well... maybe he knew.| She did not.
He waited...| Nobody came.
He waited . . . and left.| She came.
He waited . . .| Then she came.
What?!| No way!| Yes.
Wait!!!| He is here.
Yahoo! said so.| It was wrong.
Visit www.example.com today.| It is free.
Mail tom@example.com now.| It is free.
See example.com.| It is free.
The file a.txt is there.| Read it.
Let x be in X.| Then f(x) = y.| So y is known.
Take s minus 5 to get t.| We see that t minus 2 is u.| Here u doubled makes v.
So t is 5.| take v halved to get w.
他来了。|她走了。|
你好！|你是谁？|我。|
他来了。\n|她走了。|
「行く。」|彼は言った。|
彼は来た。|そして帰った！|
他说：“好。”|她走了。|
He left.\n|She came.\n\n|They ate.
A title\n|A text.| More.
Dear Mr. Smith,\n|You won.
He came to the U.S.\n|She left.
Nos. 3 and 4 are free.| Take one.
Sgt. Pepper plays.| We listen.
Gov. Brown of Calif. spoke.| They left.
The case was Roe vs. Wade.| It mattered.
It is so, said St. Paul.| He knew.
It ended at 10:30.| We left.
Meet Messrs. Brown and Lee.| They came.
""".strip("\n").split("\n")


def marked(text, at):
    for end in reversed(at):
        text = f"{text[:end]}|{text[end:]}"
    return text.rstrip("|")


@pytest.mark.parametrize("case", [case.replace("\\n", "\n").rstrip("|") for case in CASES])
def test_a_sentence_ends_where_a_reader_ends_it(case):
    text = case.replace("|", "")
    assert marked(text, [end for end in ends(text) if text[:end].rstrip() != text.rstrip()]) == case


@pytest.mark.parametrize(
    "case",
    [
        "One; two: three.| Four",
        "At 10:30 he left.| Why",
        "Dr. Lee; Mr. Fox.| They",
        "One: two.\n| Three",
    ],
)
def test_clauses_end_at_colons_and_semicolons_too(case):
    text = case.replace("|", "")
    assert marked(text, list(ends(text))) == case
    assert marked(text, list(ends(text, clauses=True))) == case.replace("; ", ";| ").replace(": ", ":| ")


@given(st.text(alphabet="ab DrU.!?\"') \n。」:1", max_size=60), st.integers(0, 30), st.integers(0, 60))
def test_ends_lie_in_the_part_asked_for_and_increase(text, start, stop):
    found = list(ends(text, start, stop, clauses=True))
    assert found == sorted(set(found))
    assert all(start < end <= stop for end in found)
    assert set(ends(text, start, stop)) <= set(found)
    # what lies past the part decides whether its last stop is an end
    assert {end for end in ends(text, clauses=True) if end <= stop} <= set(ends(text, 0, stop, clauses=True))


def test_no_empty_line_ends_a_sentence_again():
    assert list(ends("\n\n a\n \n\nb.\n\n")) == [5, 12]
