"""What a step of RL tells: metrics, seconds by phase, every sample for people to read."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from thinkmid.files import read_rows
from thinkmid.train import advantage
from thinkmid.train.step import Stats
from thinkmid.types import Group


@dataclass
class Update:
    """One optimiser step and what it ran on."""

    stats: Stats
    num_rows: int  # tokens that went through the trunk, over all ranks
    num_rows_unshared: int  # had each prefix been stored once per reply
    num_packs: int
    capacity: int


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
        "dead_wrong": float(np.mean([not np.any(g.rewards) for g in groups])),
        "dead_right": float(np.mean([np.all(np.equal(g.rewards, 1)) for g in groups])),
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
        **({"next_token_loss": sums["next_token"] / len(done)} if "next_token" in sums else {}),
        "loss": sums.get("loss", 0.0),
        "logp_gap_max": sums.get("gap_max", 0.0),
        "grad_norm": float(np.mean([u.stats.grad_norm for u in done])),
        "trained_tokens": tokens,
        "trunk_tokens": num_rows,
        "packing_efficiency": num_rows / max(1, sum(u.num_packs * u.capacity for u in done)),
        "prefix_saving": sum(u.num_rows_unshared for u in done) / max(1, num_rows),
    }


def gate_line(row: dict[str, float]) -> str:
    return (
        f"gate, {row['groups']} held-out prompts: reward {row['reward']:.3f}, dead groups {row['dead_groups']:.0%} "
        f"({row['dead_wrong']:.0%} all 0, {row['dead_right']:.0%} all 1), closed thoughts {1 - row['unclosed']:.0%}, "
        f"no verdict {row['reward_failed']:.0%}"
    )


def advice(row: dict[str, float]) -> list[str]:
    """What the first step's samples say about the start: lines of warning, none if RL can learn from them."""
    out = []
    if row["unclosed"] > MOST_UNCLOSED:
        out.append(
            f"{row['unclosed']:.0%} of the thoughts do not close: raise sampling.max_think, set sampling.force_close, "
            "or train longer on text with thoughts first"
        )
    if row["dead_groups"] > MOST_DEAD and "likelihood" in row:  # a reward that is not right or wrong
        out.append(
            f"{row['dead_groups']:.0%} of the groups have equal rewards throughout: nothing tells siblings apart"
        )
    elif row["dead_groups"] > MOST_DEAD and row["reward"] < 0.5:
        out.append(
            f"{row['dead_groups']:.0%} of the groups have no right sample to learn from "
            f"(mean reward {row['reward']:.3f}): more siblings, a milder judge, or a longer SFT first"
        )
    elif row["dead_groups"] > MOST_DEAD:
        out.append(f"{row['dead_groups']:.0%} of the groups are right throughout: little is left to learn here")
    return out


def zeros_in_a_row(before: int, reward: float) -> int:
    """Steps in a row with a mean reward of exactly 0, up to this one; -1 until there was another mean."""
    if np.isnan(reward):  # no verdict at all
        return before
    return 0 if reward else before + (before >= 0)


MOST_UNCLOSED, MOST_DEAD = 0.5, 0.9
ZEROS = 20  # steps in a row without any reward, after some with, at which the policy counts as collapsed
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


def rollout_rows(groups: list[Group], tokenizer):
    """One row per sample, for people: rollouts/step-*.jsonl."""
    for group in groups:
        prompt = tokenizer.decode(group.prompt.tokens)
        for g, sample in enumerate(group.samples):
            parts = tokenizer.split_at_close(sample.tokens)
            reward = None if np.isnan(group.rewards[g]) else group.rewards[g]
            yield {
                "prompt_id": group.prompt.id,
                "sibling": g,
                "prompt": prompt,
                "thought": parts.thought,
                "suffix": parts.suffix,
                "reference": group.prompt.meta.get("reference"),
                "reward": reward,
                "verdict": {"value": int(reward) if reward in (0, 1) else reward, "why": group.whys[g]},
                "finish": sample.finish,
                "tokens": len(sample.tokens),
                "thinking_tokens": sample.num_think,
                "version": int(sample.versions[-1]),
            }


def summary(folder) -> str:
    """Reward and thinking length of the first and last tenth of the steps."""
    rows = read_rows(folder / "metrics.jsonl")
    if not rows:
        return "no step was taken"
    tenth = max(1, len(rows) // 10)

    def mean(part, name):
        known = [row[name] for row in part if isinstance(row.get(name), int | float)]
        return float(np.mean(known)) if known else float("nan")

    first, last = rows[:tenth], rows[-tenth:]
    before, after = mean(first, "reward"), mean(last, "reward")
    times = f" ({after / before:.2f} times)" if before > 0 else ""
    return (
        f"reward {before:.3f} -> {after:.3f}{times}, thinking "
        f"{mean(first, 'thinking_tokens'):.1f} -> {mean(last, 'thinking_tokens'):.1f} tokens "
        f"(means of the first and last {tenth} of {len(rows)} steps)"
    )
