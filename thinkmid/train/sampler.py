"""The engine beside the trainer: awake with the trainer's weights while it samples, asleep while the trainer works."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from thinkmid.rollout.engine.protocol import Engine
from thinkmid.rollout.engine.slices import places
from thinkmid.rollout.verdict import Reward
from thinkmid.run.interrupt import Stopped
from thinkmid.train.agreement import Agreement
from thinkmid.train.config import RLConfig
from thinkmid.train.job import Job
from thinkmid.train.likelihood import Scores
from thinkmid.train.metrics import Clock
from thinkmid.train.optim import Offload
from thinkmid.train.rollouts import judged, rollouts
from thinkmid.types import Group, Prompt


class Sampler:
    """Groups of samples with their rewards, the same on every rank. Every method is collective."""

    def __init__(self, job: Job, cfg: RLConfig, engine: Engine, reward: Reward, scores: Scores | None = None):
        """scores: terms of the reward beside the verdict; None where the verdict is all."""
        self.reward = reward
        self._job, self._cfg, self._engine, self._scores = job, cfg, engine, scores
        self._agreement, self._moments = Agreement(job, cfg, engine), Offload(job.optimizer)

    @contextmanager
    def awake(self, version: int, clock: Clock, *, check: bool = True) -> Iterator[None]:
        """The engine holds the trainer's weights, called `version`. Afterwards it is asleep and Adam's moments are back
        on the device, whatever went wrong. check: compare engine and trainer if that is due at this version."""
        clock.begin("sync")
        try:
            if self._cfg.optim.offload:
                self._moments.offload()
            self._engine.wake_weights()
            self._agreement.push(version, check=check)
            self._engine.wake_cache()
            yield
        finally:
            try:
                self._engine.sleep()  # first: the moments went because they do not fit beside it
            finally:
                self._moments.restore()

    def rollout(
        self, prompts: Sequence[Prompt], indices: Sequence[int], step: int, clock: Clock
    ) -> tuple[list[Group], dict[str, float]]:
        """Groups for prompts[i] of each index, drawn with the seeds of this step and judged; metrics of the check.

        Each rank draws its share and returns the groups of all. Stopped where a stop was requested on some rank.
        """
        job, tensor_parallel = self._job, self._cfg.engine.tensor_parallel
        clock.begin("rollout")
        mine = places(len(indices), job.ranks, tensor_parallel)
        # this rank alone reads these from the run's store, and may find it damaged
        asked = job.ranks.run_on_all(_take, prompts, [indices[i] for i in mine])
        drawn, pending_P_G = rollouts(job, self._engine, asked, self._cfg, step, self.reward)
        refuse_stopped(job, drawn is None)
        groups = drawn or []
        checks = self._agreement.rescore(step, groups, mine)
        clock.begin("reward")
        return judged(job, self._cfg, groups, pending_P_G, mine), checks

    def scored(self, groups: list[Group]) -> tuple[list[Group], dict[str, float]]:
        """Groups with whole rewards, of those with verdicts, and the terms' means. Not while the engine is awake."""
        return self._scores(groups) if self._scores else (groups, {})


def refuse_stopped(job: Job, early: bool = False) -> None:
    """Stopped where one rank was asked to stop. early: what this rank drew ended early for it. Collective."""
    if job.ranks.any(early or job.interrupt.requested):
        raise Stopped


def _take(prompts: Sequence[Prompt], indices: Sequence[int]) -> list[Prompt]:
    return [prompts[i] for i in indices]
