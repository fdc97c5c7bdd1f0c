"""Triton twin of the policy's terms: one formula, used row by row here and inside the head's row kernel."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from thinkmid.kernels.streams import DevicePolicy

NUM_METRICS = 10  # nine sums, then gap_max
BLOCK_R = 1024


@triton.jit
def policy_terms(logp, adv, old, sampler, ref, mask, scalars_ptr):
    """For a row or a block of rows: loss without its entropy term, d loss / d logp, what is logged. None: absent."""
    inv_denom = tl.load(scalars_ptr)
    clip_low = tl.load(scalars_ptr + 1)
    clip_high = tl.load(scalars_ptr + 2)
    is_cap = tl.load(scalars_ptr + 3)
    dual_clip = tl.load(scalars_ptr + 4)
    beta = tl.load(scalars_ptr + 5)
    zero = tl.where(logp == logp, 0.0, logp)  # keeps NaN, so that a broken row shows in the loss
    if old is None:
        ratio = zero + 1.0
        old = logp
    else:
        ratio = tl.exp(logp - old)
    # an advantage of 0 gives 0 even where the ratio overflows
    free = tl.where(adv == 0.0, zero, ratio * adv)
    bound = tl.minimum(tl.maximum(ratio, 1.0 - clip_low), 1.0 + clip_high) * adv
    clipped = (adv != 0.0) & (bound < free)  # strictly: at a tie the free branch carries the gradient
    objective = tl.where(clipped, bound, free)
    dual = (adv < 0.0) & (dual_clip * adv > objective)
    objective = tl.where(dual, dual_clip * adv, objective)
    slope = tl.where(clipped | dual, 0.0, free)
    gap = zero
    importance = zero + 1.0
    if sampler is not None:
        gap = old - sampler
        raw = tl.exp(gap)
        importance = tl.where(raw >= is_cap, is_cap, raw)
    weight = mask * inv_denom
    # 0 * inf: neither a weight nor a coefficient of 0 may turn an overflow into NaN
    loss = tl.where(adv == 0.0, zero, -importance * objective)
    grad = tl.where(slope == 0.0, 0.0, -importance * slope)
    kl = zero
    if ref is not None:
        delta = ref - logp
        odds = tl.exp(delta)
        kl = odds - delta - 1.0
        loss += tl.where(beta == 0.0, 0.0, beta * kl)
        grad += tl.where(beta == 0.0, 0.0, beta * (1.0 - odds))
    loss = tl.where(mask == 0.0, 0.0, weight * loss)
    grad = tl.where(mask == 0.0, 0.0, weight * grad)
    return loss, grad, ratio, clipped, gap, importance, importance >= is_cap, kl


@triton.jit
def load_rows(x_ptr, rows, live):
    """None where the stream is absent, which Triton resolves when it compiles."""
    if x_ptr is None:
        x = None
    else:
        x = tl.load(x_ptr + rows, mask=live, other=0.0)
    return x


@triton.jit
def load_mask(mask_ptr, rows, live):
    if mask_ptr is None:
        mask = tl.where(live, 1.0, 0.0)
    else:
        mask = tl.load(mask_ptr + rows, mask=live, other=0.0)
    return mask


@triton.jit
def _sum_kept(x, kept):
    return tl.sum(tl.where(kept, x, 0.0), 0)


@triton.jit
def _policy_kernel(
    logp_ptr, adv_ptr, old_ptr, sampler_ptr, ref_ptr, mask_ptr, entropy_ptr, scalars_ptr, loss_ptr, dlogp_ptr,
    sums_ptr, num_rows, BLOCK_R: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    rows = block * BLOCK_R + tl.arange(0, BLOCK_R)
    live = rows < num_rows
    mask = load_mask(mask_ptr, rows, live)
    loss, grad, ratio, clipped, gap, importance, capped, kl = policy_terms(
        tl.load(logp_ptr + rows, mask=live, other=0.0), tl.load(adv_ptr + rows, mask=live, other=0.0),
        load_rows(old_ptr, rows, live), load_rows(sampler_ptr, rows, live), load_rows(ref_ptr, rows, live), mask,
        scalars_ptr,
    )  # fmt: skip
    kept = mask != 0.0
    sums_ptr += block * 10
    if entropy_ptr is not None:
        entropy = tl.load(entropy_ptr + rows, mask=live, other=0.0)
        coef = tl.load(scalars_ptr + 6)
        bonus = mask * tl.load(scalars_ptr) * tl.where(coef == 0.0, 0.0, coef * entropy)
        loss -= tl.where(mask == 0.0, 0.0, bonus)
        tl.store(sums_ptr + 8, _sum_kept(entropy, kept))
    else:
        tl.store(sums_ptr + 8, 0.0)
    tl.store(loss_ptr + rows, loss, mask=live)
    tl.store(dlogp_ptr + rows, grad, mask=live)
    adv = tl.load(adv_ptr + rows, mask=live, other=0.0)
    tl.store(sums_ptr, _sum_kept(1.0, kept))
    tl.store(sums_ptr + 1, _sum_kept(ratio, kept))
    tl.store(sums_ptr + 2, _sum_kept(1.0, kept & clipped & (adv < 0.0)))
    tl.store(sums_ptr + 3, _sum_kept(1.0, kept & clipped & (adv > 0.0)))
    tl.store(sums_ptr + 4, _sum_kept(tl.abs(gap), kept))
    tl.store(sums_ptr + 5, _sum_kept(1.0, kept & capped))
    tl.store(sums_ptr + 6, _sum_kept(importance, kept))
    tl.store(sums_ptr + 7, _sum_kept(kl, kept))
    tl.store(sums_ptr + 9, tl.max(tl.where(kept, tl.abs(gap), 0.0), 0))


def policy_rows(logp: Tensor, policy: DevicePolicy, entropy: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each row (R,), its derivative with respect to logp (R,), and the metrics (10,), gap_max last.

    Sums are taken block by block and then over the blocks, always in that order: two runs agree bit for bit.
    """
    num_rows = logp.shape[0]
    blocks = triton.cdiv(num_rows, BLOCK_R)
    loss, dlogp = torch.empty_like(logp), torch.empty_like(logp)
    sums = logp.new_zeros(max(blocks, 1), NUM_METRICS)
    if num_rows:
        with on_device_of(logp):
            _policy_kernel[(blocks,)](
                logp, *policy[:5], entropy, policy.scalars, loss, dlogp, sums, num_rows, BLOCK_R=BLOCK_R, num_warps=4,
                enable_fp_fusion=True,
            )  # fmt: skip
    return loss, dlogp, torch.cat((sums[:, :9].sum(0), sums[:, 9:].amax(0)))


def on_device_of(x: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device, which need not be the tensors' own."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
