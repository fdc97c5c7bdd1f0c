"""DrGRPO's loss of a token: clipped objective, detached importance weight, KL, entropy; its derivative; what to log."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thinkmid.kernels import launch
from thinkmid.kernels.streams import INF, Policy

WIDE = (torch.float32, torch.float64)


class Metrics(NamedTuple):
    """Sums over the rows whose mask is not 0, and one maximum; 0-d tensors on the device, detached.

    Sums of several calls may be added; divided by `rows` they are means.
    """

    rows: Tensor
    ratio: Tensor  # exp(logp - old_logp)
    clipped_low: Tensor  # rows of negative advantage at the lower bound, whose gradient is 0
    clipped_high: Tensor  # rows of positive advantage at the upper bound
    gap: Tensor  # |old_logp - sampler_logp|, nats
    capped: Tensor  # rows whose importance weight was cut to is_cap
    importance: Tensor
    kl: Tensor  # k3 estimate of KL(policy, reference), nats
    entropy: Tensor  # nats
    gap_max: Tensor


def dr_grpo_loss(
    logp: Tensor,
    advantages: Tensor,
    *,
    denom: float,
    old_logp: Tensor | None = None,
    sampler_logp: Tensor | None = None,
    is_cap: float | None = None,
    ref_logp: Tensor | None = None,
    beta: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """DrGRPO's clipped policy loss, its gradient ready when it returns, and sums to log.

    loss = sum(mask * (beta * k3 - importance * min(ratio * A, clip(ratio) * A) - entropy_coef * entropy)) / denom

    logp, advantages and every other tensor (R,), or all of one other shape; fp32 (fp64 for gradient checks). Gradient
    flows to logp and entropy alone. ratio = exp(logp - old_logp), clipped to [1 - clip_low, 1 + clip_high]; old_logp
    None stands for logp itself, detached: the ratio is exactly 1. importance = min(exp(old_logp - sampler_logp),
    is_cap), detached; 1 without sampler_logp. dual_clip > 1 bounds the loss of a negative advantage at
    dual_clip * |A|. k3 = exp(d) - d - 1 with d = ref_logp - logp. mask: bool, or a weight for each row. denom:
    DrGRPO's constant, P * G * the longest reply; it never depends on what a batch happens to hold, so there is no
    default.

    Same as, for old_logp = sampler_logp = None: -(mask * (logp - logp.detach()).exp() * advantages).sum() / denom.
    Raises ValueError, with both values, for shapes, dtypes or devices that do not fit and options out of range.
    Source: Liu et al. 2025 (Dr. GRPO), Schulman et al. 2017 (clipping), Ye et al. 2020 (dual clip), Schulman 2020 (k3).
    """
    policy = checked(logp, Policy(
        adv=advantages, old_logp=old_logp, sampler_logp=sampler_logp, ref_logp=ref_logp, mask=mask,
        denom=denom, clip_low=clip_low, clip_high=clip_high, is_cap=is_cap, dual_clip=dual_clip, beta=beta,
        entropy_coef=entropy_coef,
    ))  # fmt: skip
    if entropy_coef and entropy is None:
        raise ValueError(f"entropy_coef {entropy_coef} needs entropy; got None")
    if entropy is not None:
        _same("entropy", entropy, logp)
        entropy = entropy.reshape(-1)
    loss, sums = _PolicyLoss.apply(logp.reshape(-1), entropy, policy)  # type: ignore[no-untyped-call]
    return loss, Metrics(*sums.unbind())


class LiveRows(NamedTuple):
    """Result of plan_rows: the rows that carry gradient, in order."""

    # (live,) int64; None: all of them
    index: Tensor | None  # type: ignore[assignment]  # hides tuple.index
    num: int


def plan_rows(mask: Tensor | None, advantages: Tensor, beta: float = 0.0, entropy_coef: float = 0.0) -> LiveRows:
    """Rows worth a forward and a backward: mask not 0, and advantage not 0 unless KL or entropy count.

    mask (R,) bool or weights, or None; advantages (R,). All other rows add exactly nothing to DrGRPO's loss, whose
    denominator is a constant. Waits for the device once, to learn how many there are. ValueError where shapes differ.
    Same as ((mask != 0) & (advantages != 0)).nonzero().
    """
    live = torch.ones_like(advantages, dtype=torch.bool) if beta or entropy_coef else advantages != 0
    if mask is not None:
        _same("mask", mask, advantages, dtype=False)
        live = live & (mask != 0)
    index = live.nonzero()[:, 0]
    return LiveRows(None if len(index) == len(live) else index, len(index))


def checked(logp: Tensor, policy: Policy) -> Policy:
    """The policy with flat, contiguous, detached streams of logp's dtype. ValueErrors as in dr_grpo_loss."""
    _same("logp", logp, logp)
    _positive("denom", policy.denom)
    _positive("is_cap", INF if policy.is_cap is None else policy.is_cap)
    if policy.dual_clip is not None and not policy.dual_clip > 1:
        raise ValueError(f"dual_clip must exceed 1, got {policy.dual_clip}")
    low, high = policy.clip_low, policy.clip_high
    if not (0 <= low <= 1 and high >= 0):
        raise ValueError(f"clip_low must lie in [0, 1] and clip_high be at least 0, got {low} and {high}")
    if policy.beta and policy.ref_logp is None:
        raise ValueError(f"beta {policy.beta} needs ref_logp; got None")
    if policy.is_cap is not None and policy.sampler_logp is None:
        raise ValueError(f"is_cap {policy.is_cap} needs sampler_logp; got None")
    streams = {}
    for name, x in zip(("advantages", "old_logp", "sampler_logp", "ref_logp", "mask"), policy.streams, strict=True):
        if x is not None:
            _same(name, x, logp, dtype=name.endswith("logp"))
            streams["adv" if name == "advantages" else name] = x.detach().reshape(-1).to(logp.dtype).contiguous()
    return replace(policy, **streams)  # type: ignore[arg-type]  # every one a tensor


