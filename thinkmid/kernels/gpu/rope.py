"""Triton twin of the rotary embedding: a program takes all heads of a token, so that its angles are read once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from thinkmid.kernels.gpu.policy import on_device_of


@triton.jit
def _rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, row_stride, head_stride, H, C,
    BACK: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, BLOCK_H).to(tl.int64)[:, None]
    half = C // 2
    pairs = tl.arange(0, BLOCK_C)
    cos = tl.load(cos_ptr + t * half + pairs, mask=pairs < half, other=0.0)[None, :]
    sin = tl.load(sin_ptr + t * half + pairs, mask=pairs < half, other=0.0)[None, :]
    if BACK:
        sin = -sin
    live = (heads < H) & (pairs[None, :] < half)
    x_at = x_ptr + t * row_stride + heads * head_stride + pairs[None, :]
    a = tl.load(x_at, mask=live, other=0.0).to(tl.float32)
    b = tl.load(x_at + half, mask=live, other=0.0).to(tl.float32)
    out_at = out_ptr + (t * H + heads) * C + pairs[None, :]
    tl.store(out_at, a * cos - b * sin, mask=live)
    tl.store(out_at + half, b * cos + a * sin, mask=live)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float, out: Tensor) -> None:
    """Writes out (T, H, C) contiguous. x (T, H, C) with last stride 1, cos, sin (T, C/2) contiguous; sign 1 or -1."""
    T, H, C = x.shape
    block_h, block_c = triton.next_power_of_2(H), triton.next_power_of_2(C // 2)
    with on_device_of(x):
        _rotate_kernel[(T,)](
            x, cos, sin, out, x.stride(0), x.stride(1), H, C,
            BACK=sign < 0, BLOCK_H=block_h, BLOCK_C=block_c, num_warps=min(8, max(1, block_h * block_c // 256)),
        )  # fmt: skip
