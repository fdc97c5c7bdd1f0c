"""Grades by the numbers of the first sentence, for answers without boxes and answer lines."""

from __future__ import annotations

from thinkmid.rollout.grade.answers import after_thought
from thinkmid.rollout.judge.rule import match, numbers_of
from thinkmid.rollout.verdict import Verdict
from thinkmid.types import Tally


class SentenceGrader:
    """Compares the first sentence after the last thought with the gold answer's, see rule.match().

    A thought that never closes has no answer.
    """

    def __call__(self, text: str, gold: str, question: str = "", marked: bool = False) -> Verdict:
        return match(after_thought(text) or "", gold)

    def answer(self, text: str, marked: bool = False) -> str | None:
        """The numbers, which may vote; None if there are none."""
        return " ".join(map(str, numbers_of(after_thought(text) or ""))) or None

    def row(self) -> Tally:
        return {}

    def close(self) -> None:
        pass