def policy_rows(logp: Tensor, policy: Policy, entropy: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's loss and its derivative with respect to logp, (R,) each, and the fields of Metrics in one tensor.

    logp, entropy (R,), contiguous, of one dtype and without a graph.
    """
    path = launch.row_path(logp)
    if path == "torch":
        return _rows_torch(logp, policy, entropy)
    if path == "triton":
        on_gpu: tuple[Tensor, Tensor, Tensor] = launch.triton("policy").policy_rows(logp, policy.for_device(), entropy)
        return on_gpu
    term, dlogp, sums = torch.empty_like(logp), torch.empty_like(logp), logp.new_empty(len(Metrics._fields))
    pointers = [launch.address(x) for x in (logp, *policy.streams, entropy, term, dlogp, sums)]
    launch.cpp().policy_rows(len(logp), pointers, policy.scalars)
    return term, dlogp, sums


def _rows_torch(logp: Tensor, policy: Policy, entropy: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    _, clip_low, clip_high, is_cap, dual_clip, beta, entropy_coef, _ = policy.scalars
    adv, mask = policy.adv, torch.ones_like(logp) if policy.mask is None else policy.mask
    old = logp if policy.old_logp is None else policy.old_logp
    ratio = (logp - old).exp()
    # 0 * inf: a row without advantage has no gradient, however far its ratio
    plain = torch.where(adv == 0, 0.0, ratio * adv)
    bound = ratio.clamp(1 - clip_low, 1 + clip_high) * adv
    # where both branches are equal the unclipped one carries the whole gradient
    clipped = bound < plain
    objective = torch.where(clipped, bound, plain)
    # with dual_clip = inf the limit is -inf, or NaN for adv = 0, and neither is larger
    limit = torch.where(adv < 0, dual_clip * adv, -INF)
    dual = limit > objective
    objective = torch.where(dual, limit, objective)
    slope = torch.where(clipped | dual, 0.0, plain)
    gap = torch.zeros_like(logp) if policy.sampler_logp is None else old - policy.sampler_logp
    raw = gap.exp()
    importance = raw.clamp(max=is_cap)
    term, dlogp = -importance * objective, -importance * slope
    kl = torch.zeros_like(logp)
    if policy.ref_logp is not None:
        delta = policy.ref_logp - logp
        kl = delta.exp() - delta - 1
        if beta:
            term, dlogp = term + beta * kl, dlogp + beta * (1 - delta.exp())
    if entropy is not None and entropy_coef:
        term = term - entropy_coef * entropy
    live, scale = mask != 0, mask / policy.denom
    high = clipped & (adv > 0)
    counted = [live, ratio, clipped & ~high, high, gap.abs(), raw >= is_cap, importance, kl]
    counted.append(torch.zeros_like(logp) if entropy is None else entropy)
    sums = [torch.where(live, x, 0).sum().to(logp.dtype) for x in counted]
    most = torch.where(live, gap.abs(), 0).amax() if len(logp) else sums[0]
    zero = torch.zeros_like(term)
    return torch.where(live, scale * term, zero), torch.where(live, scale * dlogp, zero), torch.stack([*sums, most])


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logp: Tensor, entropy: Tensor | None, policy: Policy) -> tuple[Tensor, Tensor]:
        # the kernels read both as plain rows
        entropy = None if entropy is None else entropy.detach().to(logp.dtype).contiguous()
        term, dlogp, sums = policy_rows(logp.detach().contiguous(), policy, entropy)
        ctx.save_for_backward(dlogp, policy.mask)
        ctx.dentropy = -policy.entropy_coef / policy.denom
        ctx.mark_non_differentiable(sums)
        return term.sum(), sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None]:
        dlogp, mask = ctx.saved_tensors
        dentropy = None
        if ctx.needs_input_grad[1]:
            dentropy = (dloss * ctx.dentropy).expand_as(dlogp) * (1 if mask is None else mask)
        return dloss * dlogp, dentropy, None


def _positive(name: str, value: float) -> None:
    if isinstance(value, Tensor) or not value > 0:
        raise ValueError(f"{name} must be a positive number, got {value}")


def _same(name: str, x: Tensor, logp: Tensor, *, dtype: bool = True) -> None:
    if x.shape != logp.shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, logp {tuple(logp.shape)}")
    if x.device != logp.device:
        raise ValueError(f"{name} is on {x.device}, logp on {logp.device}")
    if dtype and x.dtype not in WIDE:
        raise ValueError(f"{name} must be float32 (or float64), got {x.dtype}: bfloat16 loses 0.03 nat")
