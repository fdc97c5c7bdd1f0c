"""The reinforcement loop that RLMT and RLPT share: prompts -> rollouts -> rewards -> packs -> update -> sync -> log."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from thinkmid.data.pack import duplicated, plan
from thinkmid.data.source import Order
from thinkmid.log import read_rows
from thinkmid.rollout import sync
from thinkmid.rollout.engine import Engine, collect, seed
from thinkmid.rollout.judge import Verdict
from thinkmid.train import advantage, exchange, job, memory
from thinkmid.train.config import RLConfig
from thinkmid.train.interrupt import EXIT
from thinkmid.train.loss import policy_loss
from thinkmid.train.step import Stats, train_step
from thinkmid.types import Group, Prompt

Reward = Callable[[list[Group]], list[list[Verdict]]]  # verdicts (P, G) of this rank's groups


def train(
    run: job.Job,
    cfg: RLConfig,
    engine: Engine,
    prompts: list[Prompt],
    reward: Reward,
    *,
    step: int,
    state: dict,
    reference=None,
) -> int:
    """Runs steps `step` to cfg.run.steps. Returns the exit code: 0, or EXIT when stopped on request and saved."""
    ranks, log, stop = run.ranks, run.log, lambda: run.interrupt.requested
    order, cursor, skipped = Order(len(prompts), cfg.run.seed), state.get("cursor", 0), state.get("skipped", 0)
    while True:
        now = {"cursor": cursor, "skipped": skipped}
        due = cfg.run.save_every and step % cfg.run.save_every == 0 and step > 0
        if due or step == cfg.run.steps:
            run.save(step, now)
        if step == cfg.run.steps:
            return 0
        clock = Clock()
        with clock("sync"):
            sync.push(run.model, engine, step, torch.float32)
        with clock("rollout"):
            taken = order.take(cursor, cfg.batch.prompts)
            mine = list(range(ranks.rank, len(taken), ranks.world))
            groups = rollouts(engine, [prompts[taken[i]] for i in mine], cfg, step, stop)
            if ranks.any(groups is None or stop()):
                run.save(step, now)  # the half-done step is drawn again, the same, after a restart
                return EXIT
        with clock("reward"):
            verdicts_P_G = reward(groups)
            groups = [
                replace(g, rewards=[v.reward for v in verdicts], whys=[v.why for v in verdicts])
                for g, verdicts in zip(groups, verdicts_P_G, strict=True)
            ]
            groups = exchange.all_groups(groups, mine, ranks)
        with clock("train"):
            refuse_stale(groups, step)
            lr = cfg.optim.lr_at(step, cfg.run.steps)
            done = [
                update(run, cfg, groups[u :: cfg.batch.updates], lr, u == 0, reference)
                for u in range(cfg.batch.updates)
            ]
        for u in done:
            skipped = job.count_skips(run, step, u.stats.broken, skipped, cfg.optim.max_skipped)
        cursor, step = cursor + cfg.batch.prompts, step + 1
        log.write(step, {**describe(groups), **measure(done), "lr": lr, "skipped": skipped, **clock.row(groups)})
        if cfg.run.rollouts_every and step % cfg.run.rollouts_every == 0:
            log.rollouts(step, rollout_rows(groups, run.text))


def rollouts(engine, prompts, cfg: RLConfig, step, stop) -> list[Group] | None:
    """This rank's groups, or None when stopped. Draws depend on (run seed, step, prompt, sibling) alone."""
    seeds_P_G = [[seed(cfg.run.seed, step, p.id, g) for g in range(cfg.batch.siblings)] for p in prompts]
    return collect(engine, prompts, seeds_P_G, cfg.sampling, stop)


def refuse_stale(groups: list[Group], version: int) -> None:
    for group in groups:
        for sample in group.samples:
            if sample.version != version:
                raise RuntimeError(
                    f"{group.prompt.id}: drawn with weights of version {sample.version}, the trainer holds {version}"
                )


@dataclass
class Update:
    """One optimiser step and what it ran on."""

    stats: Stats
    num_rows: int  # tokens that went through the trunk, over all ranks
    num_rows_unshared: int  # had each prefix been stored once per reply
    num_packs: int
    capacity: int


def update(run: job.Job, cfg: RLConfig, groups: list[Group], lr, first_update, reference) -> Update:
    """One optimiser step on these groups: the same groups on every rank, each rank forwards its part of the plan."""
    units = advantage.units(
        groups,
        estimator=cfg.loss.estimator,
        num_siblings=cfg.batch.siblings,
        denom=cfg.loss.denom,
        keep_dead=cfg.loss.keeps_dead,
    )
    unshared = [part for unit in units for part in duplicated(unit)]
    packs_of_ranks = plan(
        units if cfg.batch.share_prefix else unshared,
        capacity=cfg.batch.pack_tokens,
        ranks=run.ranks.world,
        pair_cost=memory.pair_cost(run.model.cfg),
    )
    stats = train_step(
        run.model,
        run.optimizer,
        packs_of_ranks[run.ranks.rank],
        lambda pack: policy_loss(
            run.model,
            pack,
            cfg.loss,
            temperature=cfg.sampling.temperature,
            first_update=first_update,
            reference=reference,
        ),
        run.ranks,
        lr=lr,
        clip=cfg.optim.clip,
    )
    packs = [pack for packs in packs_of_ranks for pack in packs]
    return Update(
        stats,
        sum(u.length for pack in packs for u in pack),
        sum(u.length for u in unshared),
        len(packs),
        cfg.batch.pack_tokens,
    )


