"""Trainer and engine must agree: weights read back after a sync, samples re-scored; the run stops with a cause."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from thinkmid.data.pack import Unit, make_pack
from thinkmid.errors import UserError
from thinkmid.rollout.engine import weight_sync
from thinkmid.rollout.engine.protocol import Engine
from thinkmid.train.advantage import reply
from thinkmid.train.config import RLConfig
from thinkmid.train.job import Job
from thinkmid.train.loss import logprobs
from thinkmid.train.packing import Packing
from thinkmid.train.rollouts import all_groups, rollouts
from thinkmid.types import Group


class Agreement:
    """Checks every engine.check_every steps. Every method is collective, a disagreement a UserError on every rank."""

    def __init__(self, job: Job, cfg: RLConfig, engine: Engine):
        self._job, self._cfg, self._engine = job, cfg, engine
        self._dtype = getattr(torch, cfg.engine.dtype)
        self._is_checked = False  # the version that the engine holds
        # checksums of the last version that was read back, and of the one before it
        self._before: dict[str, int] = {}
        self._then: dict[str, int] = {}

    def push(self, step: int, *, check: bool = True) -> None:
        """The trainer's weights into the engine, called version `step`; with check, read back where that is due."""
        every = self._cfg.engine.check_every
        self._is_checked = check and every > 0 and step % every == 0
        sums = weight_sync.push(self._job.model, self._engine, step, self._dtype, summed=self._is_checked)
        if self._is_checked:
            self._stop(step, weight_sync.difference(self._engine, sums, self._before))
            self._then, self._before = self._before, sums

    def rescore(self, step: int, groups: list[Group], mine: list[int]) -> dict[str, float]:
        """Metrics of the gap between the engine's log-probs and the trainer's, over some samples of each rank; {} where
        the last push was not checked. groups: this rank's, drawn in this step; mine: their places in it."""
        if not self._is_checked:
            return {}
        gap = self._gap(groups, mine)
        row = describe(gap, self._cfg.loss.is_cap)
        if too_far(row, self._cfg.engine.max_gap):
            self._stop(step, self._cause(step, row, groups, mine))
        return row

    def _gap(self, groups: list[Group], mine: list[int]) -> np.ndarray:
        """Trainer minus engine, in nats, of every drawn token in the first samples of every rank."""
        few: list[Group] = []
        left = self._cfg.engine.check_samples
        for g in groups:
            few.append(replace(g, samples=g.samples[:left], rewards=[], whys=[]))
            left -= len(few[-1].samples)
            if left <= 0:
                break
        job, cfg = self._job, self._cfg
        everyone = all_groups(few, mine[: len(few)], job.ranks)
        packing = Packing(cfg.batch.pack_tokens, job.model.cfg, job.ranks)
        gaps = [np.zeros(0, np.float32)]
        with torch.no_grad():
            for units in packing.mine([_unit(g) for g in everyone]):
                pack = make_pack(units, job.ranks.device)
                gap = logprobs(job.model, pack, cfg.sampling.temperature) - pack.logp_old
                gaps.append(gap[pack.pg_w != 0].float().cpu().numpy())
        parts = job.ranks.gather_bytes(np.concatenate(gaps).tobytes())
        return np.concatenate([np.frombuffer(part, np.float32) for part in parts])

    def _cause(self, step: int, row: dict[str, float], groups: list[Group], mine: list[int]) -> str:
        cfg, seen = self._cfg, f"mean |trainer - engine| is {row['probe_gap_mean']:.3g} nats"
        sums = weight_sync.checksums(self._job.model, self._engine, self._dtype)
        cause = self._everywhere(weight_sync.difference(self._engine, sums, self._then))
        if not cause:
            self._engine.reset_cache()
            again, _ = rollouts(self._job, self._engine, [g.prompt for g in groups], cfg, step)
            again = again or []  # none where the run is being stopped
            if not too_far(describe(self._gap(again, mine), cfg.loss.is_cap), cfg.engine.max_gap):
                cause = "stale prefix cache: with an empty one the same prompts agree; it was not reset after the sync"
        return f"{seen}: " + (
            cause
            or f"weights are the same and the cache is fresh, so the computation differs (engine {cfg.engine.dtype}, "
            f"trainer {cfg.model.dtype}; temperature, RoPE or head); engine.max_gap is {cfg.engine.max_gap:g}"
        )

    def _stop(self, step: int, cause: str) -> None:
        if cause := self._everywhere(cause):
            raise UserError(f"step {step}: engine and trainer disagree: {cause}")

    def _everywhere(self, cause: str) -> str:
        """The first rank's cause that is not empty, on every rank."""
        return next((c.decode() for c in self._job.ranks.gather_bytes(cause.encode()) if c), "")


def describe(gap: np.ndarray, cap: float) -> dict[str, float]:
    """gap = trainer - engine, nats per token. probe_kl estimates KL(engine || trainer) by E[r - 1 - log r]."""
    if not len(gap):
        return {}
    gap = gap.astype(np.float64)
    if not np.isfinite(gap).all():  # as far as can be
        return {"probe_gap_mean": float("inf"), "probe_gap_max": float("inf"), "probe_tokens": len(gap)}
    ratio = np.exp(gap)
    low, high = np.percentile(ratio, [1, 99])
    return {
        "probe_gap_mean": float(np.abs(gap).mean()),
        "probe_gap_max": float(np.abs(gap).max()),
        "probe_kl": float((ratio - 1 - gap).mean()),
        "probe_ratio_p01": float(low),
        "probe_ratio_p99": float(high),
        "probe_capped": float((ratio > cap).mean()) if cap else 0.0,
        "probe_tokens": len(gap),
    }


def too_far(row: dict[str, float], max_gap: float) -> bool:
    return bool(row) and row["probe_gap_mean"] > max_gap


def _unit(group: Group) -> Unit:
    replies = [reply(s, 0.0, s.drawn) for s in group.samples]
    return Unit(name=group.prompt.id, prefix=np.asarray(group.prompt.tokens), replies=replies)
