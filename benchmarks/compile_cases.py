"""What benchmarks.compile_report compiles: calls of the shipped launchers with meta tensors of real sizes.

Each module of kernels has its cases: name -> (call, what sm_90 must show). load, store: bits of the widest access;
regs: registers of a thread at most; hgmma: the shape of wgmma; tma: loads by the tensor memory accelerator. Where a
call launches several kernels, the expectations are keyed by kernel.
"""

from __future__ import annotations

from functools import partial

import torch

from thinkmid.kernels.gpu import logprob, policy, rmsnorm, rope, rows, swiglu
from thinkmid.kernels.streams import DevicePolicy, Scores, Stats

BF16, FP32 = torch.bfloat16, torch.float32


def meta(*shape, dtype=FP32):
    return torch.empty(shape, dtype=dtype, device="meta")


def policy_rows(full):
    row = meta(32768)
    streams = [row] * 4 if full else [None] * 4
    policy.policy_rows(row, DevicePolicy(row, *streams, meta(8), full), row if full else None)


def head_rows(call, V, *, dtype=FP32, options=False, full=False):
    """Of c = 16384 rows: with V = 131072 and more their offsets pass 2^31."""
    z, y, row = meta(16384, V), meta(16384, dtype=torch.int64), meta(16384)
    scores = Scores(row, meta(V), 30.0) if options else Scores()
    out = z if dtype == FP32 else meta(16384, V, dtype=dtype)
    if call is rows.row_stats:
        rows.row_stats(z, y, scores, full)
    elif call is rows.row_grad:
        rows.row_grad(z, y, Stats(row, row, row), row, row if full else None, scores, out)
    else:
        streams = [row] * 4 if full else [None] * 4
        rows.row_policy(z, y, DevicePolicy(row, *streams, meta(8), full), scores, full, out)


def linear_logprob(dtype, *, options=False, want_entropy=True):
    scores = Scores(meta(32768), meta(128256), 30.0) if options else Scores()
    hidden, weight = meta(32768, 4096, dtype=dtype), meta(128256, 4096, dtype=dtype)
    logprob.linear_logprob_forward(hidden, weight, meta(32768, dtype=torch.int64), scores, want_entropy)


def rms_norm(D, dtype, *, residual, back):
    num = 32768 * 4096 // D
    x, weight, rstd = meta(num, D, dtype=dtype), meta(D, dtype=dtype), meta(num)
    if back:
        rmsnorm.rms_norm_backward(x, weight, rstd, x, x if residual else None, x, want_dweight=True)
    else:
        rmsnorm.rms_norm_forward(x, x if residual else None, weight, 1e-6, x, x, None if D == 128 else rstd)


def rotate(H, dtype, sign):
    angles = meta(32768, 64)
    x, out = meta(32768, H + 16, 128, dtype=dtype)[:, :H], meta(32768, H, 128, dtype=dtype)
    rope.rotate(x, angles, angles, sign, out)


def gate(dtype, *, back):
    x = meta(32768, 14336, dtype=dtype)
    if back:
        swiglu.swiglu_backward(x, x, x, x, x)
    else:
        swiglu.swiglu_forward(x, x, x)


READ, BOTH = {"load": 128}, {"load": 128, "store": 128}
FEW = {"regs": 64}  # 1024 threads have 64 registers each
DOT = {"_tiles_kernel": {"hgmma": "64x256x16", "tma": True}, "_merge_kernel": {"load": 64}}
NARROW_DOT = {"_tiles_kernel": {"hgmma": "64x128x16", "tma": True}}
NORMS = ((4096, BF16, True), (4096, BF16, False), (128, BF16, False), (1024, FP32, True))
WAYS = {"forward": False, "backward": True}

CASES = {
    "policy": {
        "policy_rows on-policy": (partial(policy_rows, False), BOTH | {"regs": 128}),
        "policy_rows every stream": (partial(policy_rows, True), BOTH | {"regs": 128}),
    },
    "rows": {
        "row_stats V=128256": (partial(head_rows, rows.row_stats, 128256), READ | FEW),
        "row_stats V=151936 entropy": (partial(head_rows, rows.row_stats, 151936, full=True), READ | FEW),
        "row_grad V=128256 bf16": (partial(head_rows, rows.row_grad, 128256, dtype=BF16), BOTH | FEW),
        "row_policy V=128256 bf16": (partial(head_rows, rows.row_policy, 128256, dtype=BF16), BOTH | FEW),
        "row_policy V=128256 in place": (partial(head_rows, rows.row_policy, 128256), BOTH | FEW),
        "row_policy V=151936 bf16 every option": (
            partial(head_rows, rows.row_policy, 151936, dtype=BF16, options=True, full=True), BOTH | FEW,
        ),
        "row_policy V=32000 bf16": (partial(head_rows, rows.row_policy, 32000, dtype=BF16), BOTH),
    },
    "logprob": {
        "linear_logprob bf16": (partial(linear_logprob, BF16, want_entropy=False), DOT),
        "linear_logprob bf16 entropy": (partial(linear_logprob, BF16), DOT),
        "linear_logprob bf16 every option": (partial(linear_logprob, BF16, options=True), NARROW_DOT),
        "linear_logprob fp32 entropy": (partial(linear_logprob, FP32), {"_tiles_kernel": {"tma": True}}),
    },
    "rmsnorm": {
        f"rms_norm {way} D={D} {str(dtype)[6:]}{' residual' if residual else ''}": (
            partial(rms_norm, D, dtype, residual=residual, back=back), BOTH,
        )
        for D, dtype, residual in NORMS
        for way, back in WAYS.items()
    },
    "rope": {
        "rope forward H=32 bfloat16": (partial(rotate, 32, BF16, 1.0), BOTH),
        "rope backward H=8 bfloat16": (partial(rotate, 8, BF16, -1.0), BOTH),
        "rope forward H=32 float32": (partial(rotate, 32, FP32, 1.0), BOTH),
    },
    "swiglu": {
        f"swiglu {way} {str(dtype)[6:]}": (partial(gate, dtype, back=back), BOTH)
        for dtype in (BF16, FP32)
        for way, back in WAYS.items()
    },
}  # fmt: skip
VARIANTS = {f"thinkmid.kernels.gpu.{module}": cases for module, cases in CASES.items()}
