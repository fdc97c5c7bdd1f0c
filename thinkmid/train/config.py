"""The configuration that RLMT and RLPT share."""

from __future__ import annotations

from dataclasses import dataclass, field

from thinkmid.rollout.engine import Sampling
from thinkmid.train.job import ModelSection, RunConfig
from thinkmid.train.loss import LossConfig
from thinkmid.train.optim import OptimConfig


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """What one step rolls out and how it is trained on."""

    prompts: int = 16  # P, over all ranks
    siblings: int = 8  # G samples of each prompt
    updates: int = 1  # optimiser steps per rollout batch; above 1 the ratio is clipped to the sampler
    pack_tokens: int = 8192  # tokens of one forward on one rank
    share_prefix: bool = True  # a group's prefix goes through the network once; off only to measure what that saves

    def __post_init__(self):
        for name, low in (("prompts", 1), ("siblings", 2), ("updates", 1), ("pack_tokens", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if self.updates > self.prompts:
            raise ValueError(f"updates {self.updates} exceed prompts {self.prompts}: each update needs a group")


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    """Reinforcement learning."""

    run: RunConfig
    model: ModelSection
    sampling: Sampling = field(default_factory=Sampling)
    batch: BatchConfig = field(default_factory=BatchConfig)
    loss: LossConfig
    optim: OptimConfig
