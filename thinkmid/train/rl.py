"""The reinforcement loop that RLMT and RLPT share: prompts -> rollouts -> rewards -> packs -> update -> sync -> log."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from thinkmid.data.pack import duplicated, plan
from thinkmid.data.source import Order
from thinkmid.errors import UserError
from thinkmid.log import read_rows
from thinkmid.rollout import sync
from thinkmid.rollout.engine import Engine, collect, seed
from thinkmid.rollout.judge import Pending
from thinkmid.train import advantage, exchange, job, memory
from thinkmid.train.agreement import Agreement
from thinkmid.train.config import RLConfig
from thinkmid.train.interrupt import EXIT
from thinkmid.train.loss import policy_loss
from thinkmid.train.optim import Offload
from thinkmid.train.step import Stats, train_step
from thinkmid.types import Group, Prompt, Sample


class Reward(Protocol):
    """Asked about each sample as it finishes, answers when all are drawn."""

    def __call__(self, prompt: Prompt, sample: Sample) -> Pending: ...

    def finish(self, step: int) -> dict[str, float]:
        """After the last verdict of a step: its metrics, and a look at itself. UserError stops the run."""


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
    ranks, log, watch = run.ranks, run.log, run.watch
    order, cursor, skipped = Order(len(prompts), cfg.run.seed), state.get("cursor", 0), state.get("skipped", 0)
    agreement, moments = Agreement(run, cfg, engine, sync), Offload(run.optimizer)
    while True:
        now = {"cursor": cursor, "skipped": skipped}
        due = cfg.run.save_every and step % cfg.run.save_every == 0 and step > 0
        if due or step == cfg.run.steps:
            watch.beat("save", step)
            run.save(step, now)
        if step == cfg.run.steps:
            return 0
        with stopped_is_saved(run, step, now, moments):
            clock = Clock(watch, step)
            with clock("sync"):
                if cfg.optim.offload:
                    moments.away()
                engine.wake_weights()
                agreement.push(step)
                engine.wake_cache()
            with clock("rollout"):
                taken = order.take(cursor, cfg.batch.prompts)
                mine = places(len(taken), ranks, cfg.engine.tensor_parallel)
                groups, pending_P_G = rollouts(run, engine, [prompts[taken[i]] for i in mine], cfg, step, reward)
                if ranks.any(groups is None or run.interrupt.requested):
                    moments.back()
                    run.save(step, now)  # the half-done step is drawn again, the same, after a restart
                    return EXIT
                draw = lambda again: rollouts(run, engine, again, cfg, step)[0]  # noqa: B023, E731
                checked = agreement.rescore(step, groups, mine, draw)
            with clock("reward"):
                groups = [rewarded(g, pending, watch) for g, pending in zip(groups, pending_P_G, strict=True)]
                ranks.agree(lambda: checked.update(reward.finish(step)))  # noqa: B023
                leads = ranks.rank % cfg.engine.tensor_parallel == 0  # the others hold the same groups
                groups = exchange.all_groups(groups if leads else [], mine if leads else [], ranks)
                refuse_unjudged(groups, cfg.run.max_failed)
            with clock("train"):
                engine.sleep()
                moments.back()
                refuse_stale(groups, step)
                lr = cfg.optim.lr_at(step, cfg.run.steps)
                done = [
                    update(run, cfg, groups[u :: cfg.batch.updates], lr, u == 0, reference)
                    for u in range(cfg.batch.updates)
                ]
            for u in done:
                skipped = job.count_skips(run, step, u.stats.broken, skipped, cfg.optim.max_skipped)
        cursor, step = cursor + cfg.batch.prompts, step + 1
        row = {**describe(groups), **measure(done), **checked, "lr": lr, "skipped": skipped, **clock.row(groups)}
        log.write(step, row)
        if cfg.run.rollouts_every and step % cfg.run.rollouts_every == 0:
            log.rollouts(step, rollout_rows(groups, run.text))


@contextmanager
def stopped_is_saved(run, step, now, moments):
    """What stops the run in mid-step, on every rank at once, costs that step alone."""
    try:
        yield
    except UserError:
        moments.back()
        run.save(step, now)
        raise


def places(num: int, ranks, share: int) -> list[int]:
    """Which of a step's prompts this rank draws; `share` neighbours hold one engine and draw the same."""
    return list(range(ranks.rank // share, num, ranks.world // share))


def rollouts(run, engine, prompts, cfg: RLConfig, step, reward=None) -> tuple[list[Group] | None, list[list[Pending]]]:
    """This rank's groups, or None when stopped, and the verdicts to come: judged while others are still being drawn.

    Draws depend on (run seed, step, prompt, sibling) alone.
    """
    seeds_P_G = [[seed(cfg.run.seed, step, p.id, g) for g in range(cfg.batch.siblings)] for p in prompts]
    pending_P_G = [[None] * cfg.batch.siblings for _ in prompts]
    done, total = 0, len(prompts) * cfg.batch.siblings

    def stop():
        run.watch.beat()
        # ranks that share an engine must take the same steps
        return run.interrupt.requested and cfg.engine.tensor_parallel == 1

    def each(p, g, sample):
        nonlocal done
        done += 1
        run.log.progress("rollout", done, total)
        if reward:
            pending_P_G[p][g] = reward(prompts[p], sample)

    return collect(engine, prompts, seeds_P_G, cfg.sampling, stop, each), pending_P_G


def rewarded(group: Group, pending: list[Pending], watch) -> Group:
    verdicts = []
    for answer in pending:
        verdicts.append(answer())
        watch.beat()
    return replace(group, rewards=[v.reward for v in verdicts], whys=[v.why for v in verdicts])


def refuse_unjudged(groups: list[Group], limit: float) -> None:
    whys = [why for g in groups for r, why in zip(g.rewards, g.whys, strict=True) if np.isnan(r)]
    total = sum(len(g.samples) for g in groups)
    if len(whys) > limit * total:
        most = max(set(whys), key=whys.count)
        raise UserError(
            f"{len(whys)} of {total} samples have no verdict, most of them for: {most}; the same command goes on here"
        )


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
    "sampler_kl": "sampler_kl",
    "ratio_mean": "ratio",
    "ratio_capped": "capped",
    "clip_fraction": "clipped",
    "kl": "kl",
}


class Clock:
    """Seconds by phase; the watch is told which one it is."""

    def __init__(self, watch, step: int):
        self._watch, self._step = watch, step
        self._began = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str):
        began = time.perf_counter()
        self._watch.beat(phase, self._step)
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