def describe(groups: list[Group]) -> dict[str, float]:
    """What the policy did, over all samples of the step."""
    samples = [s for g in groups for s in g.samples]
    rewards = np.array([r for g in groups for r in g.rewards])
    closed = np.array([s.finish != "unclosed" for s in samples])
    suffix = np.array([len(s.tokens) - s.num_think for s in samples])
    return {
        "reward": float(np.nanmean(rewards)) if not np.isnan(rewards).all() else float("nan"),
        "reward_failed": float(np.isnan(rewards).mean()),
        "dead_groups": float(np.mean([advantage.is_dead(g) for g in groups])),
        "thinking_tokens": float(np.mean([s.num_think for s in samples])),
        "unclosed": float(1 - closed.mean()),
        "suffix_tokens": float(suffix[closed].mean()) if closed.any() else 0.0,
        "groups": len(groups),
    }


def measure(done: list[Update]) -> dict[str, float]:
    """What the updates saw, per token with loss."""
    sums: dict[str, float] = {}
    for u in done:
        for name, value in u.stats.sums.items():
            sums[name] = max(sums.get(name, 0.0), value) if name.endswith("_max") else sums.get(name, 0.0) + value
    tokens = sums.get("tokens", 0.0)
    row = {name: sums.get(key, 0.0) / max(tokens, 1.0) for name, key in PER_TOKEN.items()} if tokens else {}
    num_rows = sum(u.num_rows for u in done)
    return {
        **row,
        "loss": sums.get("loss", 0.0),
        "logp_gap_max": sums.get("gap_max", 0.0),
        "grad_norm": float(np.mean([u.stats.grad_norm for u in done])),
        "trained_tokens": tokens,
        "trunk_tokens": num_rows,
        "packing_efficiency": num_rows / max(1, sum(u.num_packs * u.capacity for u in done)),
        "prefix_saving": sum(u.num_rows_unshared for u in done) / max(1, num_rows),
    }


PER_TOKEN = {
    "entropy": "entropy",
    "logp_gap_mean": "gap",
    "ratio_mean": "ratio",
    "ratio_capped": "capped",
    "clip_fraction": "clipped",
    "kl": "kl",
}


class Clock:
    """Seconds by phase."""

    def __init__(self):
        self._began = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str):
        began = time.perf_counter()
        yield
        self.seconds[f"{phase}_s"] = time.perf_counter() - began

    def row(self, groups: list[Group]) -> dict[str, float]:
        total = time.perf_counter() - self._began
        generated = sum(len(s.tokens) for g in groups for s in g.samples)
        return {**self.seconds, "step_s": total, "generated_tokens": generated, "tokens_per_s": generated / total}


def rollout_rows(groups: list[Group], text):
    """One row per sample, for people: rollouts/step-*.jsonl."""
    for group in groups:
        prompt = text.decode(group.prompt.tokens)
        for g, sample in enumerate(group.samples):
            parts = text.split_at_close(sample.tokens)
            reward = group.rewards[g]
            yield {
                "prompt_id": group.prompt.id,
                "sibling": g,
                "prompt": prompt,
                "thought": parts.thought,
                "suffix": parts.suffix,
                "reference": group.prompt.meta.get("reference"),
                "reward": None if np.isnan(reward) else reward,
                "verdict": {"value": None if np.isnan(reward) else int(reward), "why": group.whys[g]},
                "finish": sample.finish,
                "tokens": len(sample.tokens),
                "thinking_tokens": sample.num_think,
                "version": sample.version,
            }


def summary(folder) -> str:
    """Reward and thinking length of the first and last tenth of the steps."""
    rows = read_rows(folder / "metrics.jsonl")
    if not rows:
        return "no step was taken"
    tenth = max(1, len(rows) // 10)

    def mean(part, name):
        known = [row[name] for row in part if row[name] is not None]
        return float(np.mean(known)) if known else float("nan")

    first, last = rows[:tenth], rows[-tenth:]
    before, after = mean(first, "reward"), mean(last, "reward")
    times = f" ({after / before:.2f} times)" if before else ""
    return (
        f"reward {before:.3f} -> {after:.3f}{times}, thinking "
        f"{mean(first, 'thinking_tokens'):.1f} -> {mean(last, 'thinking_tokens'):.1f} tokens "
        f"(means of the first and last {tenth} of {len(rows)} steps)"
    )
