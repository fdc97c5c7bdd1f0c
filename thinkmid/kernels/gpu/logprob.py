"""Log-probs of a linear head without logits: tiles of hidden @ weight.T stay in registers, only statistics leave."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from thinkmid.kernels.gpu.policy import on_device_of
from thinkmid.kernels.gpu.rows import LOG2E, LOWEST, absorbed, finish, inverse_of, rescaled, tanh
from thinkmid.kernels.streams import Scores, Stats

# (rows, columns, inner), warps, stages by (compute capability, bytes of an element); capability 9 stands for all above.
# fp32 goes without tensor cores, whose tf32 has 10 bits: small tiles, because operands and sums share the registers
TILES = {
    (9, 2): (128, 256, 64, 8, 3),  # wgmma m64n256k16; 147 KB shared, 128 registers of sums per thread
    (8, 2): (128, 128, 32, 8, 3),
    (9, 4): (64, 64, 32, 8, 3),
    (8, 4): (64, 64, 16, 8, 3),
}
SOFTCAP_COLUMNS = 128  # at most: tanh over 256 columns spills 200 bytes per thread
BLOCK_R = 256  # rows of a program that merges


@triton.jit
def _tiles_kernel(
    hidden, weight, targets_ptr, temperature_ptr, bias_ptr, m_ptr, s1_ptr, s2_ptr, x_y_ptr, N, V, D, num_blocks,
    tiles_per_part, SOFTCAP: tl.constexpr, WITH_ENTROPY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Statistics of BLOCK_N rows over one part of the vocabulary, to row part * N + row of the partial results."""
    # neighbours share a part, so that a tile of weights is read from cache by all of them
    block = tl.program_id(0) % num_blocks
    part = tl.program_id(0) // num_blocks
    rows = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < N
    y = tl.load(targets_ptr + rows, mask=live, other=-1).to(tl.int32)
    scale = inverse_of(temperature_ptr, rows, live) * LOG2E
    m = tl.full((BLOCK_N,), LOWEST, tl.float32)
    s1 = tl.zeros((BLOCK_N,), tl.float32)
    s2 = tl.zeros((BLOCK_N,), tl.float32)
    x_y = tl.zeros((BLOCK_N,), tl.float32)
    first = part * tiles_per_part * BLOCK_V
    last = tl.minimum(first + tiles_per_part * BLOCK_V, V)
    for start in range(first, last, BLOCK_V):
        x = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for inner in range(0, D, BLOCK_D):
            a = hidden.load([block * BLOCK_N, inner])
            b = weight.load([start, inner])
            if UPCAST:
                # the interpreter multiplies bf16 by its bit patterns
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            x = tl.dot(a, b.T, x, input_precision="ieee")
        cols = start + tl.arange(0, BLOCK_V)
        if bias_ptr is not None:
            x += tl.load(bias_ptr + cols, mask=cols < V, other=0.0)[None, :]
        if SOFTCAP is not None:
            x = SOFTCAP * tanh(x / SOFTCAP)
        x_y += tl.sum(tl.where(cols[None, :] == y[:, None], x, 0.0), 1)
        # columns beyond V hold zeros, which are scores like any other
        x = tl.where(cols[None, :] < V, x, LOWEST)
        m, s1, s2 = absorbed(x, m, s1, s2, scale, scale[:, None], WITH_ENTROPY)
    at = part.to(tl.int64) * N + rows
    tl.store(m_ptr + at, m, mask=live)
    tl.store(s1_ptr + at, s1, mask=live)
    tl.store(x_y_ptr + at, x_y, mask=live)
    if WITH_ENTROPY:
        tl.store(s2_ptr + at, s2, mask=live)


@triton.jit
def _merge_kernel(
    m_ptr, s1_ptr, s2_ptr, x_y_ptr, temperature_ptr, logp_ptr, entropy_ptr, lse_ptr, N, parts, BLOCK_R: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = rows < N
    inverse = inverse_of(temperature_ptr, rows, live)
    scale = inverse * LOG2E
    m = tl.full((BLOCK_R,), LOWEST, tl.float32)
    s1 = tl.zeros((BLOCK_R,), tl.float32)
    s2 = tl.zeros((BLOCK_R,), tl.float32)
    x_y = tl.zeros((BLOCK_R,), tl.float32)
    at = rows
    for _ in range(parts):
        m_part = tl.load(m_ptr + at, mask=live, other=0.0)
        s1_part = tl.load(s1_ptr + at, mask=live, other=1.0)
        s2_part = tl.zeros((BLOCK_R,), tl.float32)
        if entropy_ptr is not None:
            s2_part = tl.load(s2_ptr + at, mask=live, other=0.0)
        x_y += tl.load(x_y_ptr + at, mask=live, other=0.0)
        m_new = tl.maximum(m, m_part)
        s1_part, s2_part = rescaled(s1_part, s2_part, m_part, m_new, scale)
        s1, s2 = rescaled(s1, s2, m, m_new, scale)
        s1 += s1_part
        s2 += s2_part
        m = m_new
        at += N
    logp, entropy, lse = finish(m, s1, s2, (x_y - m) * scale, inverse)
    tl.store(logp_ptr + rows, logp, mask=live)
    tl.store(lse_ptr + rows, lse, mask=live)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + rows, entropy, mask=live)


