"""Rewards of groups -> units with advantages and weights: the step's one denominator is divided in here."""

from __future__ import annotations

import math

import numpy as np

from thinkmid.data.pack import Reply, Unit
from thinkmid.train.config import LossConfig
from thinkmid.types import Group, Sample


def units(groups: list[Group], cfg: LossConfig, num_siblings: int) -> list[Unit]:
    """What the step trains on. groups are those of the whole update, over all ranks, dead ones included.

    dr_grpo     A = r - mean,            token weight 1 / (P G denom)      Liu et al. 2025
    rloo        A = (r - mean) G/(G-1),  token weight 1 / (P G denom)      Ahmadian et al. 2024
    grpo        A = (r - mean) / std,    token weight 1 / (P G |o|)        Shao et al. 2024; population std
    token-mean  A = r - mean,            token weight 1 / (all drawn tokens of the update)
    Samples without a verdict (NaN) leave the baseline and the loss, not the denominator. Rows of advantage 0 are
    dropped unless KL or entropy give them a gradient. scope "thought": tokens after the closing tag count
    as if they had not been drawn.
    """
    num_samples = len(groups) * num_siblings
    num_drawn = max(1, sum(int(counted(s, cfg.scope).sum()) for g in groups for s in g.samples))
    out: list[Unit] = []
    for group in groups:
        replies = []
        for sample, a in zip(group.samples, advantages(group.rewards, cfg.estimator), strict=True):
            if math.isnan(a) or (a == 0 and not cfg.keeps_dead):
                continue
            # at least 1: a sample may hold forced tokens alone
            mine = counted(sample, cfg.scope)
            tokens = {"grpo": max(1, mine.sum()) * num_samples, "token-mean": num_drawn}
            weight = mine / np.float64(tokens.get(cfg.estimator, num_samples * cfg.denom))
            replies.append(reply(sample, a, weight))
        if replies:
            out.append(Unit(name=group.prompt.id, prefix=np.asarray(group.prompt.tokens), replies=replies))
    return out


def counted(sample: Sample, scope: str) -> np.ndarray:
    """(n,) bool: the tokens that get policy gradient."""
    return sample.drawn & (np.arange(len(sample.drawn)) < sample.num_think) if scope == "thought" else sample.drawn


def advantages(rewards: list[float], estimator: str) -> np.ndarray:
    """(G,) fp64; NaN where there is no verdict, 0 for all of a group without spread."""
    r = np.asarray(rewards, np.float64)
    known = ~np.isnan(r)
    if known.sum() < 2:
        return np.where(known, 0.0, np.nan)
    a: np.ndarray = r - r[known].mean()
    if r[known].max() == r[known].min():
        return np.where(known, 0.0, np.nan)  # the mean of equal floats may differ from them in the last bit
    if estimator == "grpo":
        a = a / (r[known].std() + 1e-6)
    if estimator == "rloo":
        a = a * known.sum() / (known.sum() - 1)
    return a


def is_dead(group: Group) -> bool:
    """No sample has an advantage."""
    return not np.nan_to_num(advantages(group.rewards, "dr_grpo")).any()


def reply(sample: Sample, advantage: float, weight: np.ndarray) -> Reply:
    """What was written, each token with this weight of its policy term."""
    n = len(sample.tokens)
    return Reply(
        tokens=sample.tokens,
        ce_w=np.zeros(n, np.float32),
        pg_w=weight.astype(np.float32),
        adv=np.full(n, advantage, np.float32),
        logp_old=sample.logp,
    )
