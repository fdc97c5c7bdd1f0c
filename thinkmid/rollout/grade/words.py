"""Answers that are text: which ones are, and when two of them are the same."""

from __future__ import annotations

import re
import unicodedata

from thinkmid.rollout.grade.answers import normal
from thinkmid.rollout.grade.numbers import number

SET = re.compile(r"[\s${]*\\(?:\{\s*\\)?(?:text[a-z]*|emph|[mh]box)\s*\{")  # as text, at its beginning
TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
ACCENT = re.compile(r"\\(['\"^])\s*\{?([A-Za-z])\}?")
COMBINING = {"'": "\u0301", '"': "\u0308", "^": "\u0302"}
QUOTES = str.maketrans("‘’ʼ′“”„。", "''''\"\"\".")

L = r"[^\W\d_]"  # a letter
# letters, digits and punctuation; a hyphen or a slash between words only, for elsewhere they are operators
PROSE = re.compile(rf"(?:[^\W_]|[\s.,;:'\"()%&#、]|(?<={L}{L})\s?[-/]\s?(?={L}{L})|(?<=\w)-(?={L}{{3}}))+")
# names that start an expression: "sin x"; those without a vowel are no words anyway
FUNCTIONS = frozenset(
    re.findall(r"\w+", "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log exp lim mod det arg deg dim")
)
# other pairs of letters are products: ab, at, pq
SHORT = frozenset(re.findall(r"\w+", "no on up in if go he we us ok"))
SHAPE = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[A-Z][a-z]+[A-Z][a-z]{2,}")  # even, YES, McDonald; not nRT, NaCl
VOWEL = re.compile(r"[aeiou]|[hklr]y")
VERB = re.compile(r"\b(?:is|are|not)\b")
ALPHABET = "abcdefghijklmnopqrstuvwxyz"

TIME = re.compile(
    r"\b(?:(?P<hour>0?[1-9]|1[0-2])(?: ?: ?(?P<minute>[0-5]\d))? ?(?:(?P<half>[ap]m)|o'? ?clock)"
    r"|(?:12(?::00)? ?)?(?P<name>noon|midnight))\b"
)
CLOCK = re.compile(r"(\d{1,2})(?: ?: ?([0-5]\d))?([ap]m)?")
MONTH = (
    "jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sep(?:t|tember)?|oct(?:ober)?"
    "|nov(?:ember)?|dec(?:ember)?"
)
DATE = re.compile(
    rf"\b(?:(?P<day>\d{{1,2}})(?:st|nd|rd|th)?(?: of)? (?P<month>{MONTH})"
    rf"|(?P<month2>{MONTH}) (?:the )?(?P<day2>\d{{1,2}})(?:st|nd|rd|th)?)\b(?:,? (?P<year>\d{{4}})\b)?"
)
DIGITS_DATE = re.compile(r"\d{4}-\d\d-\d\d|\d{1,2}/\d{1,2}/\d{4}")

PHRASES = [
    (re.compile(pattern), new)
    for pattern, new in [
        (r"^\s*\w+\s*=(?!.*=)", " "),  # x = even
        (r"\b([ap])\. ?m\b", r"\1m"),
        (r"(?<!\d)\.|\.(?!\d)", ""),  # St., U.S.A.
        (r"(?<=\d),(?=\d{3}(?!\d))", ""),
        (r"\s+", " "),
        (r"\bdoes not exist\b", "dne"),
        (r"\bno solutions\b", "no solution"),
    ]
]
SPELLED = dict(
    re.findall(
        r"(\w+) (\w+)",
        "zero 0 one 1 two 2 three 3 four 4 five 5 six 6 seven 7 eight 8 nine 9 ten 10 eleven 11 twelve 12 first 1st "
        "second 2nd third 3rd fourth 4th fifth 5th sixth 6th seventh 7th eighth 8th ninth 9th tenth 10th",
    )
)
TOKEN = re.compile(r"(?<!\w)(?<!\w )-|\d+(?:[.:/-]\d+)*\w*|\w+(?:'\w+)*|[^\w\s.,;:!?()\"'/-]")


