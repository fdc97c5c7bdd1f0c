"""Rule-based verdicts on answers, and filters that reject answers before they reach math-verify."""

from __future__ import annotations

import re

from thinkmid.rollout.grade.answers import boxes, normal, squeezed, without_text
from thinkmid.rollout.grade.lexicon import UNITS
from thinkmid.rollout.grade.limits import refused
from thinkmid.rollout.grade.numbers import LITERAL, Number, number
from thinkmid.rollout.grade.words import items, prose, same_text
from thinkmid.rollout.verdict import Verdict

LONGEST = 512  # characters of an answer; a gold answer may be longer, and so may an answer to it
ROUNDED = 1e-6  # a decimal this near to a fraction may be its rounding

CHOICE = re.compile(
    r"(?:(?:option|choice|answer)\s*)?(?:\(\s*([A-Ja-j])\s*\)|([A-Ja-j])(?![\w^=+*/(-]))(.*)", re.DOTALL
)
SEVERAL = re.compile(r"\([A-Ja-j]\)|^\s*(?:,|/|&|or\b|and\b|\\)|\b(?:or|and) [A-J]\b")
BASED = re.compile(r"(\w+)_\{?(\d+)\}?")
# looks like no literal, and yet may be a number that is worked out: repeating decimals, units in several parts
PERHAPS = re.compile(r"\\(?:overline|bar|dot)\b|\\[lcd]?dots|\.\.\.|\\text|\d\s+[A-Za-z]\b(?!\s*[\d\\(])")

# what an expression leaves to be worked out; an answer may contain it where the gold answer does
UNFINISHED = {
    name: re.compile(pattern)
    for name, pattern in {
        "sum": r"\\sum(?![A-Za-z])|\bsum\b",
        "product": r"\\prod(?![A-Za-z])|\bprod\b",
        "integral": r"\\i*int(?:op)?(?![A-Za-z])|\\oint|\bint(?:egral|egrate)?\b",
        "limit": r"\\lim|\blim(?:it)?\b",
        "factorial": r"!(?!=)|\bfactorial\b",
        "binomial": r"\\[dt]?binom|\\choose|\bchoose\b|\\genfrac|(?<![A-Za-z])[CP]\s*\(\s*\d+\s*,"
        r"|\d\s*[CP]\s*\d|[CP]_\{?\d|\}_\{?\d+\}?\s*[CP]",
        "divisor": r"\\(?:gcd|lcm)|\b(?:gcd|lcm|hcf|gcf)\b",
        "extremum": r"\\(?:max|min|sup|inf)(?![A-Za-z])|\b(?:max|min)\b",
        "rounding": r"\\[lr]?(?:floor|ceil)|\b(?:floor|ceil|ceiling|round)\b",
        "remainder": r"\\[bp]?mod(?![A-Za-z])|\bmod(?:ulo)?\b|\\equiv|(?<=\w)\s+%\s+\w",
        "derivative": r"\\frac\s*\{\s*(?:d|\\partial|\\text\{d\})|\\partial|\\nabla",
        "determinant": r"\\det|[vV]matrix|\bdet\b",
        "trigonometry": r"\\?(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?(?![a-z])",
        "logarithm": r"\\(?:log|ln|lg)(?![A-Za-z])|\b(?:log|ln)\b",
        "root": r"\\sqrt|\bsqrt\b|\^\s*[{(]+\s*-?\s*(?:\d+\s*/\s*\d|\\frac|0?\.\d)",
        "function": r"\\(?:phi|varphi|sigma|tau|Gamma|zeta)\s*\(\s*\d",
        "count": r"\\#|\|\s*\\\{",
    }.items()
}


def gold_answer(gold: str) -> str:
    """A gold answer alone: of a worked solution, what follows its last "####" or stands in its last box."""
    if "####" in gold:
        return gold.rpartition("####")[2].strip()
    return ", ".join(boxes(gold)) or gold.strip()


def canonical(answer: str) -> str:
    """One string for the spellings of an answer that rules know to be the same: what votes are counted by."""
    words = prose(answer)
    if words is None and (given := number(answer)):
        return f"{given.value}{'%' * given.percent}"
    choice = CHOICE.fullmatch(without_text(answer))
    if choice and (choice[1] or not choice[3].strip(" .")) and not SEVERAL.search(choice[3]):
        return (choice[1] or choice[2]).upper()
    return squeezed(answer) if words is None else ", ".join(sorted(words))


def decide(answer: str | None, gold: str, question: str = "") -> Verdict | None:
    """The verdict on an extracted answer if no algebra is needed to know it, else None.

    An answer must be worked out: an expression that leaves more to do than the gold answer does is 0, and so is
    one that repeats the question's own, where the question is known.
    """
    if answer is None or not answer.strip():
        return Verdict(0, "no answer")
    gold = gold_answer(gold)
    if squeezed(answer) == squeezed(gold):
        return Verdict(1, "identical")
    if len(answer) > max(LONGEST, 2 * len(gold)):
        return Verdict(0, "refused: too long")
    for rule in (by_choice, by_words, by_number, by_base):
        verdict = rule(answer, gold)
        if verdict is not None:
            break
    if (verdict is None or verdict.value) and restates(answer, question):
        return Verdict(0, "restates the question")
    return verdict or unworkable(answer, gold)


