"""The reward of RLMT: does what follows the thought match what really follows?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from thinkmid.rollout.judge.ask import JudgeModel, Policy, make_ask
from thinkmid.rollout.judge.canary import Examiner
from thinkmid.rollout.judge.config import JudgeConfig
from thinkmid.rollout.judge.model import ModelJudge
from thinkmid.rollout.judge.rule import RuleJudge
from thinkmid.rollout.verdict import Pending, malformed
from thinkmid.thoughts import before_stop
from thinkmid.tokenizer import Tokenizer
from thinkmid.types import Prompt, Sample, Tally

Judge = RuleJudge | ModelJudge  # of candidate and reference; a judge sees neither prefix nor thought


class ContinuationReward:
    """A judge's verdict on continuation and reference, both cut to max_suffix tokens, and at a stop text."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        judge: Judge,
        *,
        max_suffix: int,
        stops: Sequence[str] = (),
        examiner: Examiner | None = None,
    ):
        """close() closes the judge."""
        self._tokenizer, self._judge, self._max_suffix, self._examiner = tokenizer, judge, max_suffix, examiner
        self._stops = stops
        # siblings share their reference; those of the prompts under way fit
        self._reference = lru_cache(maxsize=256)(self._cut)

    def __call__(self, prompt: Prompt, sample: Sample) -> Pending:
        """Not exactly one closing tag is 0, and the judge is not asked."""
        parts = self._tokenizer.split_at_close(sample.tokens)
        if verdict := malformed(parts):
            return verdict
        assert parts.num_think is not None  # the tag is there
        cut = self._tokenizer.split_at_close(sample.tokens[: parts.num_think + self._max_suffix])
        return self._judge(before_stop(cut.suffix, self._stops), self._reference(prompt.meta["reference"]))

    def finish(self, step: int) -> Tally:
        """After the last verdict of a step: the judge's metrics since then, and those of its examination if one is due.

        UserError if the judge fails it.
        """
        return self._judge.row() | (self._examiner.examine(step, self._reference) if self._examiner else {})

    def close(self) -> None:
        self._judge.close()

    def _cut(self, text: str) -> str:
        return before_stop(self._tokenizer.decode(self._tokenizer.encode(text)[: self._max_suffix]), self._stops)


def make_reward(
    cfg: JudgeConfig,
    policy: Policy,
    model: JudgeModel | None,
    prompts: Sequence[Prompt],
    *,
    seed: int,
    note: Callable[[str], None],
) -> ContinuationReward:
    """The reward with the judge that a configuration names.

    model: from ask.read_judge. prompts: the run's, whose references examine a model that judges. note(line): receives
    what happens to an endpoint.
    """
    judge: Judge = RuleJudge(cfg.overlap)
    examiner = None
    if cfg.kind != "match":
        ask = make_ask(cfg, policy, model, note)
        judge, examiner = ModelJudge(cfg, ask, seed), Examiner(cfg=cfg, ask=ask, seed=seed, prompts=prompts)
    max_suffix, stops = policy.sampling.max_suffix, policy.sampling.stop
    return ContinuationReward(policy.tokenizer, judge, max_suffix=max_suffix, stops=stops, examiner=examiner)