def prose(answer: str) -> list[str] | None:
    """The items of an answer that is text, None of one that is a number or left to algebra. Text is

    - a time with "a.m.", "p.m.", "o'clock", "noon" or "midnight"; a day with its month; 2004-06-20, 6/20/2004;
    - what begins in \\text{} and has two letters side by side, other than "and" and "or";
    - letters, digits and punctuation with a word among them (is_word), unless \\text{} follows letters or digits that
      are not set as text and holds no "is", "are" or "not": 2k \\text{ cm} is algebra with a unit.

    An operator (x + 1, f(x), \\cup) or a number with a unit is no text.
    """
    text = plain(answer)
    low = spelled(text)
    if DIGITS_DATE.fullmatch(text) or (PROSE.fullmatch(text) and (TIME.search(low) or DATE.search(low))):
        return items(answer)
    begins, outside = SET.match(answer), re.sub(r"\\[a-z]+", "", TEXT.sub("", normal(answer)))
    if r"\text" in normal(answer) and re.search(r"\w", outside) and not (begins or VERB.search(low)):
        return None
    if not PROSE.fullmatch(text) or re.search(r"\w\(", text) or number(answer) is not None:
        return None
    words = [word for word in re.findall(r"\w+", text) if word.isalpha() and word.casefold() not in ("and", "or")]
    if any(map(is_word, words)) or (begins and any(len(word) > 1 for word in words)):
        return items(answer) or None
    return None


def is_word(run: str) -> bool:
    """A run of letters that is no variable, function or product of variables.

    A product has no vowel (xy, pqr, mgh), or its letters follow each other in the alphabet (ab, abc, mno, ABCD) or are
    some of a, b, c, d, x, y, z in this order (abd, axy). Of two letters, only SHORT and roman numerals are words; of
    Greek letters, none.
    """
    if not run.isascii():
        return not re.search(r"[\u0370-\u03ff]", run) and (len(run) > 1 or run >= "\u3000")
    if re.fullmatch(r"[A-Z][a-z]{2,}|[IVX]{2,}", run):
        return True
    low = run.casefold()
    if not SHAPE.fullmatch(run) or run in FUNCTIONS or len(low) < 3 or low in ALPHABET:
        return low in SHORT
    return bool(VOWEL.search(low)) and not re.fullmatch("a?b?c?d?x?y?z?", low)


def same_text(answer: list[str], gold: list[str]) -> bool:
    """Items in any order, as those of a list of numbers, or the same words with other punctuation.

    Of a time, either may leave out the half of the day, as an answer may leave out a unit: 4:30 is 4:30 p.m., and so is
    16:30, but not 4:30 a.m.
    """
    if sorted(answer) == sorted(gold) or " ".join(answer) == " ".join(gold):
        return True
    ours, theirs = (clock(x[0]) if len(x) == 1 else None for x in (answer, gold))
    if ours is None or theirs is None:
        return False
    return ours[:2] == theirs[:2] and (ours[2] == theirs[2] or "" in (ours[2], theirs[2]))


def items(answer: str) -> list[str]:
    """What commas and "and" separate, each without case, punctuation and first article, in one spelling of times,
    dates and small numbers."""
    text = DATE.sub(one_date, TIME.sub(one_time, spelled(plain(answer))))
    parts = [" ".join(SPELLED.get(t, t) for t in TOKEN.findall(p)) for p in re.split(r"[,;、&]|\band\b", text)]
    return [re.sub(r"^(?:the|an?) (?!or\b)(?=\w\w)", "", part) for part in parts if part]


def plain(answer: str) -> str:
    """A normal answer without \\text{} and set braces, in the characters of a keyboard where there are such."""
    text = normal(answer)
    for _ in range(3):  # in one another
        text = TEXT.sub(r"\1", text)
    text = ACCENT.sub(accented, re.sub(r"\\(?=[&#])|\\[{}]", "", text))
    return unicodedata.normalize("NFKC", text).translate(QUOTES).strip()


def spelled(text: str) -> str:
    """Without case; what has two spellings, in one."""
    text = re.sub(r"\+?\s*\\infty(?![a-z])", " infinity ", text)
    text = re.sub(r"\\([a-z]+)", r" \1 ", text).casefold()  # \theta is theta, \Theta is not
    for pattern, new in PHRASES:
        text = pattern.sub(new, text)
    return text.strip()


def accented(match: re.Match[str]) -> str:
    return f"{match[2]}{COMBINING[match[1]]}"


def one_time(match: re.Match[str]) -> str:
    if match["name"]:
        return "12:00pm" if match["name"] == "noon" else "12:00am"
    return f"{int(match['hour'])}:{match['minute'] or '00'}{match['half'] or ''}"


def one_date(match: re.Match[str]) -> str:
    day, month = match["day"] or match["day2"], match["month"] or match["month2"]
    return f"{month[:3]} {int(day)} {match['year'] or ''}"


def clock(text: str) -> tuple[int, str, str] | None:
    """Hour of twelve, minute, and half of the day or "", of a time by either clock."""
    match = CLOCK.fullmatch(text)
    if not match or int(match[1]) > 23 or (not 1 <= int(match[1]) <= 12 and not match[2]):
        return None
    hour = int(match[1])
    half = "pm" if hour > 12 else "am" if hour == 0 else match[3] or ""
    return hour % 12, match[2] or "00", half
