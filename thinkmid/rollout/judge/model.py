"""Rewards of continuations: a judge is asked at once and answers later with 1, 0 or failed."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

from thinkmid.rollout.judge.guard import decide
from thinkmid.rollout.judge.templates import nonce, render
from thinkmid.rollout.verdict import Once, Pending, Verdict, digest
from thinkmid.tokenizer import Split, Tokenizer
from thinkmid.types import Prompt, Sample, Tally

Judge = Callable[[str, str], Pending]  # of candidate and reference; a judge sees neither prefix nor thought
Ask = Callable[[str], Callable[[], float]]  # of a whole judge prompt; what it returns gives P(yes) or raises JudgeError
Look = Callable[[int], Tally]  # of a step: metrics of an examination of the judge itself


class JudgeError(Exception):
    """No answer, or none that can be read. One line says why; said: what came instead, in the sender's words."""

    def __init__(self, why: str, said: str = ""):
        super().__init__(why)
        self.said = said


class NotAsked(JudgeError):
    """Nobody was asked, since nobody has answered for long."""


def malformed(parts: Split) -> Verdict | None:
    """0 for a sample without exactly one closing tag; nobody is asked about it."""
    if parts.num_tags == 1:
        return None
    return Verdict(0, "unclosed" if parts.num_tags == 0 else "closed more than once")


class ContinuationReward:
    """The reward of RLMT: does what follows the thought match what really follows?"""

    def __init__(self, tokenizer: Tokenizer, judge: Judge, *, max_suffix: int, look: Look | None = None):
        """look raises UserError where the judge cannot be trusted."""
        self._text, self._judge, self._max_suffix, self._look = tokenizer, judge, max_suffix, look
        # siblings share their reference; those of the prompts under way fit
        self._reference = lru_cache(maxsize=256)(lambda whole: tokenizer.decode(tokenizer.encode(whole)[:max_suffix]))

    def __call__(self, prompt: Prompt, sample: Sample) -> Pending:
        """Both texts are cut to max_suffix tokens; not exactly one closing tag is 0 unasked."""
        parts = self._text.split_at_close(sample.tokens)
        if verdict := malformed(parts):
            return lambda: verdict
        cut = self._text.split_at_close(sample.tokens[: parts.num_think + self._max_suffix])
        return self._judge(cut.suffix, self._reference(prompt.meta["reference"]))

    def finish(self, step: int) -> Tally:
        """After the last verdict of a step: the judge's metrics since then, none for a judge by rule."""
        row = self._judge.row() if hasattr(self._judge, "row") else {}
        return row | (self._look(step) if self._look else {})


class ModelJudge:
    """A judge that asks a model, and only where rules do not decide. For one thread; ask may use many.

    A verdict depends on candidate, reference, template, seed and votes alone: not on order, cache or retries.
    """

    def __init__(
        self,
        ask: Ask,
        *,
        template: str,
        seed: int,
        votes: int = 1,
        combine: Literal["mean", "majority"] = "mean",
        retries: int = 1,
        cache_size: int = 100_000,
    ):
        for name, value, low in (("votes", votes, 1), ("retries", retries, 0)):
            if value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        if combine not in ("mean", "majority"):
            raise ValueError(f"combine must be 'mean' or 'majority', got {combine!r}")
        render(template, "", "", nonce(seed, "", 0))  # an unknown template is noticed now
        self._ask, self._template, self._seed = ask, template, seed
        self._votes, self._combine, self._retries = votes, combine, retries
        self._once = Once(cache_size)
        self._sums: dict[str, float] = defaultdict(float)

    def __call__(self, candidate: str, reference: str) -> Pending:
        verdict = decide(candidate, reference)
        if verdict is not None:
            self._sums["decided"] += 1
            return lambda: verdict
        key = digest(self._template, reference, candidate)
        pending, known = self._once(key, lambda: self._start(candidate, reference))
        self._sums["cached" if known else "asked"] += 1
        return pending

    def row(self) -> Tally:
        """Counts of verdicts since the last call; means of the seconds from asking to reading the answer and of P(yes).

        Those given up, for which nobody was asked in the end, are among those that failed.
        """
        sums, self._sums = self._sums, defaultdict(float)
        row: Tally = {f"judge_{name}": sums[name] for name in ("asked", "decided", "cached", "failed", "given_up")}
        row["judge_wait_s"] = sums["wait_s"], sums["read"]
        row["judge_p_yes"] = sums["p_yes"], sums["read"] - sums["failed"]
        return row

    def _start(self, candidate, reference) -> Pending:
        began, votes = time.perf_counter(), range(self._votes)
        prompts = [render(self._template, candidate, reference, nonce(self._seed, reference, v)) for v in votes]
        answers = [self._ask(prompt) for prompt in prompts]

        def answer() -> Verdict:
            try:
                verdict = self._combined([self._vote(*vote) for vote in zip(prompts, answers, strict=True)])
            except JudgeError as error:  # this sample leaves its group's baseline; the run goes on
                verdict = Verdict(None, f"judge failed: {error}")
                self._sums["failed"] += 1
                self._sums["given_up"] += isinstance(error, NotAsked)
            self._sums["read"] += 1
            self._sums["wait_s"] += time.perf_counter() - began
            self._sums["p_yes"] += verdict.p_yes or 0.0
            return verdict

        return answer

    def _vote(self, prompt, answer) -> float:
        """P(yes) in [0, 1]. The same prompt again after a failure: another one could turn the verdict."""
        for left in range(self._retries, -1, -1):
            try:
                p = answer()
                if 0 <= p <= 1:
                    return p
                raise JudgeError(f"P(yes) = {p}")
            except JudgeError:
                if not left:
                    raise
                answer = self._ask(prompt)
        raise AssertionError("unreachable")

    def _combined(self, ps: list[float]) -> Verdict:
        mean = sum(ps) / len(ps)
        share = mean if self._combine == "mean" else sum(p > 0.5 for p in ps) / len(ps)
        shown = " ".join(f"{p:.2f}" for p in ps)
        return Verdict(int(share > 0.5), f"P(yes) {shown}", mean)
