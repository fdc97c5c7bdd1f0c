"""The row kernel: from a chunk of the head's scores to log-probs, entropies, and gradients written over the scores."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from thinkmid.kernels import launch
from thinkmid.kernels.policy import Policy, policy_rows


class Scores(NamedTuple):
    """What stands between hidden @ weight.T and the logits s: s = softcap(z + bias) / temperature."""

    temperature: Tensor | None = None  # (c,), of the statistics' dtype
    bias: Tensor | None = None  # (V,), likewise
    softcap: float | None = None  # softcap(x) = softcap * tanh(x / softcap)

    def at(self, rows) -> Scores:
        return self if self.temperature is None else self._replace(temperature=self.temperature[rows])


class Stats(NamedTuple):
    """(c,) each."""

    logp: Tensor
    entropy: Tensor | None
    lse: Tensor | None


def row_stats(z, targets, scores: Scores, want_entropy: bool) -> Stats:
    """Log-prob of the targets, entropy in nats, log-sum-exp. z (c, V) fp32 or fp64 may be overwritten; targets (c,)."""
    path = launch.row_path(z)
    if path == "triton":
        from thinkmid.kernels.gpu import rows

        return Stats(*rows.row_stats(z, targets, **scores._asdict(), want_entropy=want_entropy))
    if path == "cpp":
        return _cpp(z, targets, scores, want_entropy, z)
    s = _logits(z, scores)
    return _stats(s, targets, want_entropy)


def row_grad(z, targets, stats: Stats, dlogp, dentropy, scores: Scores, out) -> None:
    """Writes the gradient with respect to z into out (c, V), z itself or of another dtype.

    dlogp, dentropy (c,) or None: the loss's derivatives. stats: of the same scores.
    """
    path = launch.row_path(z)
    if path == "triton":
        from thinkmid.kernels.gpu import rows

        entropy = None if dentropy is None else stats.entropy
        rows.row_grad(z, targets, stats.lse, entropy, dlogp, dentropy, **scores._asdict(), out=out)
    elif path == "cpp":
        _cpp(z, targets, scores, False, out, stats=stats, dlogp=dlogp, dentropy=dentropy)
    else:
        s = _logits(z, scores)
        out.copy_(_gradient(s, targets, stats, dlogp, dentropy, scores))


def row_policy(z, targets, policy: Policy, scores: Scores, want_entropy: bool, out) -> Stats:
    """row_stats, and in out the gradient of the policy's loss: a row's coefficient needs its own log-prob only."""
    path = launch.row_path(z)
    want_entropy = want_entropy or bool(policy.entropy_coef)
    if path == "triton":
        from thinkmid.kernels.gpu import rows

        options = {**scores._asdict(), "want_entropy": want_entropy, "out": out}
        return Stats(*rows.row_policy(z, targets, policy.for_device(), **options), None)
    if path == "cpp":
        return _cpp(z, targets, scores, want_entropy, out, policy=policy)
    s = _logits(z, scores)
    stats = _stats(s, targets, want_entropy)
    _, dlogp, _ = policy_rows(stats.logp, policy, stats.entropy)
    dentropy = None
    if policy.entropy_coef:
        dentropy = torch.full_like(dlogp, -policy.entropy_coef / policy.denom)
        dentropy = dentropy if policy.mask is None else dentropy * policy.mask
    out.copy_(_gradient(s, targets, stats, dlogp, dentropy, scores))
    return stats


def _cpp(z, targets, scores, want_entropy, out, *, stats=None, dlogp=None, dentropy=None, policy=None) -> Stats:
    from thinkmid import _csrc

    # csrc sees addresses only
    assert all(x.dtype == torch.float32 and x.stride(1) == 1 for x in (z, out)), f"{z.dtype} {out.dtype}"
    got = stats or Stats(z.new_empty(len(z)), z.new_empty(len(z)) if want_entropy else None, z.new_empty(len(z)))
    mode = "grad" if stats else "policy" if policy else "stats"
    held = (None,) * 5 if policy is None else tuple(policy.tensors().values())
    of_rows = [None if x is None else x.contiguous() for x in (dlogp, dentropy)]
    tensors = (z, out, targets, scores.temperature, scores.bias, *got, *of_rows, *held)
    _csrc.rows(
        mode,
        *z.shape,
        z.stride(0),
        out.stride(0),
        scores.softcap or 0.0,
        [launch.address(x) for x in tensors],
        policy.scalars if policy else [],
    )
    return got


def _logits(z, scores: Scores):
    if scores.bias is not None:
        z.add_(scores.bias)
    if scores.softcap:
        z.div_(scores.softcap).tanh_().mul_(scores.softcap)
    return z if scores.temperature is None else z.div_(scores.temperature[:, None])


def _stats(s, targets, want_entropy) -> Stats:
    # differences from the maximum: s - lse would round away what is left of a log-prob near 0
    most = s.amax(-1, keepdim=True)
    e = (s - most).exp_()
    log_sum = e.sum(-1, keepdim=True).log_()
    logp = s.gather(1, targets[:, None]) - most - log_sum
    # a token of probability 0 adds nothing, where p * log p would be 0 * -inf; lse - sum(p s) would cancel
    entropy = torch.special.entr(e.mul_((-log_sum).exp_())).sum(-1) if want_entropy else None
    return Stats(logp[:, 0], entropy, (most + log_sum)[:, 0])


def _gradient(s, targets, stats: Stats, dlogp, dentropy, scores: Scores):
    """With respect to the raw scores, overwriting the logits s."""
    slope = None if not scores.softcap else _softcap_slope(s, scores)
    # d logp_y / ds = onehot - p;  d entropy / ds = -p (log p + entropy)
    logp_all = s.sub_(stats.lse[:, None])
    at_target = targets[:, None]
    scale = torch.zeros_like(stats.lse) if dlogp is None else dlogp
    # 1 - p of the target is formed from its log-prob: the difference would lose what is left of it near 1
    hit = scale * -stats.logp.expm1()
    if dentropy is None:
        ds = logp_all.exp_().mul_(-scale[:, None])
    else:
        p = logp_all.exp()
        bend = dentropy[:, None] * (logp_all + stats.entropy[:, None]).masked_fill_(p == 0, 0.0)
        hit -= (bend * p).gather(1, at_target)[:, 0]
        ds = p.mul_(-(bend + scale[:, None]))
    ds.scatter_(1, at_target, hit[:, None])
    if slope is not None:
        ds.mul_(slope)
    return ds if scores.temperature is None else ds.div_(scores.temperature[:, None])


def _softcap_slope(s, scores: Scores):
    tanh = s / scores.softcap if scores.temperature is None else s * (scores.temperature[:, None] / scores.softcap)
    return 1 - tanh.square_()
