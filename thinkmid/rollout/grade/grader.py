"""Verdicts on answers: by rule where that is certain, else by algebra in processes that can be killed."""

from __future__ import annotations

from thinkmid.rollout.grade.answers import extract, normal
from thinkmid.rollout.grade.config import VerifyConfig
from thinkmid.rollout.grade.pool import Pool
from thinkmid.rollout.grade.rules import canonical, decide, gold_answer
from thinkmid.rollout.grade.sentence import SentenceGrader
from thinkmid.rollout.verdict import CACHE_SIZE, Pending, VerdictCache, digest
from thinkmid.types import Tally


class MathGrader:
    """Grades mathematics. For one thread.

    A verdict depends on text, gold answer and question alone, not on order, cache or number of workers.
    """

    def __init__(self, cfg: VerifyConfig):
        """Start it before the run is under way: a process of the pool needs a second to load."""
        self._cache = VerdictCache(CACHE_SIZE)
        self.pool = Pool(cfg)

    def __call__(self, text: str, gold: str, question: str = "", marked: bool = False) -> Pending:
        """The verdict on the answer that a whole text gives; `why` is "no answer" if it gives none.

        With the question known, an answer that only repeats an expression of it is 0. marked: the prompt ends in the
        words before an answer, as answers.ends_in_marker() finds.
        """
        answer = extract(text, marked) or ""
        verdict = decide(answer, gold, question)
        if verdict is not None:
            self._cache.counts["exact"] += verdict.value is not None
            self._cache.counts["failed"] += verdict.value is None
            return verdict
        pair = normal(answer), normal(gold_answer(gold))
        key = digest(*pair)
        return self._cache.get(key) or self._cache.add(key, self.pool.ask(*pair))

    def answer(self, text: str, marked: bool = False) -> str | None:
        """The answer that a text gives, in one spelling of those that rules know to be the same."""
        answer = extract(text, marked)
        return None if answer is None else canonical(answer)

    def row(self) -> Tally:
        """Counts of verdicts since the last call; mean of the seconds from asking for one to reading it."""
        counts = self._cache.take_counts()
        row: Tally = {f"verify_{name}": counts[name] for name in ("asked", "exact", "failed", "cached")}
        return row | {"verify_wait_s": (counts["wait_s"], counts["read"])}

    def close(self) -> None:
        self.pool.close()


# grader(text, gold, question, marked) is a future; votes are counted by grader.answer(text, marked); row(), close()
Grader = MathGrader | SentenceGrader


def make_grader(cfg: VerifyConfig) -> Grader:
    """The grader that a configuration names. UserError: what it needs is not installed."""
    return SentenceGrader() if cfg.kind == "first-sentence" else MathGrader(cfg)
