"""Verdicts on continuations: 1, 0 or failed, each with its reason."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal

from thinkmid.text import Text
from thinkmid.types import Group

NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?!\w)")
SENTENCE_END = re.compile(r"(?<=[.!?])\s|\n")


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one continuation."""

    value: int | None  # 1, 0, or None: the judge failed, which is never a 0
    why: str

    @property
    def reward(self) -> float:
        return float("nan") if self.value is None else float(self.value)


# (candidate, reference) pairs in, verdicts in the same order out; a judge sees neither prefix nor thought
Judge = Callable[[list[tuple[str, str]]], list[Verdict]]


def judge_groups(groups: list[Group], text: Text, judge: Judge, max_suffix: int) -> list[list[Verdict]]:
    """Verdicts (P, G). Both texts are cut to max_suffix tokens; not exactly one closing tag is 0 unasked."""
    verdicts_P_G: list[list[Verdict | None]] = [[None] * len(g.samples) for g in groups]
    asked, pairs = [], []
    for p, group in enumerate(groups):
        reference = text.decode(text.encode(group.prompt.meta["reference"])[:max_suffix])
        for g, sample in enumerate(group.samples):
            parts = text.split_at_close(sample.tokens)
            if parts.num_tags != 1:
                verdicts_P_G[p][g] = Verdict(0, "unclosed" if parts.num_tags == 0 else "closed more than once")
            else:
                asked.append((p, g))
                cut = text.split_at_close(sample.tokens[: parts.num_think + max_suffix])
                pairs.append((cut.suffix, reference))
    for (p, g), verdict in zip(asked, judge(pairs) if pairs else [], strict=True):
        verdicts_P_G[p][g] = verdict
    return verdicts_P_G


def match(pairs: list[tuple[str, str]], *, overlap: float = 0.6) -> list[Verdict]:
    """By rule: first sentences agree in their numbers; where neither has one, in at least `overlap` of words (F1)."""
    return [_match(candidate, reference, overlap) for candidate, reference in pairs]


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


def _numbers(text):
    return [Decimal(n.replace(",", "")).normalize() for n in NUMBER.findall(text)]


def _words(text):
    return Counter(re.findall(r"\w+", text.casefold()))


def _f1(a: Counter, b: Counter) -> float:
    common = (a & b).total()
    return 2 * common / (a.total() + b.total()) if common else 0.0
