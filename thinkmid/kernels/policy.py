"""DrGRPO's loss of a token: clipped objective, detached importance weight, KL, entropy; its derivative; what to log."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from thinkmid.kernels import launch

INF = float("inf")
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Policy:
    """All that makes a row's loss and coefficient but its log-prob. Tensors (R,), contiguous, of logp's dtype."""

    adv: Tensor
    old_logp: Tensor | None = None  # None: the row's own log-prob, detached, so that the ratio is exactly 1
    sampler_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    mask: Tensor | None = None
    denom: float
    clip_low: float = 0.2
    clip_high: float = 0.2
    is_cap: float = INF
    dual_clip: float = INF
    beta: float = 0.0
    entropy_coef: float = 0.0

    def at(self, rows) -> Policy:
        """The same of some rows: a slice or an index."""
        return replace(self, **{n: x[rows] for n, x in self.tensors().items() if x is not None})

    def tensors(self) -> dict[str, Tensor | None]:
        return {f.name: getattr(self, f.name) for f in fields(self)[:5]}

    @property
    def scalars(self) -> list[float]:
        """In the order in which the kernels read them."""
        bounds = [1 / self.denom, self.clip_low, self.clip_high, self.is_cap, self.dual_clip]
        return [*bounds, self.beta, self.entropy_coef, 0.0]

    def for_device(self) -> DevicePolicy:
        """What the Triton kernels take: numbers travel in a tensor, for no kernel is compiled for each value."""
        return DevicePolicy(*self.tensors().values(), _on(self.adv.device, *self.scalars), bool(self.entropy_coef))


@lru_cache(maxsize=16)
def _on(device, *scalars) -> Tensor:
    # kept: a copy to the device for each chunk of each step would wait for it
    return torch.tensor(scalars, dtype=torch.float32, device=device)


class DevicePolicy(NamedTuple):
    adv: Tensor
    old_logp: Tensor | None
    sampler_logp: Tensor | None
    ref_logp: Tensor | None
    mask: Tensor | None
    scalars: Tensor  # (8,) fp32
    has_entropy_grad: bool


def dr_grpo_loss(
    logp,
    advantages,
    *,
    denom,
    old_logp=None,
    sampler_logp=None,
    is_cap=None,
    ref_logp=None,
    beta=0.0,
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=None,
    entropy=None,
    entropy_coef=0.0,
    mask=None,
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
    policy = make_policy(
        logp,
        advantages,
        denom=denom,
        old_logp=old_logp,
        sampler_logp=sampler_logp,
        is_cap=is_cap,
        ref_logp=ref_logp,
        beta=beta,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        entropy_coef=entropy_coef,
        mask=mask,
    )
    if entropy_coef and entropy is None:
        raise ValueError(f"entropy_coef {entropy_coef} needs entropy; got None")
    if entropy is not None:
        _same("entropy", entropy, logp)
        entropy = entropy.reshape(-1)
    loss, sums = _PolicyLoss.apply(logp.reshape(-1), entropy, policy)
    return loss, Metrics(*sums.unbind())


class LiveRows(NamedTuple):
    """Rows that carry gradient, in order."""

    index: Tensor | None  # (live,) int64; None: all of them
    num: int


def plan_rows(mask, advantages, beta=0.0, entropy_coef=0.0) -> LiveRows:
    """Rows worth a forward and a backward: mask not 0, and advantage not 0 unless KL or entropy count.

    mask (R,) bool or weights, or None; advantages (R,). All other rows add exactly nothing to DrGRPO's loss, whose
    denominator is a constant. Waits for the device once, to learn how many there are.
    """
    live = torch.ones_like(advantages, dtype=torch.bool) if beta or entropy_coef else advantages != 0
    if mask is not None:
        _same("mask", mask, advantages, dtype=False)
        live = live & (mask != 0)
    index = live.nonzero()[:, 0]
    return LiveRows(None if len(index) == len(live) else index, len(index))


def make_policy(
    logp,
    advantages,
    *,
    denom,
    is_cap=None,
    dual_clip=None,
    clip_low=0.2,
    clip_high=0.2,
    beta=0.0,
    entropy_coef=0.0,
    mask=None,
    old_logp=None,
    sampler_logp=None,
    ref_logp=None,
) -> Policy:
    """Checked and flat. logp gives shape, dtype and device."""
    _same("logp", logp, logp)
    _positive("denom", denom)
    _positive("is_cap", INF if is_cap is None else is_cap)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must exceed 1, got {dual_clip}")
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise ValueError(f"clip_low must lie in [0, 1] and clip_high be at least 0, got {clip_low} and {clip_high}")
    if beta and ref_logp is None:
        raise ValueError(f"beta {beta} needs ref_logp; got None")
    if is_cap is not None and sampler_logp is None:
        raise ValueError(f"is_cap {is_cap} needs sampler_logp; got None")
    logps = {"old_logp": old_logp, "sampler_logp": sampler_logp, "ref_logp": ref_logp}
    given = {"adv": advantages, **logps, "mask": mask}
    for name, x in given.items():
        if x is not None:
            _same("advantages" if name == "adv" else name, x, logp, dtype=name not in ("adv", "mask"))
            given[name] = x.detach().reshape(-1).to(logp.dtype).contiguous()
    return Policy(
        **given,
        denom=float(denom),
        clip_low=float(clip_low),
        clip_high=float(clip_high),
        is_cap=INF if is_cap is None else float(is_cap),
        dual_clip=INF if dual_clip is None else float(dual_clip),
        beta=float(beta),
        entropy_coef=float(entropy_coef),
    )


def policy_rows(logp, policy: Policy, entropy=None):
    """Each row's loss and its derivative with respect to logp, (R,) each, and the fields of Metrics in one tensor.

    logp, entropy (R,), contiguous, of one dtype and without a graph.
    """
    path = launch.row_path(logp)
    if path == "triton":
        from thinkmid.kernels.gpu.policy import policy_rows as triton_rows

        return triton_rows(logp, policy.for_device(), entropy)
    return (_rows_cpp if path == "cpp" else _rows_torch)(logp, policy, entropy)


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logp, entropy, policy):
        # the kernels read both as plain rows
        entropy = None if entropy is None else entropy.detach().to(logp.dtype).contiguous()
        term, dlogp, sums = policy_rows(logp.detach().contiguous(), policy, entropy)
        ctx.save_for_backward(dlogp, policy.mask)
        ctx.dentropy = -policy.entropy_coef / policy.denom
        ctx.mark_non_differentiable(sums)
        return term.sum(), sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss, _):
        dlogp, mask = ctx.saved_tensors
        dentropy = None
        if ctx.needs_input_grad[1]:
            dentropy = (dloss * ctx.dentropy).expand_as(dlogp) * (1 if mask is None else mask)
        return dloss * dlogp, dentropy, None


def _rows_cpp(logp, policy: Policy, entropy):
    from thinkmid import _csrc

    term, dlogp, sums = torch.empty_like(logp), torch.empty_like(logp), logp.new_empty(len(Metrics._fields))
    pointers = [launch.address(x) for x in (logp, *policy.tensors().values(), entropy, term, dlogp, sums)]
    _csrc.policy_rows(len(logp), pointers, policy.scalars)
    return term, dlogp, sums


def _rows_torch(logp, policy: Policy, entropy):
    adv, mask = policy.adv, torch.ones_like(logp) if policy.mask is None else policy.mask
    old = logp if policy.old_logp is None else policy.old_logp
    ratio = (logp - old).exp()
    # 0 * inf: a row without advantage has no gradient, however far its ratio
    plain = torch.where(adv == 0, 0.0, ratio * adv)
    bound = ratio.clamp(1 - policy.clip_low, 1 + policy.clip_high) * adv
    # where both branches are equal the unclipped one carries the whole gradient
    clipped = bound < plain
    objective = torch.where(clipped, bound, plain)
    # with dual_clip = inf the limit is -inf, or NaN for adv = 0, and neither is larger
    limit = torch.where(adv < 0, policy.dual_clip * adv, -INF)
    dual = limit > objective
    objective = torch.where(dual, limit, objective)
    slope = torch.where(clipped | dual, 0.0, plain)
    gap = torch.zeros_like(logp) if policy.sampler_logp is None else old - policy.sampler_logp
    raw = gap.exp()
    importance = raw.clamp(max=policy.is_cap)
    term, dlogp = -importance * objective, -importance * slope
    kl = torch.zeros_like(logp)
    if policy.ref_logp is not None:
        delta = policy.ref_logp - logp
        kl = delta.exp() - delta - 1
        if policy.beta:
            term, dlogp = term + policy.beta * kl, dlogp + policy.beta * (1 - delta.exp())
    if entropy is not None and policy.entropy_coef:
        term = term - policy.entropy_coef * entropy
    live, scale = mask != 0, mask / policy.denom
    high = clipped & (adv > 0)
    counted = [live, ratio, clipped & ~high, high, gap.abs(), raw >= policy.is_cap, importance, kl]
    counted.append(torch.zeros_like(logp) if entropy is None else entropy)
    sums = [torch.where(live, x, 0).sum().to(logp.dtype) for x in counted]
    most = torch.where(live, gap.abs(), 0).amax() if len(logp) else sums[0]
    zero = torch.zeros_like(term)
    return torch.where(live, scale * term, zero), torch.where(live, scale * dlogp, zero), torch.stack([*sums, most])


def _positive(name, value):
    if isinstance(value, Tensor) or not value > 0:
        raise ValueError(f"{name} must be a positive number, got {value}")


def _same(name, x, logp, *, dtype=True):
    if x.shape != logp.shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, logp {tuple(logp.shape)}")
    if x.device != logp.device:
        raise ValueError(f"{name} is on {x.device}, logp on {logp.device}")
    if dtype and x.dtype not in WIDE:
        raise ValueError(f"{name} must be float32 (or float64), got {x.dtype}: bfloat16 loses 0.03 nat")
