"""Rewards that ask no model: do the first sentences agree in their numbers, or else in their words? Or no judge."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal

from thinkmid.rollout.verdict import Verdict
from thinkmid.types import Prompt, Sample, Tally

NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?!\w)")
SENTENCE_END = re.compile(r"(?<=[.!?])\s|\n")


@dataclass(frozen=True)
class RuleJudge:
    """The judge of kind "match"; see match()."""

    overlap: float = 0.6  # word F1 from which sentences without numbers agree

    def __call__(self, candidate: str, reference: str) -> Verdict:
        return match(candidate, reference, self.overlap)

    def row(self) -> Tally:
        return {}

    def close(self) -> None:
        pass


class Unjudged:
    """The reward of a run without a judge: 0 for each sample, to which scores of the text itself are added."""

    def __call__(self, prompt: Prompt, sample: Sample) -> Verdict:
        return Verdict(0, "")

    def finish(self, step: int) -> Tally:
        return {}

    def close(self) -> None:
        pass


def match(candidate: str, reference: str, overlap: float = 0.6) -> Verdict:
    """1 if the first sentences agree in their numbers or, where neither has one, in `overlap` of their words (F1)."""
    ours, theirs = first_sentence(candidate), first_sentence(reference)
    if not ours:
        return Verdict(0, "empty")
    numbers, wanted = numbers_of(ours), numbers_of(theirs)
    if numbers or wanted:
        found, expected = (" ".join(map(str, each)) or "no number" for each in (numbers, wanted))
        return Verdict(int(numbers == wanted), f"numbers: {found} for {expected}")
    a, b = (Counter(re.findall(r"\w+", sentence.casefold())) for sentence in (ours, theirs))
    common = (a & b).total()
    score = 2 * common / (a.total() + b.total()) if common else 0.0
    return Verdict(int(score >= overlap), f"word overlap {score:.2f}")


def first_sentence(text: str) -> str:
    return SENTENCE_END.split(text.strip(), maxsplit=1)[0]


def numbers_of(text: str) -> list[Decimal]:
    """The numbers in the first sentence of a text, in their order."""
    return [Decimal(n.replace(",", "")).normalize() for n in NUMBER.findall(first_sentence(text))]
