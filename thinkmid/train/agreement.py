"""Trainer and engine must agree: weights read back after a sync, samples re-scored; the run stops with a cause."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from thinkmid.data.pack import Reply, Unit, make_pack, plan
from thinkmid.errors import UserError
from thinkmid.plan import memory
from thinkmid.train import rollouts
from thinkmid.train.loss import logprobs
from thinkmid.types import Group


class Agreement:
    """Checks every engine.check_every steps. Every method is collective, a disagreement a UserError on every rank."""

    def __init__(self, run, cfg, engine, sync):
        """sync: thinkmid.rollout.engine.weight_sync."""
        self._run, self._cfg, self._engine, self._sync = run, cfg, engine, sync
        self._dtype = getattr(torch, cfg.engine.dtype)
        # checksums of the last version that was read back, and of the one before it
        self._before: dict[str, int] = {}
        self._then: dict[str, int] = {}

    def due(self, step: int) -> bool:
        return bool(self._cfg.engine.check_every) and step % self._cfg.engine.check_every == 0

    def push(self, step: int) -> None:
        """The trainer's weights into the engine, read back where a check is due."""
        due = self.due(step)
        sums = self._sync.push(self._run.model, self._engine, step, self._dtype, summed=due)
        if due:
            self._stop(step, self._sync.difference(self._engine, sums, self._before))
            self._then, self._before = self._before, sums

    def rescore(self, step: int, groups: list[Group], mine: list[int], draw) -> dict[str, float]:
        """Metrics of the gap between the engine's log-probs and the trainer's, over some samples of each rank.

        groups: this rank's, with their places in the step; draw(prompts) -> the engine's groups for them, drawn again.
        """
        if not self.due(step):
            return {}
        gap = self._gap(groups, mine)
        row = describe(gap, self._cfg.loss.is_cap)
        if too_far(row, self._cfg.engine.max_gap):
            self._stop(step, self._cause(row, groups, mine, draw))
        return row

    def _gap(self, groups, mine) -> np.ndarray:
        """Trainer minus engine, in nats, of every drawn token in the first samples of every rank."""
        few, left = [], self._cfg.engine.check_samples
        for g in groups:
            few.append(replace(g, samples=g.samples[:left], rewards=[], whys=[]))
            left -= len(few[-1].samples)
            if left <= 0:
                break
        run, cfg = self._run, self._cfg
        everyone = rollouts.all_groups(few, mine[: len(few)], run.ranks)
        packs = plan(
            [_unit(g) for g in everyone],
            capacity=cfg.batch.pack_tokens,
            ranks=run.ranks.world,
            pair_cost=memory.pair_cost(run.model.cfg),
        )[run.ranks.rank]
        gaps = [np.zeros(0, np.float32)]
        with torch.no_grad():
            for units in packs:
                pack = make_pack(units, run.ranks.device)
                gap = logprobs(run.model, pack, cfg.sampling.temperature) - pack.logp_old
                gaps.append(gap[pack.pg_w != 0].float().cpu().numpy())
        parts = run.ranks.gather_bytes(np.concatenate(gaps).tobytes())
        return np.concatenate([np.frombuffer(part, np.float32) for part in parts])

    def _cause(self, row, groups, mine, draw) -> str:
        cfg, seen = self._cfg, f"mean |trainer - engine| is {row['probe_gap_mean']:.3g} nats"
        sums = self._sync.checksums(self._run.model, self._engine, self._dtype)
        cause = self._sync.difference(self._engine, sums, self._then)
        cause = self._everywhere(cause)
        if not cause:
            self._engine.reset_cache()
            again = draw([g.prompt for g in groups]) or []  # none where the run is being stopped
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
        return next((c.decode() for c in self._run.ranks.gather_bytes(cause.encode()) if c), "")


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
    replies = []
    for s in group.samples:
        zeros = np.zeros(len(s.tokens), np.float32)
        weight = s.drawn.astype(np.float32)
        replies.append(Reply(tokens=s.tokens, ce_w=zeros, pg_w=weight, adv=zeros, logp_old=s.logp))
    return Unit(name=group.prompt.id, prefix=np.asarray(group.prompt.tokens), replies=replies)
