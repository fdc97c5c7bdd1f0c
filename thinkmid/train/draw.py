"""A step's groups: each rank draws its share, rewards are asked for while others are still being drawn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from thinkmid.errors import UserError
from thinkmid.rollout.engine.protocol import collect, seed
from thinkmid.rollout.verdict import Pending
from thinkmid.train import exchange
from thinkmid.train.config import RLConfig
from thinkmid.types import Group

# engine steps between two looks at whether neighbours that share an engine were asked to stop
STEPS_BETWEEN_POLLS = 16


def places(num: int, ranks, share: int) -> list[int]:
    """Which of a step's prompts this rank draws; `share` neighbours hold one engine and draw the same."""
    return list(range(ranks.rank // share, num, ranks.world // share))


def rollouts(run, engine, prompts, cfg: RLConfig, step, reward=None) -> tuple[list[Group] | None, list[list[Pending]]]:
    """This rank's groups, or None when stopped, and the verdicts to come: judged while others are still being drawn.

    Draws depend on (run seed, step, prompt, sibling) alone. Collective: what fails on one rank fails on all.
    """
    seeds_P_G = [[seed(cfg.run.seed, step, p.id, g) for g in range(cfg.batch.siblings)] for p in prompts]
    pending_P_G = [[None] * cfg.batch.siblings for _ in prompts]
    done, total, polls, neighbours = 0, len(prompts) * cfg.batch.siblings, 0, run.ranks.neighbours

    def stop():
        nonlocal polls
        run.watch.beat()
        if neighbours is None:
            return run.interrupt.requested
        # they must take the same steps, so they agree, among themselves: other engines take more steps or fewer
        polls += 1
        return polls % STEPS_BETWEEN_POLLS == 0 and run.ranks.any(run.interrupt.requested, neighbours)

    def each(p, g, sample):
        nonlocal done
        done += 1
        run.log.progress("rollout", done, total)
        if reward:
            pending_P_G[p][g] = reward(prompts[p], sample)

    return run.ranks.run_on_all(lambda: collect(engine, prompts, seeds_P_G, cfg.sampling, stop, each)), pending_P_G


def rewarded(group: Group, pending: list[Pending], watch) -> Group:
    verdicts = []
    for future in pending:
        verdicts.append(future.result())
        watch.beat()
    return replace(group, rewards=[v.reward for v in verdicts], whys=[v.why for v in verdicts])


def judged(run, cfg: RLConfig, groups: list[Group], pending_P_G: list[list[Pending]], mine: list[int]) -> list[Group]:
    """The groups of all ranks with their verdicts. Collective."""
    pairs = zip(groups, pending_P_G, strict=True)
    groups = run.ranks.run_on_all(lambda: [rewarded(g, pending, run.watch) for g, pending in pairs])
    leads = run.ranks.rank % cfg.engine.tensor_parallel == 0  # the others hold the same groups
    return exchange.all_groups(groups if leads else [], mine if leads else [], run.ranks)


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
