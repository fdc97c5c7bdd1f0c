"""A judge by rule: do the first sentences agree in their numbers, or else in their words?"""

from __future__ import annotations

import re
from collections import Counter
from decimal import Decimal

from thinkmid.rollout.judge.model import Pending, Verdict

NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?!\w)")
SENTENCE_END = re.compile(r"(?<=[.!?])\s|\n")


def match(candidate: str, reference: str, *, overlap: float = 0.6) -> Pending:
    """By rule: first sentences agree in their numbers; where neither has one, in at least `overlap` of words (F1)."""
    verdict = _match(candidate, reference, overlap)
    return lambda: verdict


def _match(candidate, reference, overlap):
    ours, theirs = first_sentence(candidate), first_sentence(reference)
    if not ours:
        return Verdict(0, "empty")
    numbers, wanted = _numbers(ours), _numbers(theirs)
    if numbers or wanted:
        say = " ".join(map(str, numbers)) or "no number"
        want = " ".join(map(str, wanted)) or "no number"
        return Verdict(int(numbers == wanted), f"numbers: {say} for {want}")
    score = _f1(_words(ours), _words(theirs))
    return Verdict(int(score >= overlap), f"word overlap {score:.2f}")


def first_sentence(text: str) -> str:
    return SENTENCE_END.split(text.strip(), maxsplit=1)[0]


def numbers_of(text: str) -> list[Decimal]:
    """Of its first sentence."""
    return _numbers(first_sentence(text))


def _numbers(text):
    return [Decimal(n.replace(",", "")).normalize() for n in NUMBER.findall(text)]


def _words(text):
    return Counter(re.findall(r"\w+", text.casefold()))


def _f1(a: Counter, b: Counter) -> float:
    common = (a & b).total()
    return 2 * common / (a.total() + b.total()) if common else 0.0
