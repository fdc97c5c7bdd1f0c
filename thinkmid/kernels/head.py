"""Log-prob and entropy of a linear head, in chunks of rows: logits never exist for more than one chunk."""

from __future__ import annotations

import torch

# bytes of fp32 logits alive at a time: on CPU a chunk should stay in the last cache level
CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 1 << 30}


def linear_logprob(hidden, weight, targets, *, temperature: float = 1.0, return_entropy: bool = False):
    """Log-prob of targets, and entropy. Same as log_softmax(hidden @ weight.T / temperature)[arange(R), targets].

    hidden (R, D), weight (V, D) of one dtype; targets (R,) int64 in [0, V). Returns logp (R,), and entropy (R,) in nats
    if asked for, else (0,); fp32 (fp64 for fp64 inputs), both differentiable with respect to hidden and weight. The
    backward pass forms the logits again, chunk by chunk.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden (R, D), weight (V, D), targets (R,); got {hidden.shape=} {weight.shape=} {targets.shape=}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return _LinearLogprob.apply(hidden, weight, targets, temperature, return_entropy)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, return_entropy):
        parts = []
        for h, y in _chunks(hidden, targets, weight):
            z = _scores(h, weight, temperature)  # (c, V)
            lse = z.logsumexp(-1)
            logp = z.gather(1, y[:, None])[:, 0] - lse
            parts.append((logp, _entropy(z.sub_(lse[:, None])) if return_entropy else logp.new_zeros(0), lse))
        logp, entropy, lse = (torch.cat(p) for p in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    def backward(ctx, dlogp, dentropy):
        if dlogp is None and dentropy is None:
            return (None,) * 5
        hidden, weight, targets, lse = ctx.saved_tensors
        dhidden = torch.empty_like(hidden)
        dweight = torch.zeros_like(weight, dtype=_wide(weight))
        start = 0
        for h, y in _chunks(hidden, targets, weight):
            at = slice(start, start + len(y))
            dz = _dscores(
                h, weight, y, lse[at], ctx.temperature, *(None if d is None else d[at] for d in (dlogp, dentropy))
            )
            dhidden[at] = dz @ weight
            dweight += dz.T @ h
            start += len(y)
        return dhidden, dweight.to(weight.dtype), None, None, None


def _dscores(h, weight, y, lse, temperature, dlogp, dentropy):
    """Gradient of the loss with respect to h @ weight.T, (c, V) in h's dtype."""
    logp_all = _scores(h, weight, temperature).sub_(lse[:, None])
    # d logp_y / dz = onehot - p;  d entropy / dz = -p (log p + entropy)
    if dentropy is None:
        dz = logp_all.exp_().mul_(-dlogp[:, None])
    else:
        scale = dentropy[:, None] * (logp_all + _entropy(logp_all)[:, None]).nan_to_num_(neginf=0.0)
        dz = -logp_all.exp() * (scale if dlogp is None else scale + dlogp[:, None])
    if dlogp is not None:
        dz[torch.arange(len(y), device=y.device), y] += dlogp
    return dz.div_(temperature).to(h.dtype) if temperature != 1 else dz.to(h.dtype)


def _scores(h, weight, temperature):
    z = (h @ weight.T).to(_wide(h))
    return z.div_(temperature) if temperature != 1 else z


def _entropy(logp_all):
    # a token of probability 0 adds nothing: 0 * -inf would be NaN. lse - sum(p z) would cancel where logits are large
    return -logp_all.exp().mul_(logp_all).nan_to_num_(nan=0.0).sum(-1)


def _wide(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunks(hidden, targets, weight):
    budget = CHUNK_BYTES.get(hidden.device.type, 1 << 30)
    size = max(16, budget // (4 * weight.shape[0]))
    return list(zip(hidden.split(size), targets.split(size), strict=True)) or [(hidden, targets)]
