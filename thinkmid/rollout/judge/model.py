"""A judge that asks a model whether two continuations match, and what it asks of that model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from thinkmid.rollout.judge.config import JudgeConfig
from thinkmid.rollout.judge.guard import decide
from thinkmid.rollout.judge.templates import nonce, render
from thinkmid.rollout.verdict import CACHE_SIZE, Future, Pending, Verdict, VerdictCache, digest
from thinkmid.types import Tally


class JudgeError(Exception):
    """No response, or none that can be read. One line; said: what came instead, in the sender's words."""

    def __init__(self, why: str, said: str = ""):
        super().__init__(why)
        self.said = said


class NotAsked(JudgeError):
    """The question was not sent: its endpoint has given no response for long."""


class Ask(Protocol):
    """Puts yes/no questions to a model."""

    def __call__(self, prompt: str) -> Future[float]:
        """P(yes) as the next token of a whole judge prompt. Its result() raises JudgeError where there is none."""

    def close(self) -> None:
        """Breaks off what is under way; its futures fail."""


class ModelJudge:
    """A judge that asks a model, and only where rules do not decide. For one thread; ask may use many.

    A verdict depends on candidate, reference, template, seed and votes alone: not on order, cache or retries.
    """

    def __init__(self, cfg: JudgeConfig, ask: Ask, seed: int):
        """close() closes ask."""
        self._cfg, self._ask, self._seed = cfg, ask, seed
        # the policy's own weights change, so its verdicts do too, and a resumed run has no cache
        self._cache = VerdictCache(0 if cfg.kind == "policy" else CACHE_SIZE)

    def __call__(self, candidate: str, reference: str) -> Pending:
        verdict = decide(candidate, reference)
        if verdict is not None:
            self._cache.counts["decided"] += 1
            return verdict
        key = digest(self._cfg.template, reference, candidate)
        return self._cache.get(key) or self._cache.add(key, self._start(candidate, reference))

    def verdict(self, votes: Votes) -> Verdict:
        """Waits for the answers of all votes. value None: one of them failed in spite of retries."""
        try:
            ps = [self._vote(prompt, answer) for prompt, answer in zip(votes.prompts, votes.answers, strict=True)]
        except JudgeError as error:  # this sample leaves its group's baseline; the run continues
            self._cache.counts["given_up"] += isinstance(error, NotAsked)
            return Verdict(None, f"judge failed: {error}")
        mean = sum(ps) / len(ps)
        share = mean if self._cfg.combine == "mean" else sum(p > 0.5 for p in ps) / len(ps)
        shown = " ".join(f"{p:.2f}" for p in ps)
        return Verdict(int(share > 0.5), f"P(yes) {shown}", mean)

    def row(self) -> Tally:
        """Counts of verdicts since the last call; means of the seconds from asking to reading the answer and of P(yes).

        Those given up, whose last question was not sent, are among those that failed.
        """
        counts = self._cache.take_counts()
        row: Tally = {f"judge_{name}": counts[name] for name in ("asked", "decided", "cached", "failed", "given_up")}
        row["judge_wait_s"] = counts["wait_s"], counts["read"]
        row["judge_p_yes"] = counts["p_yes"], counts["read"] - counts["failed"]
        return row

    def close(self) -> None:
        self._ask.close()

    def _start(self, candidate: str, reference: str) -> Votes:
        codes = [nonce(self._seed, reference, vote) for vote in range(self._cfg.votes)]
        prompts = [render(self._cfg.template, candidate, reference, code) for code in codes]
        return Votes(self, prompts, [self._ask(prompt) for prompt in prompts])

    def _vote(self, prompt: str, answer: Future[float]) -> float:
        """P(yes). The same prompt again after a failure: another one could turn the verdict."""
        for _ in range(self._cfg.retries):
            try:
                return p_yes(answer)
            except JudgeError:
                answer = self._ask(prompt)
        return p_yes(answer)


@dataclass(frozen=True)
class Votes:
    """The verdict on one pair, whose questions are under way."""

    judge: ModelJudge
    prompts: list[str]
    answers: list[Future[float]]

    def result(self) -> Verdict:
        return self.judge.verdict(self)


def p_yes(answer: Future[float]) -> float:
    """The probability that an answer brings. JudgeError: it brings none."""
    p = answer.result()
    if not 0 <= p <= 1:
        raise JudgeError(f"P(yes) = {p}")
    return p
