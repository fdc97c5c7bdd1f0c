"""One pack -> its share of the step's loss, and sums to log."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from thinkmid.kernels.attention import attend_pack
from thinkmid.kernels.head import linear_logprob
from thinkmid.kernels.policy import dr_grpo_loss
from thinkmid.types import Pack


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The policy loss."""

    denom: float  # C of DrGRPO: token terms are divided by prompts * siblings * denom; usual: max_think + max_suffix
    estimator: Literal["dr_grpo", "grpo", "rloo", "token-mean"] = "dr_grpo"  # advantage and token weight
    clip_low: float = 0.2  # ratio is clipped below 1 - clip_low; inert with one update per rollout
    clip_high: float = 0.2  # ratio is clipped above 1 + clip_high
    is_cap: float = 2.0  # detached trainer/sampler weight is truncated here; 0 switches it off
    kl: float = 0.0  # weight of the KL to the frozen starting point; above 0 a second model is kept
    entropy: float = 0.0  # weight of an entropy bonus

    def __post_init__(self):
        if not self.denom > 0:
            raise ValueError(f"denom must be positive, got {self.denom}")
        for name in ("clip_low", "clip_high", "is_cap", "kl"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.clip_low > 1:
            raise ValueError(f"clip_low must be at most 1, got {self.clip_low}")

    @property
    def keeps_dead(self) -> bool:
        """KL and entropy give groups of equal rewards a gradient too."""
        return bool(self.kl or self.entropy)


def logprobs(model, pack: Pack, temperature: float = 1.0, return_entropy: bool = False):
    """logp (R,) of the pack's targets and, if asked for, entropy (R,), fp32, through the model's own head."""
    head = partial(linear_logprob, targets=pack.targets, temperature=temperature, return_entropy=return_entropy)
    return model(pack.tokens, pack.positions, attend_pack(pack), rows=pack.rows, head=head)


def text_loss(model, pack: Pack):
    """Next-token loss: sum of ce_w * -logp."""
    logp, _ = logprobs(model, pack)
    return -(pack.ce_w * logp).sum(), {}


def policy_loss(model, pack: Pack, cfg: LossConfig, *, temperature: float, first_update: bool, reference=None):
    """DrGRPO on one pack. With one update per rollout the ratio is 1 and the sampler's gap is an importance weight;
    later updates clip the ratio to the sampler itself, which needs no pass over old weights."""
    logp, entropy = logprobs(model, pack, temperature, return_entropy=True)
    ref_logp = None
    if reference is not None:
        with torch.no_grad():
            ref_logp, _ = logprobs(reference, pack, temperature)
    loss, sums = dr_grpo_loss(
        logp,
        pack.adv,
        pack.pg_w,
        old_logp=None if first_update else pack.logp_old,
        sampler_logp=pack.logp_old if first_update and cfg.is_cap else None,
        is_cap=cfg.is_cap or None,
        ref_logp=ref_logp,
        beta=cfg.kl,
        clip_low=cfg.clip_low,
        clip_high=cfg.clip_high,
    )
    if cfg.entropy:
        loss = loss - cfg.entropy * (pack.pg_w * entropy).sum()
    gap = (logp.detach() - pack.logp_old).abs()
    sums |= {"gap": gap.sum(), "gap_max": gap.max() if len(gap) else gap.sum()}
    return loss, sums | {"entropy": entropy.detach().sum(), "tokens": logp.new_tensor(len(logp))}
