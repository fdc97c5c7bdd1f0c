"""Whole training steps for the sections: random groups, a random sharded model, one optimiser step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from benchmarks.measure.sizes import Family
from thinkmid.data.pack import Unit, plan
from thinkmid.model import weights
from thinkmid.model.transformer import ModelConfig, Transformer
from thinkmid.plan.memory import pair_cost
from thinkmid.run.ranks import Ranks
from thinkmid.train import advantage, fsdp
from thinkmid.train.config import LossConfig, OptimConfig
from thinkmid.train.loss import policy_loss
from thinkmid.train.optim import adamw
from thinkmid.train.step import Stats, train_step
from thinkmid.types import Group, Prompt, Sample


def groups_of(family: Family, *, vocab: int, live: int | None = None) -> list[Group]:
    """Random tokens with the log-probs of an unsure model; siblings of the first `live` groups differ in reward."""
    rng = np.random.default_rng(0)
    live = family.groups if live is None else live
    groups = []
    for p in range(family.groups):
        prompt = Prompt(id=f"prompt {p}", tokens=rng.integers(vocab, size=family.prefix).tolist())
        samples = [
            Sample(
                tokens=rng.integers(vocab, size=family.reply).astype(np.int32),
                logp=np.full(family.reply, -np.log(vocab), np.float32), drawn=np.ones(family.reply, bool),
                finish="suffix", num_think=family.reply, versions=np.zeros(family.reply, np.int32),
            )
            for _ in range(family.siblings)
        ]  # fmt: skip
        rewards = [float(p < live and g % 2) for g in range(family.siblings)]
        groups.append(Group(prompt=prompt, samples=samples, rewards=rewards))
    return groups


def units_of(groups: list[Group]) -> list[Unit]:
    num_siblings, denom = len(groups[0].samples), float(len(groups[0].samples[0].tokens))
    return advantage.units(groups, LossConfig(denom=denom), num_siblings)


def packs_of(units: list[Unit], cfg: ModelConfig, capacity: int) -> list[list[Unit]]:
    return plan(units, capacity=capacity, ranks=1, pair_cost=pair_cost(cfg))[0]


class Trainer:
    """The product's own model, FSDP2, loss, AdamW and step, in one process; weights are noise."""

    def __init__(
        self, cfg: ModelConfig, ranks: Ranks, *, dtype=torch.bfloat16, deterministic=True,
        change: Callable[[Transformer], None] = lambda model: None,
    ):  # fmt: skip
        """change: what a section tries on the model's blocks, before they are sharded."""
        self.cfg, self.ranks = cfg, ranks
        with torch.device("meta"):
            model = Transformer(cfg, deterministic=deterministic)
        change(model)
        self.model = weights.materialise(fsdp.shard(model, ranks, compute_dtype=dtype), ranks.device)
        fill(self.model)
        self.optimizer = adamw(self.model, OptimConfig(lr=1e-6))
        self._loss = LossConfig(denom=1.0)

    def step(self, packs: Sequence[list[Unit]]) -> Stats:
        return train_step(self.model, self.optimizer, list(packs), self.loss, self.ranks, lr=1e-6, clip=1.0)

    def loss(self, pack):
        return policy_loss(self.model, pack, self._loss, temperature=1.0, first_update=True)


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    """Random weights of a sharded or plain model: matrices N(0, 1 / fan_in), norms 1."""
    for p in model.parameters():
        local = p.to_local() if hasattr(p, "to_local") else p
        if local.ndim == 1:
            local.fill_(1)
        else:
            local.normal_(0, p.shape[1] ** -0.5)
