"""Others' ways to the same loss, gradient and log-probs: packages as installed, published designs in our own words.

Every rival takes a Case. `losses` and `cross_entropies` return a scalar to differentiate, `scores` log-probs without a
gradient. A package that is not installed is left out and named by `missing`.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP = 0.2
PACKAGES = {"liger_kernel": "liger-kernel", "trl": "trl", "cut_cross_entropy": "cut-cross-entropy"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One head and the loss of N tokens: sum of -min(ratio * advantage, clip(ratio) * advantage) / denom."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (N,)
    advantages: Tensor  # (N,)
    old_logp: Tensor  # (N,)
    denom: float

    def to(self, dtype: torch.dtype) -> Case:
        """Hidden and weight in dtype, the streams in at least fp32; leaves of a new graph."""
        wide = torch.promote_types(dtype, torch.float32)
        return replace(
            self,
            hidden=self.hidden.detach().to(dtype).requires_grad_(),
            weight=self.weight.detach().to(dtype).requires_grad_(),
            advantages=self.advantages.to(wide),
            old_logp=self.old_logp.to(wide),
        )

    def rows(self, index: Tensor) -> Case:
        return replace(self, **{n: getattr(self, n)[index] for n in ("hidden", "targets", "advantages", "old_logp")})


def dr_grpo(logp: Tensor, case: Case) -> Tensor:
    """The loss as a trainer writes it on log-probs."""
    ratio = (logp - case.old_logp).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    return -torch.min(ratio * case.advantages, clipped * case.advantages).sum() / case.denom


def missing() -> list[str]:
    return [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]


def _have(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


# log-probs of the targets, each by another route; differentiable


def naive_logprob(case: Case) -> Tensor:
    logits = case.hidden @ case.weight.T  # (N, V)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.log_softmax(-1).gather(1, case.targets[:, None])[:, 0]


def verl_logprob(case: Case) -> Tensor:
    """512 tokens at a time over the whole vocabulary; weight gradient summed in the weight's dtype."""
    return TiledLogprob.apply(case.hidden, case.weight, case.targets, 512, case.weight.shape[0])


def prime_rl_logprob(case: Case) -> Tensor:
    """1024 tokens by 8192 columns, online log-sum-exp; weight gradient summed in the weight's dtype."""
    return TiledLogprob.apply(case.hidden, case.weight, case.targets, 1024, 8192)


def liger_scaled_logprob(case: Case) -> Tensor:
    """The fused op of Hopper where there is one, elsewhere its 512-token fallback."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    nll = LigerFusedLinearScaledCrossEntropyFunction.apply(case.hidden, case.weight, case.targets)
    return -(nll[0] if isinstance(nll, tuple) else nll)


def trl_logprob(case: Case, *, temperature=1.0, softcap=None, outputs=()) -> Tensor | tuple[Tensor, ...]:
    from trl.kernels import ChunkedLogProbFunction

    _without_trl_trainer()
    logp, *rest = ChunkedLogProbFunction.apply(
        case.hidden, case.weight, None, case.targets, temperature, 32768, softcap, 1.0, outputs
    )
    return (logp, *rest) if outputs else logp


def _without_trl_trainer():
    """Its backward asks the trainer's utilities to gather ZeRO-3 shards; those need datasets and accelerate.

    There are no shards here: where the import fails, an empty context takes the place of that one function.
    """
    try:
        import trl.trainer.utils  # noqa: F401
    except ImportError:
        stand_in = types.ModuleType("trl.trainer.utils")
        stand_in.maybe_gather_lm_head_ctx = lambda *parameters: nullcontext()
        sys.modules["trl.trainer.utils"] = stand_in


class TiledLogprob(torch.autograd.Function):
    """Tiles of tokens by columns of the vocabulary, formed once in the forward and again in the backward."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, num_tokens, num_columns):
        logp, lse = [], []
        for h, y in zip(hidden.split(num_tokens), targets.split(num_tokens), strict=True):
            top = h.new_full((len(h),), -torch.inf, dtype=torch.float32)
            total, picked = torch.zeros_like(top), torch.zeros_like(top)
            for start, w in _columns(weight, num_columns):
                z = (h @ w.T).float()  # (c, v)
                new_top = torch.maximum(top, z.amax(-1))
                total = total * (top - new_top).exp() + (z - new_top[:, None]).exp().sum(-1)
                top = new_top
                here = (y >= start) & (y < start + len(w))
                local = (y - start).clamp(0, len(w) - 1)
                picked += torch.where(here, z.gather(1, local[:, None])[:, 0], 0.0)
            lse.append(top + total.log())
            logp.append(picked - lse[-1])
        ctx.save_for_backward(hidden, weight, targets, torch.cat(lse))
        ctx.tile = num_tokens, num_columns
        return torch.cat(logp)

    @staticmethod
    def backward(ctx, dlogp):
        hidden, weight, targets, lse = ctx.saved_tensors
        num_tokens, num_columns = ctx.tile
        dhidden, dweight = torch.zeros_like(hidden), torch.zeros_like(weight)
        for at in torch.arange(len(hidden), device=hidden.device).split(num_tokens):
            rows = slice(int(at[0]), int(at[-1]) + 1)
            h, y, g = hidden[rows], targets[rows], dlogp[rows, None]
            for start, w in _columns(weight, num_columns):
                dz = ((h @ w.T).float() - lse[rows, None]).exp() * -g
                here = ((y >= start) & (y < start + len(w))).nonzero()[:, 0]
                dz[here, y[here] - start] += g[here, 0]
                dz = dz.to(h.dtype)
                dhidden[rows] += dz @ w
                dweight[start : start + len(w)] += dz.T @ h
        return dhidden, dweight, None, None, None


