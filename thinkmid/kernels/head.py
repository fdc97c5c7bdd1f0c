"""Log-prob and entropy of a linear head, in chunks of rows: logits never exist for more than one chunk."""

from __future__ import annotations

import torch

# bytes of fp32 logits alive at a time: on CPU a chunk should stay in the last cache level
CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 1 << 30}


def linear_logprob(hidden, weight, targets, *, temperature: float = 1.0):
    """Log-prob of targets, and entropy. Same as log_softmax(hidden @ weight.T / temperature)[arange(R), targets].

    hidden (R, D), weight (V, D) of one dtype; targets (R,) int64 in [0, V). Returns logp (R,) and entropy (R,) in nats,
    fp32 (fp64 for fp64 inputs), both differentiable with respect to hidden and weight. The backward pass forms the
    logits again, chunk by chunk.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(f"hidden (R, D), weight (V, D), targets (R,); got {hidden.shape=} {weight.shape=} {targets.shape=}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return _LinearLogprob.apply(hidden, weight, targets, temperature)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        parts = [_stats(h, weight, y, temperature)[:2] for h, y in _chunks(hidden, targets, weight)]
        logp, entropy = (torch.cat(p) for p in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    def backward(ctx, dlogp, dentropy):
        hidden, weight, targets = ctx.saved_tensors
        dhidden = torch.empty_like(hidden)
        dweight = torch.zeros_like(weight, dtype=_wide(weight))
        start = 0
        for h, y in _chunks(hidden, targets, weight):
            at = slice(start, start + len(y))
            _, entropy, logp_all = _stats(h, weight, y, ctx.temperature)
            p = logp_all.exp()  # (c, V)
            # d logp_y / dz = onehot - p;  d entropy / dz = -p (log p + entropy)
            dz = torch.zeros_like(p) if dentropy is None else -dentropy[at, None] * p * (logp_all + entropy[:, None])
            if dlogp is not None:
                dz -= dlogp[at, None] * p
                dz[torch.arange(len(y), device=y.device), y] += dlogp[at]
            dz = (dz / ctx.temperature).to(h.dtype)
            dhidden[at] = dz @ weight
            dweight += dz.T @ h
            start += len(y)
        return dhidden, dweight.to(weight.dtype), None, None


def _wide(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunks(hidden, targets, weight):
    budget = CHUNK_BYTES.get(hidden.device.type, 1 << 30)
    size = max(16, budget // (4 * weight.shape[0]))
    return list(zip(hidden.split(size), targets.split(size), strict=True)) or [(hidden, targets)]


def _stats(h, weight, y, temperature):
    """logp (c,), entropy (c,), log-probs of the whole vocabulary (c, V)."""
    logits = (h @ weight.T).to(_wide(h)) / temperature
    logp_all = logits.log_softmax(-1)
    # 0 * -inf is NaN where a logit is -inf; such tokens add nothing
    entropy = -(logp_all.exp() * logp_all).nan_to_num_(0.0).sum(-1)
    return logp_all.gather(1, y[:, None])[:, 0], entropy, logp_all
