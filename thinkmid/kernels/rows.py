"""The row kernel: from a chunk of the head's scores to log-probs, entropies, and gradients written over the scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thinkmid.kernels import launch
from thinkmid.kernels.policy import policy_rows
from thinkmid.kernels.streams import Policy, Scores, Stats


def row_stats(z: Tensor, targets: Tensor, scores: Scores, want_entropy: bool) -> Stats:
    """Log-prob of the targets, entropy and log-sum-exp of each row, in nats.

    z (c, V) fp32 or fp64, which may be overwritten; targets (c,) int64.
    Same as s = softcap(z + bias) / temperature; s.log_softmax(-1)[arange(c), targets], and so on.
    """
    path = launch.row_path(z)
    if path == "triton":
        on_gpu: Stats = launch.triton("rows").row_stats(z, targets, scores, want_entropy)
        return on_gpu
    if path == "torch":
        return _stats(_logits(z, scores), targets, want_entropy)
    stats = _empty_stats(z, want_entropy)
    _cpp("stats", z, z, scores, (targets, *stats, None, None))
    return stats


def row_grad(
    z: Tensor, targets: Tensor, stats: Stats, dlogp: Tensor | None, dentropy: Tensor | None, scores: Scores, out: Tensor
) -> None:
    """Writes the gradient with respect to z into out (c, V), z itself or of another dtype.

    dlogp, dentropy (c,) or None: the loss's derivatives. stats: of the same scores.
    """
    path = launch.row_path(z)
    if path == "triton":
        launch.triton("rows").row_grad(z, targets, stats, dlogp, dentropy, scores, out)
    elif path == "torch":
        out.copy_(_gradient(_logits(z, scores), targets, stats, dlogp, dentropy, scores))
    else:
        given = [None if x is None else x.contiguous() for x in (dlogp, dentropy)]
        _cpp("grad", z, out, scores, (targets, *stats, *given))


def row_policy(z: Tensor, targets: Tensor, policy: Policy, scores: Scores, want_entropy: bool, out: Tensor) -> Stats:
    """row_stats, and in out the gradient of the policy's loss: a row's coefficient needs its own log-prob only."""
    path = launch.row_path(z)
    want_entropy = want_entropy or bool(policy.entropy_coef)
    if path == "triton":
        stats: Stats = launch.triton("rows").row_policy(z, targets, policy.for_device(), scores, want_entropy, out)
        return stats
    if path == "cpp":
        stats = _empty_stats(z, want_entropy)
        _cpp("policy", z, out, scores, (targets, *stats, None, None), policy)
        return stats
    s = _logits(z, scores)
    stats = _stats(s, targets, want_entropy)
    _, dlogp, _ = policy_rows(stats.logp, policy, stats.entropy)
    dentropy = None
    if policy.entropy_coef:
        dentropy = torch.full_like(dlogp, -policy.entropy_coef / policy.denom)
        dentropy = dentropy if policy.mask is None else dentropy * policy.mask
    out.copy_(_gradient(s, targets, stats, dlogp, dentropy, scores))
    return stats


def _empty_stats(z: Tensor, want_entropy: bool) -> Stats:
    return Stats(z.new_empty(len(z)), z.new_empty(len(z)) if want_entropy else None, z.new_empty(len(z)))


def _cpp(
    mode: str, z: Tensor, out: Tensor, scores: Scores, rows: Sequence[Tensor | None], policy: Policy | None = None
) -> None:
    """rows: targets, log-probs, entropies, log-sum-exps, dlogp, dentropy."""
    # csrc sees addresses only
    assert all(x.dtype == torch.float32 and x.stride(1) == 1 for x in (z, out)), f"{z.dtype} {out.dtype}"
    tensors = (z, out, rows[0], scores.temperature, scores.bias, *rows[1:], *(policy.streams if policy else [None] * 5))
    pointers, scalars = [launch.address(x) for x in tensors], policy.scalars if policy else []
    launch.cpp().rows(mode, *z.shape, z.stride(0), out.stride(0), scores.softcap or 0.0, pointers, scalars)


def _logits(z: Tensor, scores: Scores) -> Tensor:
    if scores.bias is not None:
        z.add_(scores.bias)
    if scores.softcap:
        z.div_(scores.softcap).tanh_().mul_(scores.softcap)
    return z if scores.temperature is None else z.div_(scores.temperature[:, None])


def _stats(s: Tensor, targets: Tensor, want_entropy: bool) -> Stats:
    # differences from the maximum: s - lse would round away what is left of a log-prob near 0
    most = s.amax(-1, keepdim=True)
    e = (s - most).exp_()
    log_sum = e.sum(-1, keepdim=True).log_()
    logp = s.gather(1, targets[:, None]) - most - log_sum
    # a token of probability 0 adds nothing, where p * log p would be 0 * -inf; lse - sum(p s) would cancel
    entropy = torch.special.entr(e.mul_((-log_sum).exp_())).sum(-1) if want_entropy else None
    return Stats(logp[:, 0], entropy, (most + log_sum)[:, 0])


def _gradient(
    s: Tensor, targets: Tensor, stats: Stats, dlogp: Tensor | None, dentropy: Tensor | None, scores: Scores
) -> Tensor:
    """With respect to the raw scores, overwriting the logits s."""
    assert stats.lse is not None
    slope = _softcap_slope(s, scores.softcap, scores.temperature) if scores.softcap else None
    # d logp_y / ds = onehot - p;  d entropy / ds = -p (log p + entropy)
    logp_all = s.sub_(stats.lse[:, None])
    at_target = targets[:, None]
    scale = torch.zeros_like(stats.lse) if dlogp is None else dlogp
    # 1 - p of the target is formed from its log-prob: the difference would lose what is left of it near 1
    hit = scale * -stats.logp.expm1()
    if dentropy is None:
        ds = logp_all.exp_().mul_(-scale[:, None])
    else:
        assert stats.entropy is not None
        p = logp_all.exp()
        bend = dentropy[:, None] * (logp_all + stats.entropy[:, None]).masked_fill_(p == 0, 0.0)
        hit -= (bend * p).gather(1, at_target)[:, 0]
        ds = p.mul_(-(bend + scale[:, None]))
    ds.scatter_(1, at_target, hit[:, None])
    if slope is not None:
        ds.mul_(slope)
    return ds if scores.temperature is None else ds.div_(scores.temperature[:, None])


def _softcap_slope(s: Tensor, softcap: float, temperature: Tensor | None) -> Tensor:
    tanh = s / softcap if temperature is None else s * (temperature[:, None] / softcap)
    return 1 - tanh.square_()