def unworkable(answer: str, gold: str) -> Verdict | None:
    """What is not given to algebra: 0 for an answer that is not worked out or that is refused."""
    left = unfinished(answer) - unfinished(gold)
    if left:
        return Verdict(0, f"not worked out ({min(left)})")
    if reason := refused(normal(gold)):  # other spellings of it cannot be compared
        return Verdict(None, f"gold answer refused: {reason}")
    if reason := refused(normal(answer)):
        return Verdict(0, f"refused: {reason}")
    return None


def by_choice(answer: str, gold: str) -> Verdict | None:
    """Letters of a multiple choice."""
    wanted, given = (CHOICE.fullmatch(without_text(text)) for text in (gold, answer))
    if not wanted or wanted[3].strip(" .") or not (wanted[1] or wanted[2]).isupper():
        return None
    if (
        not given
        or SEVERAL.search(given[3])
        or (given[2] and not re.fullmatch(r"\s*(?:[.:)].*)?", given[3], re.DOTALL))
    ):
        return None
    letter, right = (given[1] or given[2]).upper(), wanted[1] or wanted[2]
    return Verdict(int(letter == right), f"choice {letter} for {right}")


def by_number(answer: str, gold: str) -> Verdict | None:
    """A gold answer that is a number spelled out wants one."""
    wanted, given = number(gold), number(answer)
    if wanted is None:
        return None
    if given is None:
        starts = LITERAL.match(normal(answer))
        return None if starts and PERHAPS.search(normal(answer)) else Verdict(0, "not a number worked out")
    if UNITS.get(given.unit, "") != UNITS.get(wanted.unit, "") and given.unit in UNITS and wanted.unit in UNITS:
        return Verdict(0, f"{given.unit} for {wanted.unit}")
    if not same(given, wanted):
        return None if rounds(given, wanted) else Verdict(0, "another number")
    if given.spelling == "quotient" != wanted.spelling:
        return Verdict(0, "not worked out (division)")
    return Verdict(1, "number")


def same(a: Number, b: Number) -> bool:
    """Equal. 25% is the answer 25 to "what per cent" and 0.25 as well, but 400% is no way to write 4."""
    if a.percent == b.percent:
        return a.value == b.value
    percent, plain = (a, b) if a.percent else (b, a)
    return percent.value == plain.value or (percent.value == 100 * plain.value and plain.value.denominator > 1)


def rounds(a: Number, b: Number) -> bool:
    """One is a decimal that may be the other, a fraction, rounded."""
    return {"decimal", "fraction"} == {a.spelling, b.spelling} and abs(a.value - b.value) <= ROUNDED


def by_base(answer: str, gold: str) -> Verdict | None:
    """Digits in a base that the gold answer names; an answer may leave the base to the question."""
    wanted, given = (BASED.fullmatch(re.sub(r"\\text\s*\{(\w*)\}|[\s()]", r"\1", normal(t))) for t in (gold, answer))
    if not wanted or not wanted[1][0].isdigit():
        return None
    digits, base = (given[1], given[2]) if given else (squeezed(answer), wanted[2])
    if not digits.isalnum():
        return None
    return Verdict(int((digits, base) == (wanted[1], wanted[2])), "digits in a base")


def by_words(answer: str, gold: str) -> Verdict | None:
    """A gold answer that is text, by words.prose, wants the same text: there is always a verdict."""
    wanted = prose(gold)
    if wanted is None:
        return None
    return Verdict(1, "words") if same_text(items(answer), wanted) else Verdict(0, "other words")


def unfinished(answer: str) -> set[str]:
    """Names of what an answer leaves to be worked out."""
    text = normal(answer)
    return {name for name, pattern in UNFINISHED.items() if pattern.search(text)}


def restates(answer: str, question: str) -> bool:
    """An expression, not a mere number or name, that stands in the question as it is; options may stand there too."""
    ours = squeezed(answer)
    if (
        not question
        or reduced(answer)
        or prose(answer) is not None
        or len(ours) < 3
        or not re.search(r"[\^*/+!]|\\frac|\\cdot|\\times|\w-|\w\(", ours)
    ):
        return False
    return bool(re.search(rf"(?<![\d^+*/-]){re.escape(ours)}(?![\d^+*/-])", squeezed(question)))


def reduced(answer: str) -> bool:
    """A number written as simply as it can be."""
    given = number(answer)
    if given is None or given.spelling != "fraction":
        return given is not None
    return re.findall(r"\d+", normal(answer)) == re.findall(r"\d+", f"{given.value}")
