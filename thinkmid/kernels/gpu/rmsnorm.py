"""Triton twin of RMSNorm: a program takes whole rows, several of them where they are narrow."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from thinkmid.kernels.gpu.policy import on_device_of

# elements that a program holds at a time where rows are narrower
TILE = 2048


@triton.jit
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, h_ptr, y_ptr, rstd_ptr, eps, num_rows, D,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_D)
    live = (rows[:, None] < num_rows) & (cols[None, :] < D)
    at = rows[:, None] * D + cols[None, :]
    h = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        h += tl.load(residual_ptr + at, mask=live, other=0.0).to(tl.float32)
        # the norm is that of the rounded sum, which is what the next layer reads
        rounded = h.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + at, rounded, mask=live)
        h = rounded.to(tl.float32)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(h * h, axis=1) / D + eps)
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, h * rstd[:, None] * weight[None, :], mask=live)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)


@triton.jit
def _backward_kernel(
    h_ptr, weight_ptr, rstd_ptr, dy_ptr, dh_ptr, dx_ptr, dweight_ptr, num_rows, D,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program takes every num_programs-th block of rows and leaves its share of dweight in a row of (programs, D)."""
    cols = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_D,), tl.float32)
    first, step = tl.program_id(0).to(tl.int64) * BLOCK_R, tl.num_programs(0).to(tl.int64) * BLOCK_R
    for start in range(first, num_rows, step):
        rows = start + tl.arange(0, BLOCK_R).to(tl.int64)
        live = (rows[:, None] < num_rows) & (cols[None, :] < D)
        at = rows[:, None] * D + cols[None, :]
        h = tl.load(h_ptr + at, mask=live, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=live, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
        g = dy * weight[None, :]
        dot = tl.sum(g * h, axis=1)[:, None] / D
        dx = (g - h * (dot * rstd * rstd)) * rstd
        if dh_ptr is not None:
            dx += tl.load(dh_ptr + at, mask=live, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx, mask=live)
        if dweight_ptr is not None:
            dweight += tl.sum(dy * (h * rstd), axis=0)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + tl.program_id(0).to(tl.int64) * D + cols, dweight, mask=cols < D)


def rms_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, h: Tensor, y: Tensor, rstd: Tensor | None
) -> None:
    """Writes y, h unless residual is None, rstd (R,) fp32 unless it is None. All contiguous, (..., D) or (D,)."""
    D = len(weight)
    num_rows = x.numel() // D
    shape = _shape(D)
    with on_device_of(x):
        _forward_kernel[(triton.cdiv(num_rows, shape["BLOCK_R"]),)](
            x, residual, weight, None if residual is None else h, y, rstd, eps, num_rows, D, **shape
        )


def rms_norm_backward(
    h: Tensor, weight: Tensor, rstd: Tensor, dy: Tensor, dh: Tensor | None, dx: Tensor, *, want_dweight: bool
) -> Tensor | None:
    """Writes dx, of h's shape; returns the weight's gradient (D,), None if it is not wanted. dh may be None."""
    num_rows, D = len(rstd), len(weight)
    shape = _shape(D)
    programs = min(triton.cdiv(num_rows, shape["BLOCK_R"]), _resident(h, shape["num_warps"]))
    partial = torch.empty(programs, D, dtype=torch.float32, device=h.device) if want_dweight else None
    with on_device_of(h):
        _backward_kernel[(programs,)](h, weight, rstd, dy, dh, dx, partial, num_rows, D, **shape)
    return None if partial is None else partial.sum(0).to(weight.dtype)


def _shape(D: int) -> dict[str, int]:
    """Beyond D = 32768 a row no longer fits the registers: right, but slow."""
    block = triton.next_power_of_2(D)
    rows = max(1, TILE // block)
    # eight elements of a thread are one 128-bit load of bf16
    return {"BLOCK_R": rows, "BLOCK_D": block, "num_warps": min(16, max(4, block // 512))}


def _resident(x: Tensor, num_warps: int) -> int:
    """Programs that run at once, about 16 warps on a multiprocessor: more would only leave more partial sums."""
    if not x.is_cuda:  # interpreted: few, so that each takes several blocks
        return 3
    return max(1, 16 // num_warps) * torch.cuda.get_device_properties(x.device).multi_processor_count
