"""Triton twin of the head's row kernel: a program per row of a chunk of scores, a sweep for statistics, one for dz."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from thinkmid.kernels.gpu.policy import load_mask, load_rows, on_device_of, policy_terms
from thinkmid.kernels.streams import DevicePolicy, Scores, Stats

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# a running maximum starts at a finite number: -inf - -inf would be NaN in a lane that has seen only -inf
LOWEST: tl.constexpr = tl.constexpr(-3.0e38)
# columns that a thread takes at once: two 128-bit loads of fp32, one 128-bit store of bf16
VEC: tl.constexpr = tl.constexpr(8)


@triton.jit
def tanh(u):
    """tanh to a few ulp. Triton has none that its interpreter knows; 1 - 2 / (e^2u + 1) alone cancels near 0."""
    square = u * u
    # minimax fit of (tanh(u) / u - 1) / u^2 on |u| < 0.625, relative error 4e-9
    poly = -5.7049901e-3 * square + 2.0639090e-2
    poly = poly * square - 5.3739715e-2
    poly = poly * square + 1.3331442e-1
    poly = poly * square - 3.3333281e-1
    near = u + u * square * poly
    far = 1.0 - 2.0 / (tl.exp2(tl.abs(u) * 2.8853900817779268) + 1.0)
    far = tl.where(u < 0.0, -far, far)
    return tl.where(tl.abs(u) < 0.625, near, far)


@triton.jit
def _scores(z_ptr, bias_ptr, cols, live, SOFTCAP: tl.constexpr):
    """softcap(z + bias), not yet divided by the temperature; -inf beyond the row."""
    x = tl.load(z_ptr + cols, mask=live, other=float("-inf"))
    if bias_ptr is not None:
        x += tl.load(bias_ptr + cols, mask=live, other=0.0)
    if SOFTCAP is not None:
        # the mask comes last: a capped -inf would be -cap, a score like any other
        x = tl.where(live, SOFTCAP * tanh(x / SOFTCAP), float("-inf"))
    return x


@triton.jit
def _lanes(start, V, BLOCK_V: tl.constexpr):
    """Columns (lanes, VEC) of a block, and which of them exist."""
    cols = tl.arange(0, BLOCK_V // VEC)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    cols += start
    return cols, cols < V


@triton.jit
def rescaled(s1, s2, m, m_new, scale):
    """S1 and S2 of a maximum m as they are of m_new >= m."""
    # a first maximum of LOWEST is a shift beyond fp32; its sums are 0, and 0 * -1e4 is 0 where 0 * -inf is not
    shift = tl.maximum((m - m_new) * scale, -1.0e4)
    fade = tl.exp2(shift)
    return fade * s1, fade * (s2 + s1 * shift)


@triton.jit
def absorbed(x, m, s1, s2, scale, scale_x, WITH_ENTROPY: tl.constexpr):
    """m, S1 and S2 with one more block of scores x (.., columns); scale_x is the scale as it multiplies x."""
    m_new = tl.maximum(m, tl.max(x, 1))
    u = (x - m_new[:, None]) * scale_x
    e = tl.exp2(u)
    s1, s2 = rescaled(s1, s2, m, m_new, scale)
    s1 += tl.sum(e, 1)
    if WITH_ENTROPY:
        # 2^u = 0 adds 0, though u may be -inf; NaN is not 0 and stays
        s2 += tl.sum(tl.where(e == 0.0, 0.0, e * u), 1)
    return m_new, s1, s2


@triton.jit
def _statistics(z_ptr, bias_ptr, y, scale, V, SOFTCAP: tl.constexpr, WITH_ENTROPY: tl.constexpr, BLOCK_V: tl.constexpr):
    """(largest score m, S1 = sum 2^u, S2 = sum u 2^u, u of the target) with u = (x - m) * scale.

    Every lane of VEC columns keeps its own running maximum: no barrier inside the sweep, one rescaling per VEC columns.
    The difference is taken before the product: (x - m) is exact where it matters, x * scale - m * scale is not.
    """
    m = tl.full((BLOCK_V // VEC,), LOWEST, tl.float32)
    s1 = tl.zeros((BLOCK_V // VEC,), tl.float32)
    s2 = tl.zeros((BLOCK_V // VEC,), tl.float32)
    for start in range(0, V, BLOCK_V):
        cols, live = _lanes(start, V, BLOCK_V)
        x = _scores(z_ptr, bias_ptr, cols, live, SOFTCAP)
        m, s1, s2 = absorbed(x, m, s1, s2, scale, scale, WITH_ENTROPY)
    m_row = tl.max(m, 0)
    s1, s2 = rescaled(s1, s2, m, m_row, scale)
    # the same sums and products as in the sweep, so that the target is never above the maximum and logp never above 0
    u_y = (_scores(z_ptr, bias_ptr, y, y < V, SOFTCAP) - m_row) * scale
    return m_row, tl.sum(s1, 0), tl.sum(s2, 0), u_y


@triton.jit
def finish(m, s1, s2, u_y, inverse_temperature):
    """Log-prob of the target, entropy, log-sum-exp, in nats. Entropy is never lse - sum(p s), which cancels."""
    norm = tl.log2(s1)
    logp = (u_y - norm) * LN2
    logp = tl.where(logp > 0.0, 0.0, logp)  # log2 is good to 2^-22 near 1, on either side; NaN stays
    return logp, (norm - s2 / s1) * LN2, m * inverse_temperature + norm * LN2


@triton.jit
def inverse_of(temperature_ptr, rows, live):
    if temperature_ptr is None:
        inverse = tl.where(live, 1.0, 1.0)
    else:
        inverse = 1.0 / tl.load(temperature_ptr + rows, mask=live, other=1.0)
    return inverse


@triton.jit
def _gradient(
    z_ptr, bias_ptr, out_ptr, y, m, scale, s1, entropy, g, e, inv_temperature, V, SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dz = (g (onehot - p) - e p (log p + entropy)) / temperature * softcap', formed in fp32, rounded once.

    From the end of the row to its start: what the first sweep read last is still in the second-level cache, which
    cannot hold the rows of all programs at once (132 x 513 KB at V = 128256 against 50 MB).
    """
    inv_s1 = 1.0 / s1
    norm = tl.log2(s1)
    last = V - 1 - (V - 1) % BLOCK_V
    for back in range(0, V, BLOCK_V):
        # the compiler cannot see it, and without it every access falls to 32 bits
        cols, live = _lanes(tl.multiple_of(last - back, BLOCK_V), V, BLOCK_V)
        x = _scores(z_ptr, bias_ptr, cols, live, SOFTCAP)
        u = (x - m) * scale
        p = tl.exp2(u) * inv_s1
        # onehot and p meet in fp32: rounded first, 1 - p would be lost for a sure token
        d = g * (tl.where(cols == y, 1.0, 0.0) - p)
        if WITH_ENTROPY:
            d -= e * tl.where(p == 0.0, 0.0, p * ((u - norm) * LN2 + entropy))
        d *= inv_temperature
        if SOFTCAP is not None:
            t = x / SOFTCAP
            d *= 1.0 - t * t
        tl.store(out_ptr + cols, d.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def _stats_kernel(
    z_ptr, targets_ptr, temperature_ptr, bias_ptr, logp_ptr, entropy_ptr, lse_ptr, z_stride, V, SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2^31
    z_ptr += row * z_stride
    y = tl.load(targets_ptr + row).to(tl.int32)
    inverse = inverse_of(temperature_ptr, row, True)
    m, s1, s2, u_y = _statistics(z_ptr, bias_ptr, y, inverse * LOG2E, V, SOFTCAP, entropy_ptr is not None, BLOCK_V)
    logp, entropy, lse = finish(m, s1, s2, u_y, inverse)
    tl.store(logp_ptr + row, logp)
    tl.store(lse_ptr + row, lse)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, entropy)


@triton.jit
def _grad_kernel(
    z_ptr, targets_ptr, temperature_ptr, bias_ptr, lse_ptr, entropy_ptr, dlogp_ptr, dentropy_ptr, out_ptr, z_stride,
    out_stride, V, SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(targets_ptr + row).to(tl.int32)
    inverse = inverse_of(temperature_ptr, row, True)
    g = 0.0
    if dlogp_ptr is not None:
        g = tl.load(dlogp_ptr + row)
    entropy = 0.0
    e = 0.0
    if dentropy_ptr is not None:
        entropy = tl.load(entropy_ptr + row)
        e = tl.load(dentropy_ptr + row)
    # log-sum-exp, back in the scores' units, takes the place of the maximum; the sum is then 1
    m = tl.load(lse_ptr + row)
    if temperature_ptr is not None:
        m *= tl.load(temperature_ptr + row)
    _gradient(
        z_ptr + row * z_stride, bias_ptr, out_ptr + row * out_stride, y, m, inverse * LOG2E, 1.0, entropy, g, e,
        inverse, V, SOFTCAP, dentropy_ptr is not None, BLOCK_V,
    )  # fmt: skip


@triton.jit
def _policy_kernel(
    z_ptr, targets_ptr, temperature_ptr, bias_ptr, adv_ptr, old_ptr, sampler_ptr, ref_ptr, mask_ptr, scalars_ptr,
    logp_ptr, entropy_ptr, out_ptr, z_stride, out_stride, V, SOFTCAP: tl.constexpr, ENTROPY_GRAD: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * z_stride
    y = tl.load(targets_ptr + row).to(tl.int32)
    inverse = inverse_of(temperature_ptr, row, True)
    scale = inverse * LOG2E
    with_entropy: tl.constexpr = ENTROPY_GRAD or entropy_ptr is not None
    m, s1, s2, u_y = _statistics(z_ptr, bias_ptr, y, scale, V, SOFTCAP, with_entropy, BLOCK_V)
    logp, entropy, _ = finish(m, s1, s2, u_y, inverse)
    tl.store(logp_ptr + row, logp)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, entropy)
    mask = load_mask(mask_ptr, row, True)
    _, g, _, _, _, _, _, _ = policy_terms(
        logp, tl.load(adv_ptr + row), load_rows(old_ptr, row, True), load_rows(sampler_ptr, row, True),
        load_rows(ref_ptr, row, True), mask, scalars_ptr,
    )  # fmt: skip
    e = 0.0
    if ENTROPY_GRAD:
        e = -mask * tl.load(scalars_ptr) * tl.load(scalars_ptr + 6)
    _gradient(
        z_ptr, bias_ptr, out_ptr + row * out_stride, y, m, scale, s1, entropy, g, e, inverse, V, SOFTCAP, ENTROPY_GRAD,
        BLOCK_V,
    )  # fmt: skip


def row_stats(z: Tensor, targets: Tensor, scores: Scores, want_entropy: bool) -> Stats:
    """Log-prob of the targets, entropy or None, log-sum-exp; (c,) fp32 each. z (c, V) fp32, last stride 1."""
    _check(z, targets, scores)
    logp, lse = z.new_empty(len(z)), z.new_empty(len(z))
    entropy = z.new_empty(len(z)) if want_entropy else None
    if len(z):
        with on_device_of(z):
            _stats_kernel[(len(z),)](
                z, targets, scores.temperature, scores.bias, logp, entropy, lse, z.stride(0), z.shape[1],
                SOFTCAP=scores.softcap or None, **_shape(z),
            )  # fmt: skip
    return Stats(logp, entropy, lse)


def row_grad(
    z: Tensor, targets: Tensor, stats: Stats, dlogp: Tensor | None, dentropy: Tensor | None, scores: Scores, out: Tensor
) -> None:
    """Writes dz into out (c, V): z itself, or a tensor that shares no memory with it, fp32, bf16 or fp16.

    p is e^(s - lse): as good as lse is in fp32, some |lse| * 2^-24. row_policy does not go through lse.
    """
    _check(z, targets, scores, out)
    dlogp, dentropy = (None if x is None else x.contiguous() for x in (dlogp, dentropy))
    entropy = None if dentropy is None else stats.entropy
    if len(z):
        with on_device_of(z):
            _grad_kernel[(len(z),)](
                z, targets, scores.temperature, scores.bias, stats.lse, entropy, dlogp, dentropy, out, z.stride(0),
                out.stride(0), z.shape[1], SOFTCAP=scores.softcap or None, **_shape(z),
            )  # fmt: skip


def row_policy(
    z: Tensor, targets: Tensor, policy: DevicePolicy, scores: Scores, want_entropy: bool, out: Tensor
) -> Stats:
    """row_stats without log-sum-exp, and at once the gradient of the policy's loss with respect to z into out."""
    _check(z, targets, scores, out)
    logp = z.new_empty(len(z))
    entropy = z.new_empty(len(z)) if want_entropy else None
    if len(z):
        with on_device_of(z):
            _policy_kernel[(len(z),)](
                z, targets, scores.temperature, scores.bias, *policy[:6], logp, entropy, out, z.stride(0),
                out.stride(0), z.shape[1], SOFTCAP=scores.softcap or None, ENTROPY_GRAD=policy.has_entropy_grad,
                **_shape(z),
            )  # fmt: skip
    return Stats(logp, entropy, None)


def _check(z: Tensor, targets: Tensor, scores: Scores, out: Tensor | None = None) -> None:
    assert z.dtype == torch.float32, f"scores are fp32; got {z.dtype}"
    assert z.stride(1) == 1, f"the last stride is 1; got {z.stride()}"
    assert z.shape[1] < 2**31, f"columns are counted in 32 bits; got {z.shape[1]}"
    assert targets.shape == z.shape[:1], f"{targets.shape} targets of {z.shape} scores"
    assert targets.is_contiguous()
    for x, size in ((scores.temperature, len(z)), (scores.bias, z.shape[1])):
        assert x is None or (x.shape == (size,) and x.is_contiguous() and x.dtype == torch.float32), x
    assert out is None or (out.shape == z.shape and out.stride(1) == 1), f"{out.shape} {out.stride()} for {z.shape}"


def _shape(z: Tensor) -> dict[str, int | bool]:
    """Columns a program takes at a time, its warps, and fused multiply-add, set because defaults differ."""
    V = z.shape[1]
    if V <= 65536:
        block = min(256 * VEC.value, max(256, triton.next_power_of_2(V)))
        return {"BLOCK_V": block, "num_warps": max(1, block // VEC.value // 32), "enable_fp_fusion": True}
    # 1024 threads of more than 32 registers: one row per multiprocessor, so that more of each stays in cache until it
    # is read again; 16 columns per thread are 64 KB in flight, four times what hides the memory's latency
    return {"BLOCK_V": 1024 * VEC.value * 2, "num_warps": 32, "enable_fp_fusion": True}
