"""Clipped policy loss per token with a detached importance weight, and what to log about it."""

from __future__ import annotations

import torch


def dr_grpo_loss(
    logp,
    adv,
    weight,
    *,
    old_logp=None,
    sampler_logp=None,
    is_cap=None,
    ref_logp=None,
    beta=0.0,
    clip_low=0.2,
    clip_high=0.2,
):
    """Sum over tokens of weight * (-is * min(ratio * adv, clip(ratio) * adv) + beta * k3), and metric sums.

    All tensors (R,) fp32. ratio = exp(logp - old_logp); old_logp None stands for detached logp, so that the ratio is
    exactly 1. is = min(exp(old_logp - sampler_logp), is_cap), always detached; 1 without sampler_logp. weight carries
    mask and denominator: DrGRPO's is 1 / (P G C). k3 = exp(ref - logp) - (ref - logp) - 1 estimates the KL to ref.
    Source: Liu et al. 2025 (DrGRPO), truncated importance sampling after Yao et al. 2025.
    """
    old = logp.detach() if old_logp is None else old_logp
    ratio = (logp - old).exp()
    bound = ratio.clamp(1 - clip_low, 1 + clip_high)
    # where both branches are equal the unclipped one must carry the whole gradient: torch.minimum would halve it
    clipped = bound * adv < ratio * adv
    term = -torch.where(clipped, bound.detach() * adv, ratio * adv)
    gap = torch.zeros_like(logp) if sampler_logp is None else (old - sampler_logp).detach()
    importance = gap.exp()
    if is_cap is not None:
        importance = importance.clamp(max=is_cap)
    term = term * importance
    kl = None
    if beta:
        delta = ref_logp - logp
        kl = delta.exp() - delta - 1
        term = term + beta * kl
    loss = (weight * term).sum()
    return loss, _metrics(ratio, clipped, gap, importance, is_cap, kl)


def _metrics(ratio, clipped, gap, importance, is_cap, kl):
    """Sums over tokens (maxima where named so); the caller divides by the number of tokens of the whole step."""
    with torch.no_grad():
        capped = importance >= is_cap if is_cap is not None else torch.zeros_like(importance)
        return {
            "ratio": ratio.sum(),
            "clipped": clipped.sum(),
            "gap": gap.abs().sum(),
            "gap_max": gap.abs().max() if gap.numel() else gap.sum(),
            "capped": capped.sum(),
            "importance": importance.sum(),
            "kl": kl.sum() if kl is not None else torch.zeros_like(ratio).sum(),
        }
