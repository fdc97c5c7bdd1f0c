"""Packed causal attention over cu_seqlens, bottom-right aligned: queries of a segment are the last of its keys.

Four paths, one meaning: flash-attn 3 or 2 where it is installed, torch's own varlen attention on other GPUs, all three
with their deterministic backward unless that is switched off, and grouped scaled_dot_product_attention calls on CPU and
in fp32. Where segments share keys, autograd keeps those keys once, not once for each segment. Their gradients are added
up in a fixed order, except by sdpa on a GPU, which torch leaves open.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from thinkmid.kernels import launch

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class _Bucket:
    """Segments of similar lengths, padded on the right to one batch."""

    q_rows: torch.Tensor  # (B, mq) rows of q; padding repeats row 0
    k_rows: torch.Tensor  # (B, mk) rows of k and v
    real: torch.Tensor  # indices into (B*mq,) of what is not padding
    mask: torch.Tensor | None  # (B, 1, mq, mk) bool; None: plain causal, where padding on the right is never seen


@dataclass(frozen=True)
class _Plan:
    buckets: list[_Bucket]
    order: torch.Tensor  # (T,) where each row of q lies in the buckets' outputs, one after the other


def varlen_attention(q, k, v, cu_q, cu_k, kv_rows=None, *, impl: str = "auto", deterministic: bool = True):
    """Causal attention of each segment's queries over its keys, aligned at the bottom right.

    q (T, H, C); k, v (Tk, K, C) with H a multiple of K; cu_q, cu_k (S+1,) int32; kv_rows (Tk',) int64 gathers keys
    and values so that several segments may share rows (a prefix and its continuations). Returns (T, H, C).
    impl: "auto", "flash-attn-3", "flash-attn", "torch-varlen" or "sdpa". deterministic: a GPU's backward adds up in a
    fixed order. Same as softmax(q k^T / sqrt(C)) v per segment.
    """
    _check(q, k, v, cu_q, cu_k, kv_rows)
    return attend_segments(cu_q, cu_k, kv_rows, impl=impl, deterministic=deterministic)(0, q, k, v)


def attend_segments(
    cu_q, cu_k, kv_rows=None, *, impl: str = "auto", deterministic: bool = True, longest=None, shared=None
) -> Attend:
    """varlen_attention of the same segments in every layer. What lengths alone decide is worked out once, at first use.

    longest: (queries, keys) of the longest segment; shared: who reads which key. To find them out waits for the device
    that holds cu_q and cu_k, or kv_rows.
    """

    @cache
    def ready(impl, device, num_keys):
        if impl == "sdpa":
            plan = _plan(cu_q, cu_k, kv_rows, device)
            return lambda q, k, v: _sdpa(q, k, v, plan)
        lengths = (cu_q.to(device), cu_k.to(device), *(longest or (_longest(cu_q), _longest(cu_k))))
        gather = shared or _shared(kv_rows, num_keys)
        return lambda q, k, v: _varlen(LIBRARIES[impl], q, k, v, gather, *lengths, deterministic)

    def attend(layer, q, k, v):
        return ready(launch.attention_path(q) if impl == "auto" else impl, q.device, len(k))(q, k, v)

    return attend


def _check(q, k, v, cu_q, cu_k, kv_rows):
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q (T, H, C), k and v (Tk, K, C) with H a multiple of K, got {q.shape=} {k.shape=} {v.shape=}"
        )
    num_k = k.shape[0] if kv_rows is None else kv_rows.shape[0]
    if cu_q.shape != cu_k.shape or cu_q[-1] != q.shape[0] or cu_k[-1] != num_k:
        raise ValueError(f"cu_q must end at {q.shape[0]} and cu_k at {num_k}, got {cu_q=} {cu_k=}")


def _longest(cu):
    return int((cu[1:] - cu[:-1]).max()) if len(cu) > 1 else 0


def _varlen(call, q, k, v, shared, cu_q, cu_k, max_q, max_k, deterministic):
    if shared is None:
        return call(q, k, v, cu_q, cu_k, max_q, max_k, deterministic)
    all_k, all_v = (_Gather.apply(x, *shared) for x in (k, v))
    with _kept_once({all_k: (k, shared.rows), all_v: (v, shared.rows)}):
        return call(q, all_k, all_v, cu_q, cu_k, max_q, max_k, deterministic)


class SharedKeys(NamedTuple):
    """Which rows of the keys stand where, and who reads each of them."""

    rows: torch.Tensor  # (Tk',)
    order: torch.Tensor  # (Tk',) places in rows, sorted by the row that stands there
    num_readers: torch.Tensor  # (Tk,)


def _shared(kv_rows, num_rows) -> SharedKeys | None:
    if kv_rows is None:
        return None
    return SharedKeys(kv_rows, kv_rows.argsort(stable=True), kv_rows.bincount(minlength=num_rows))


class _Gather(torch.autograd.Function):
    """x[rows]. Its gradient sums a row's readers in their order and in fp32; index_add_ on a GPU would use atomics."""

    @staticmethod
    def forward(ctx, x, rows, order, num_readers):
        ctx.save_for_backward(order, num_readers)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, dout):
        order, num_readers = ctx.saved_tensors
        wide = torch.promote_types(dout.dtype, torch.float32)
        # unsafe: its check of the lengths, which were counted from the rows, waits for the device twice
        dx = torch.segment_reduce(dout[order].to(wide), "sum", lengths=num_readers, axis=0, initial=0, unsafe=True)
        return dx.to(dout.dtype), None, None, None