def linear_logprob_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, scores: Scores, want_entropy: bool
) -> Stats:
    """Log-prob of the targets, entropy or None, log-sum-exp; (N,) fp32 each.

    hidden (N, D), weight (V, D) of one dtype, targets (N,) int64 in [0, V).
    Same as row_stats(hidden @ weight.T in fp32, ...), in memory for a few numbers per row. The number of parts into
    which the vocabulary is cut depends on N and the device, and with it the order of the sums.
    """
    _check(hidden, weight, targets, scores)
    logp, lse, entropy = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3))
    stats = Stats(logp, entropy if want_entropy else None, lse)
    if len(hidden):
        with on_device_of(hidden):
            _launch(hidden, weight, targets, scores, stats)
    return stats


def _launch(hidden: Tensor, weight: Tensor, targets: Tensor, scores: Scores, stats: Stats) -> None:
    (N, D), V = hidden.shape, len(weight)
    temperature, bias, softcap = scores
    block_n, block_v, block_d, num_warps, num_stages = _tile(hidden)
    block_v = min(block_v, SOFTCAP_COLUMNS) if softcap else block_v
    num_blocks, num_tiles = triton.cdiv(N, block_n), triton.cdiv(V, block_v)
    # eight programs for each multiprocessor: the last round, partly idle, is then an eighth of the time at most
    parts = min(num_tiles, triton.cdiv(8 * _num_multiprocessors(hidden), num_blocks))
    tiles_per_part = triton.cdiv(num_tiles, parts)
    parts = triton.cdiv(num_tiles, tiles_per_part)
    partial = hidden.new_empty(4, parts, N, dtype=torch.float32)
    _tiles_kernel[(num_blocks * parts,)](
        _descriptor(hidden, block_n, block_d), _descriptor(weight, block_v, block_d), targets, temperature, bias,
        *partial, N, V, D, num_blocks, tiles_per_part, SOFTCAP=softcap or None, WITH_ENTROPY=stats.entropy is not None,
        BLOCK_N=block_n, BLOCK_V=block_v, BLOCK_D=block_d, UPCAST=triton.knobs.runtime.interpret, num_warps=num_warps,
        num_stages=num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    _merge_kernel[(triton.cdiv(N, BLOCK_R),)](
        *partial, temperature, *stats, N, parts, BLOCK_R=BLOCK_R, num_warps=4, enable_fp_fusion=True
    )


def _descriptor(x: Tensor, *block: int) -> TensorDescriptor:
    """Made on the host: one made in the kernel would need scratch memory from an allocator set for each thread."""
    unit = 16 // x.element_size()
    if x.stride(0) % unit or x.stride(1) != 1 or x.data_ptr() % 16:
        x = F.pad(x, (0, -x.shape[1] % unit))  # what lies beyond D is 0 on both sides and adds nothing
    return TensorDescriptor.from_tensor(x, list(block))


def _tile(x: Tensor) -> tuple[int, int, int, int, int]:
    arch = 90 if triton.knobs.runtime.interpret else triton.runtime.driver.active.get_current_target().arch
    return TILES[min(arch // 10, 9), x.element_size()]


def _num_multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132  # of an H100


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, scores: Scores) -> None:
    assert hidden.shape[1] == weight.shape[1], f"{hidden.shape} by {weight.shape}"
    assert hidden.dtype == weight.dtype, f"{hidden.dtype} by {weight.dtype}"
    assert hidden.dtype in (torch.float32, torch.bfloat16, torch.float16), hidden.dtype
    assert targets.shape == hidden.shape[:1], f"{targets.shape} targets of {hidden.shape}"
    assert targets.is_contiguous()
    # coordinates of tiles, and rows times parts, are counted in 32 bits
    assert max(len(hidden), len(weight)) < 2**30, f"{len(hidden)} rows, {len(weight)} columns"
    for x, size in ((scores.temperature, len(hidden)), (scores.bias, len(weight))):
        assert x is None or (x.shape == (size,) and x.is_contiguous() and x.dtype == torch.float32), x
