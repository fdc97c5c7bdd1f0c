"""One pack -> its share of the step's loss, and sums to log."""

from __future__ import annotations

from functools import partial

import torch

from thinkmid.kernels.attention import attend_pack
from thinkmid.kernels.head import linear_logprob
from thinkmid.kernels.policy import dr_grpo_loss
from thinkmid.train.config import LossConfig
from thinkmid.types import Pack


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