def _columns(weight, num):
    return ((start, weight[start : start + num]) for start in range(0, len(weight), num))


def liger_grpo_loss(case: Case, **options) -> Tensor:
    """LigerFusedLinearGRPOLoss, each token a sequence of one, all in one chunk: its cheapest layout."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    num = len(case.targets)
    streams = {k: options.pop(k)[:, None] for k in ("vllm_is_ratio", "ref_per_token_logps") if k in options}
    settings = {"beta": 0.0, "compiled": False, "epsilon_low": CLIP, "epsilon_high": CLIP}
    settings["use_ref_model"] = "ref_per_token_logps" in streams
    loss = LigerFusedLinearGRPOLoss(
        loss_type="dr_grpo", max_completion_length=case.denom / num, chunk_size=num, **settings | options
    )
    mask = torch.ones(num, 1, device=case.hidden.device)
    return loss(
        case.hidden[:, None], case.weight, case.targets[:, None], mask, case.advantages,
        old_per_token_logps=case.old_logp[:, None], **streams,
    )  # fmt: skip


def losses(device: str = "cpu") -> dict[str, Callable[[Case], Tensor]]:
    """DrGRPO loss by every route that is installed."""
    rivals = {"naive autograd": lambda c: dr_grpo(naive_logprob(c), c)}
    if _have("liger_kernel"):
        rivals["Liger chunked GRPO"] = lambda c: liger_grpo_loss(c)[0]
        where = "fallback" if device == "cpu" else "fused"
        rivals[f"Liger scaled CE, {where}"] = lambda c: dr_grpo(liger_scaled_logprob(c), c)
    if _have("trl"):
        rivals["TRL chunked log-prob"] = lambda c: dr_grpo(trl_logprob(c), c)
    rivals["prime-rl's tiles"] = lambda c: dr_grpo(prime_rl_logprob(c), c)
    rivals["verl's chunks"] = lambda c: dr_grpo(verl_logprob(c), c)
    return rivals


def scores() -> dict[str, Callable[[Case], Tensor]]:
    """Log-probs without a gradient."""
    rivals = {"naive log_softmax": naive_logprob, "logsumexp, 256 rows at a time": logsumexp_logprob}
    if _have("liger_kernel"):
        rivals["Liger chunked log-prob"] = liger_logprob
        rivals["Liger scaled CE"] = liger_scaled_logprob
    if _have("trl"):
        rivals["TRL chunked log-prob"] = trl_logprob
    rivals["prime-rl's tiles"] = prime_rl_logprob
    rivals["verl's chunks"] = verl_logprob
    return {name: torch.no_grad()(fn) for name, fn in rivals.items()}


def logsumexp_logprob(case: Case) -> Tensor:
    parts = []
    for h, y in zip(case.hidden.split(256), case.targets.split(256), strict=True):
        z = (h @ case.weight.T).float()
        parts.append(z.gather(1, y[:, None])[:, 0] - z.logsumexp(-1))
    return torch.cat(parts)


def liger_logprob(case: Case) -> Tensor:
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    return LigerFusedLinearPPOBase.chunk_forward(case.hidden[None], case.weight, case.targets[None])[0]


def cross_entropies(device: str = "cpu", *, compiled: bool = True) -> dict[str, Callable[[Case], Tensor]]:
    """Sum of -logp / denom: SFT's loss."""

    def naive(case):
        logits = case.hidden @ case.weight.T
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(wide, case.targets, reduction="sum") / case.denom

    rivals = {"naive cross_entropy": naive}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        for size in (None, 256, 1024):
            name = f"F.linear_cross_entropy, {'automatic' if size is None else f'{size} rows'}"
            rivals[name] = lambda c, size=size: _torch_linear_cross_entropy(c, size)
    if _have("cut_cross_entropy") and compiled:
        impl = "torch_compile" if device == "cpu" else "cce"
        rivals[f"cut-cross-entropy, {impl}"] = lambda c: _cut_cross_entropy(c, impl)
    if _have("liger_kernel") and device != "cpu":
        rivals["Liger FLCE"] = _liger_flce
    return rivals


def _torch_linear_cross_entropy(case, batch_chunk_size):
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=batch_chunk_size)
    return F.linear_cross_entropy(case.hidden, case.weight, case.targets, reduction="sum", options=options) / case.denom


def _cut_cross_entropy(case, impl):
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(case.hidden, case.weight, case.targets, reduction="sum", impl=impl) / case.denom


def _liger_flce(case):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss = liger_fused_linear_cross_entropy(case.hidden, case.weight, case.targets, reduction="sum")
    return (loss[0] if isinstance(loss, tuple) else loss) / case.denom
