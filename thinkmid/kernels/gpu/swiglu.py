"""Triton twin of SwiGLU: flat and elementwise, whatever the shape was."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

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


def swiglu_forward(gate, up, out) -> None:
    """Writes out. All contiguous and of one shape."""
    with on_device_of(gate):
        _forward_kernel[(triton.cdiv(gate.numel(), BLOCK),)](gate, up, out, gate.numel(), BLOCK=BLOCK, num_warps=8)


def swiglu_backward(gate, up, dout, dgate, dup) -> None:
    """Writes dgate and dup. All contiguous and of one shape."""
    with on_device_of(gate):
        _backward_kernel[(triton.cdiv(gate.numel(), BLOCK),)](
            gate, up, dout, dgate, dup, gate.numel(), BLOCK=BLOCK, num_warps=8
        )


def _variant(dtype, *, back):
    x = torch.empty(32768, 14336, dtype=dtype, device="meta")
    return swiglu_backward(x, x, x, x, x) if back else swiglu_forward(x, x, x)


# what benchmarks.compile_report compiles and what it must find
VARIANTS = {
    f"swiglu {'backward' if back else 'forward'} {str(dtype)[6:]}": (
        lambda dtype=dtype, back=back: _variant(dtype, back=back), {"load": 128, "store": 128},
    )
    for dtype in (torch.bfloat16, torch.float32)
    for back in (False, True)
}  # fmt: skip
