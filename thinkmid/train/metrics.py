"""The metrics of an RL step, its seconds by phase, and every sample for people to read."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from thinkmid.files import read_rows
from thinkmid.tokenizer import Tokenizer
from thinkmid.train import advantage
from thinkmid.train.config import RLConfig, RLMTConfig
from thinkmid.train.job import Job
from thinkmid.train.step import Stats
from thinkmid.types import Group


@dataclass(frozen=True, kw_only=True)
class Update:
    """One optimiser step and what it ran on."""

    stats: Stats
    num_rows: int  # tokens that went through the trunk, over all ranks
    num_rows_unshared: int  # had each prefix been stored once per reply
    capacity: int  # tokens that its packs had room for


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


def measure(updates: list[Update]) -> dict[str, float]:
    """Means over the updates' tokens with loss."""
    sums: dict[str, float] = {}
    for u in updates:
        for name, value in u.stats.sums.items():
            sums[name] = max(sums.get(name, 0.0), value) if name.endswith("_max") else sums.get(name, 0.0) + value
    tokens = sums.get("tokens", 0.0)
    row = {name: sums.get(key, 0.0) / max(tokens, 1.0) for name, key in PER_TOKEN.items()} if tokens else {}
    num_rows = sum(u.num_rows for u in updates)
    return {
        **row,
        **({"next_token_loss": sums["next_token"] / len(updates)} if "next_token" in sums else {}),
        "loss": sums.get("loss", 0.0),
        "logp_gap_max": sums.get("gap_max", 0.0),
        "grad_norm": float(np.mean([u.stats.grad_norm for u in updates])),
        "trained_tokens": tokens,
        "trunk_tokens": num_rows,
        "packing_efficiency": num_rows / max(1, sum(u.capacity for u in updates)),
        "prefix_saving": sum(u.num_rows_unshared for u in updates) / max(1, num_rows),
    }


def preflight_line(row: dict[str, float]) -> str:
    """describe() of held-out prompts before the first step, as a line."""
    return (
        f"preflight, {row['groups']} held-out prompts: reward {row['reward']:.3f}, "
        f"dead groups {row['dead_groups']:.0%} ({row['dead_wrong']:.0%} all 0, {row['dead_right']:.0%} all 1), "
        f"closed thoughts {1 - row['unclosed']:.0%}, no verdict {row['reward_failed']:.0%}"
    )


def advice(row: dict[str, float], cfg: RLConfig) -> list[str]:
    """Warnings from the first samples; none if RL can learn from this start."""
    out = []
    if row["unclosed"] > MOST_UNCLOSED:
        out.append(
            f"{row['unclosed']:.0%} of the thoughts do not close: raise sampling.max_think, set sampling.force_close, "
            "or train longer on text with thoughts first"
        )
    if row["dead_groups"] > MOST_DEAD:
        dead = f"{row['dead_groups']:.0%} of the groups"
        if "likelihood" in row:  # a reward that is not right or wrong
            out.append(f"{dead} have equal rewards throughout: no sibling is better than another")
        elif row["reward"] < 0.5:
            cure = "more siblings, a milder judge, or a longer SFT first"
            cure += LIKELIHOOD if isinstance(cfg, RLMTConfig) else ""
            out.append(f"{dead} have no right sample to learn from (mean reward {row['reward']:.3f}): {cure}")
        else:
            out.append(f"{dead} are right throughout: little is left to learn here")
    return out


def zeros_in_a_row(before: int, reward: float) -> int:
    """Steps in a row with a mean reward of exactly 0, up to this one; -1 until there was another mean."""
    if np.isnan(reward):  # no verdict at all
        return before
    return 0 if reward else before + (before >= 0)


MOST_UNCLOSED, MOST_DEAD = 0.5, 0.9
LIKELIHOOD = (
    "; a reward that needs no right sample, for text without annotated thoughts: reward.judge = 0, reward.gain = 1, "
    "loss.scope = 'thought'"
)
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
    """Seconds of a step by phase; console and watch file name the current one."""

    def __init__(self, job: Job, step: int, of: str = ""):
        """of: what the phases belong to, where that is not a training step."""
        self._job, self._step, self._of = job, step, of
        self._began = self._phase_began = time.perf_counter()
        self._phase = ""
        self.seconds: dict[str, float] = {}

    def begin(self, phase: str) -> None:
        """Ends the phase before and begins another; "" begins none."""
        now = time.perf_counter()
        if self._phase:
            self.seconds[f"{self._phase}_s"] = now - self._phase_began
        self._phase, self._phase_began = phase, now
        if phase:
            self._job.begin(f"{self._of}: {phase}" if self._of else phase, self._step)

    def row(self, groups: list[Group]) -> dict[str, float]:
        """The step's seconds and tokens; ends the last phase."""
        self.begin("")
        total = time.perf_counter() - self._began
        generated = sum(len(s.tokens) for g in groups for s in g.samples)
        return {**self.seconds, "step_s": total, "generated_tokens": generated, "tokens_per_s": generated / total}


def rollout_rows(groups: list[Group], tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
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


def summary(folder: Path) -> str:
    """Reward and thinking length of the first and last tenth of the steps."""
    rows = read_rows(folder / "metrics.jsonl")
    if not rows:
        return "no step was taken"
    tenth = max(1, len(rows) // 10)
    first, last = rows[:tenth], rows[-tenth:]
    before, after = _mean(first, "reward"), _mean(last, "reward")
    # a ratio of shares; nats have no zero to count from
    times = f" ({after / before:.2f} times)" if before and after is not None and "likelihood" not in rows[0] else ""
    thinking = [_mean(part, "thinking_tokens") for part in (first, last)]
    return (
        f"reward {_words(before, '.3f')} -> {_words(after, '.3f')}{times}, "
        f"thinking {_words(thinking[0], '.1f')} -> {_words(thinking[1], '.1f')} tokens "
        f"(means of the first and last {tenth} of {len(rows)} steps)"
    )


def _mean(rows: list[dict[str, Any]], name: str) -> float | None:
    """Mean of a column's numbers; None without any."""
    known = [row[name] for row in rows if isinstance(row.get(name), int | float)]
    return float(np.mean(known)) if known else None


def _words(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)
