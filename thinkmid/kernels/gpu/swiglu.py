"""Triton twin of SwiGLU: flat and elementwise, whatever the shape was."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from thinkmid.kernels.gpu.policy import on_device_of

# with eight warps eight elements of a thread: one 128-bit load of bf16, two of fp32
BLOCK = 2048


@triton.jit
def _forward_kernel(gate_ptr, up_ptr, out_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < size
    g = tl.load(gate_ptr + at, mask=live, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + at, mask=live, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, g / (1.0 + tl.exp(-g)) * u, mask=live)


@triton.jit
def _backward_kernel(gate_ptr, up_ptr, dout_ptr, dgate_ptr, dup_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < size
    g = tl.load(gate_ptr + at, mask=live, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + at, mask=live, other=0.0).to(tl.float32)
    d = tl.load(dout_ptr + at, mask=live, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    tl.store(dgate_ptr + at, d * u * (sigmoid * (1.0 + g * (1.0 - sigmoid))), mask=live)
    tl.store(dup_ptr + at, d * (g * sigmoid), mask=live)


def swiglu_forward(gate: Tensor, up: Tensor, out: Tensor) -> None:
    """Writes out. All contiguous and of one shape."""
    with on_device_of(gate):
        _forward_kernel[(triton.cdiv(gate.numel(), BLOCK),)](gate, up, out, gate.numel(), BLOCK=BLOCK, num_warps=8)


def swiglu_backward(gate: Tensor, up: Tensor, dout: Tensor, dgate: Tensor, dup: Tensor) -> None:
    """Writes dgate and dup. All contiguous and of one shape."""
    with on_device_of(gate):
        _backward_kernel[(triton.cdiv(gate.numel(), BLOCK),)](
            gate, up, dout, dgate, dup, gate.numel(), BLOCK=BLOCK, num_warps=8
        )