@contextmanager
def _kept_once(gathered: dict[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]):
    """What autograd saves of gathered tensors inside is their source and its rows; the backward gathers again."""
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        yield  # activation checkpointing saves nothing at all here, but only as long as its own hooks are on top
        return
    sources = {x.data_ptr(): (x.dtype, x.numel(), *source) for x, source in gathered.items()}

    def pack(x):
        dtype, numel, source, rows = sources.get(x.data_ptr(), (None, 0, None, None))
        if (x.dtype, x.numel()) != (dtype, numel) or not numel:
            return x
        return source.detach(), rows, x.shape, x.stride()

    def unpack(kept):
        if isinstance(kept, torch.Tensor):
            return kept
        source, rows, shape, stride = kept
        return source.index_select(0, rows.flatten()).as_strided(shape, stride)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _flash_attn_3(q, k, v, cu_q, cu_k, max_q, max_k, deterministic):
    from flash_attn_interface import flash_attn_varlen_func

    out = flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, causal=True, deterministic=deterministic)
    return out[0] if isinstance(out, tuple) else out  # its first releases return the log-sum-exp as well


def _flash_attn(q, k, v, cu_q, cu_k, max_q, max_k, deterministic):
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, causal=True, deterministic=deterministic)


def _torch_varlen(q, k, v, cu_q, cu_k, max_q, max_k, deterministic):
    from torch.nn.attention.varlen import varlen_attn

    grouped = {"enable_gqa": True}
    if not _knows_gqa(varlen_attn):
        grouped, (k, v) = {}, (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, window_size=(-1, 0), **grouped)
    return _repeatable(out) if deterministic and out.grad_fn is not None else out


@cache
def _knows_gqa(varlen_attn) -> bool:
    return "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.12 and later


LIBRARIES = {"flash-attn-3": _flash_attn_3, "flash-attn": _flash_attn, "torch-varlen": _torch_varlen}


def _repeatable(out):
    """out, whose own backward runs in torch's deterministic mode: elsewhere it adds up dq in whatever order comes.

    The mode is global and would refuse other ops of a training step, so it is on for this one alone; and without its
    habit of writing NaN into new memory first, which costs a pass over each gradient. Where this backward raises, torch
    runs no hook after it, and the mode stays: the step is lost then anyway.
    """
    memory = torch.utils.deterministic
    was = []

    def enter(_):
        was.append((torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory))
        torch.set_deterministic_debug_mode("error")
        memory.fill_uninitialized_memory = False

    def leave(*_):
        mode, memory.fill_uninitialized_memory = was.pop()
        torch.set_deterministic_debug_mode(mode)

    out.grad_fn.register_prehook(enter)
    out.grad_fn.register_hook(leave)
    return out


def _sdpa(q, k, v, plan):
    outs = []
    for b in plan.buckets:
        q_b, k_b, v_b = _rows(q, b.q_rows), _rows(k, b.k_rows), _rows(v, b.k_rows)  # (B, H or K, m, C)
        with _kept_once({q_b: (q, b.q_rows), k_b: (k, b.k_rows), v_b: (v, b.k_rows)}):
            o_b = F.scaled_dot_product_attention(q_b, k_b, v_b, b.mask, is_causal=b.mask is None, enable_gqa=True)
        outs.append(o_b.transpose(1, 2).flatten(0, 1).index_select(0, b.real))  # (rows of this bucket, H, C)
    return torch.cat(outs).index_select(0, plan.order) if outs else torch.empty_like(q)


def _rows(x, rows):
    return x.index_select(0, rows.flatten()).unflatten(0, rows.shape).transpose(1, 2)


def _plan(cu_q, cu_k, kv_rows, device) -> _Plan:
    """Few calls for many segments: lengths that round up to the same step of a sqrt(2) ladder share a batch."""
    groups = defaultdict(list)
    for q0, q1, k0, k1 in zip(*(cu.tolist() for cu in (cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:])), strict=True):
        if q1 > q0:
            groups[_rung(q1 - q0), _rung(k1 - k0), q1 - q0 == k1 - k0].append((q0, q1, k0, k1))
    buckets = [
        _bucket(torch.tensor(spans), square, kv_rows, device) for (_, _, square), spans in sorted(groups.items())
    ]
    rows = torch.cat([b.q_rows.flatten()[b.real] for b in buckets]) if buckets else torch.empty(0, dtype=torch.long)
    return _Plan(buckets, rows.argsort())


def _rung(n: int) -> int:
    step = 16
    while step < n:
        step += step // 2 if step & (step - 1) == 0 else step // 3
    return step


def _bucket(spans, square, kv_rows, device) -> _Bucket:
    q0, q1, k0, k1 = spans.unbind(1)  # (B,)
    len_q, len_k = q1 - q0, k1 - k0
    i, j = torch.arange(int(len_q.max())), torch.arange(int(len_k.max()))
    in_q, in_k = i < len_q[:, None], j < len_k[:, None]  # (B, mq), (B, mk)
    q_rows = torch.where(in_q, q0[:, None] + i, q0[:, None])
    k_rows = torch.where(in_k, k0[:, None] + j, k0[:, None])
    k_rows = k_rows if kv_rows is None else kv_rows.cpu()[k_rows]
    mask = None
    if not square:
        seen = j <= i[:, None] + (len_k - len_q)[:, None, None]  # (B, mq, mk)
        mask = (seen & in_k[:, None, :])[:, None].to(device)
    return _Bucket(q_rows.to(device), k_rows.to(device), in_q.flatten().nonzero()[:, 0].to(device), mask)
