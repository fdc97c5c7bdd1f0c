"""Kernels with one fault each, which benchmarks.compile_report must find; the last has none. Compiled, never run."""

import torch
import triton
import triton.language as tl


@triton.jit
def _scale(x_ptr, stride, V, WIDE: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    cols = tl.arange(0, BLOCK) * STEP
    x = tl.load(x_ptr + row * stride + cols, mask=cols < V)
    tl.store(x_ptr + row * stride + cols, x * 2, mask=cols < V)


@triton.jit
def _scale_in_a_loop(x_ptr, stride, V, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    for _ in range(0, V, BLOCK):
        tl.store(x_ptr + offsets, tl.load(x_ptr + offsets) * 2)
        offsets += BLOCK


@triton.jit
def _scale_by_pointer(x_ptr, stride, V, BLOCK: tl.constexpr):
    at = x_ptr + (tl.program_id(0) * stride).to(tl.int64)
    for _ in range(0, V, BLOCK):
        tl.store(at + tl.arange(0, BLOCK), 0.0)
        at += BLOCK


@triton.jit
def _double(x_ptr, BLOCK: tl.constexpr):
    at = x_ptr + tl.arange(0, BLOCK)
    tl.store(at, (tl.load(at).to(tl.float64) * 0.1 + 1e-12).to(tl.float32))


@triton.jit
def _subtract_maximum(x_ptr, BLOCK: tl.constexpr):
    at = x_ptr + tl.arange(0, BLOCK)
    x = tl.load(at)
    tl.store(at, x - tl.max(x, 0))


@triton.jit
def _product(a_ptr, b_ptr, c_ptr, N: tl.constexpr, K: tl.constexpr):
    n, k = tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + n[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    tl.store(c_ptr + n[:, None] * N + n[None, :], tl.dot(a, b))


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def _on_rows(kernel, grid=(16384,), num_warps=4, **options):
    x = meta(16384, 151936)
    kernel[grid](x, x.stride(0), x.shape[1], num_warps=num_warps, **options)


def _dot(N, K):
    _product[(1,)](meta(N, K, dtype=torch.float16), meta(K, N, dtype=torch.float16), meta(N, N), N=N, K=K)


# name: (call, expectation); the names are what the test looks for in the report
VARIANTS = {
    "32-bit offset into x_ptr": (lambda: _on_rows(_scale, WIDE=False, STEP=1, BLOCK=1024), {}),
    "32-bit offset into x_ptr, loop": (lambda: _on_rows(_scale_in_a_loop, BLOCK=1024), {}),
    "32-bit offset into x_ptr, widened too late": (lambda: _on_rows(_scale_by_pointer, BLOCK=1024), {}),
    "no LDG of 128 bits": (lambda: _on_rows(_scale, WIDE=True, STEP=2, BLOCK=1024), {"load": 128}),
    "spills": (lambda: _subtract_maximum[(1,)](meta(16384), BLOCK=16384, num_warps=1), {}),
    "bytes of shared memory": (lambda: _dot(64, 2048), {}),
    "no wgmma 64x64x8": (lambda: _dot(64, 64), {"_product": {"hgmma": "64x64x8"}}),
    "no TMA load": (lambda: _dot(32, 32), {"tma": True}),
    "mma.sync": (lambda: _dot(32, 32), {}),
    "registers, expected": (lambda: _dot(64, 64), {"regs": 32}),
    "fp64 arithmetic": (lambda: _double[(1,)](meta(1024), BLOCK=1024), {}),
    "only its first axis": (lambda: _on_rows(_scale, grid=(1, 70000), WIDE=True, STEP=1, BLOCK=1024), {}),
    "does not compile": (lambda: _on_rows(_scale, WIDE=True, STEP=1, BLOCK=1000), {}),
    "": (lambda: _on_rows(_scale, WIDE=True, STEP=1, BLOCK=1024), {"load": 128, "store": 128}),
}
