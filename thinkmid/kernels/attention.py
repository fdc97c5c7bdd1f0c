"""Packed causal attention over cu_seqlens, bottom-right aligned: queries of a segment are the last of its keys.

Four paths, one meaning: flash-attn 3 or 2 where it is installed, torch's own varlen attention on other GPUs, all three
with their deterministic backward unless that is switched off, and grouped scaled_dot_product_attention calls on CPU and
in fp32. Where segments share keys, autograd keeps those keys once, not once for each segment. Their gradients are added
up in a fixed order, except by sdpa on a GPU, which torch leaves open.
"""

from __future__ import annotations

import importlib
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from thinkmid.kernels import launch

# what autograd keeps in place of a gathered tensor: its source and its rows, shape and strides
Gathered = tuple[Tensor, Tensor, torch.Size, tuple[int, ...]]


class Lengths(NamedTuple):
    """Segments as the libraries for GPUs take them."""

    cu_q: Tensor  # (S+1,) int32
    cu_k: Tensor  # (S+1,) int32
    max_q: int  # queries of the longest segment
    max_k: int  # keys of the longest segment


class SharedKeys(NamedTuple):
    """Which rows of the keys stand where, and who reads each of them."""

    rows: Tensor  # (Tk',)
    order: Tensor  # (Tk',) places in rows, sorted by the row that stands there
    num_readers: Tensor  # (Tk,)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, kv_rows: Tensor | None = None,
    *, impl: str = "auto", deterministic: bool = True, window: int = 0,
) -> Tensor:  # fmt: skip
    """Causal attention of each segment's queries over its keys, aligned at the bottom right.

    q (T, H, C); k, v (Tk, K, C) with H a multiple of K; cu_q, cu_k (S+1,) int32; kv_rows (Tk',) int64 gathers keys
    and values so that several segments may share rows (a prefix and its continuations). Returns (T, H, C).
    impl: "auto", "flash-attn-3", "flash-attn", "torch-varlen" or "sdpa". deterministic: a GPU's backward adds up in a
    fixed order. window: newest keys that a query sees, its own included; 0: all. Same as softmax(q k^T / sqrt(C)) v per
    segment. ValueError for shapes that do not fit and a negative window.
    """
    _check(q, k, v, cu_q, cu_k, kv_rows)
    if window < 0:
        raise ValueError(f"window must be 0 or the number of keys that a query sees, got {window}")
    return SegmentAttention(cu_q, cu_k, kv_rows, impl=impl, deterministic=deterministic)(0, q, k, v, window)


@dataclass(frozen=True, eq=False)
class SegmentAttention:
    """varlen_attention of the same segments in every layer. What lengths and window decide is worked out at first use.

    To find longest and shared, where they are not given, waits for the device that holds cu_q and cu_k, or kv_rows.
    """

    cu_q: Tensor
    cu_k: Tensor
    kv_rows: Tensor | None = None
    impl: str = "auto"
    deterministic: bool = True
    longest: tuple[int, int] | None = None  # (queries, keys) of the longest segment
    shared: SharedKeys | None = None  # of kv_rows
    _ready: dict[tuple[str, torch.device, int, int], _Plan | _Library] = field(
        default_factory=dict, init=False, repr=False
    )

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int = 0) -> Tensor:
        """q (T, H, C), k, v (Tk, K, C) -> (T, H, C). Layers of one window attend alike."""
        key = launch.attention_path(q) if self.impl == "auto" else self.impl, q.device, len(k), window
        if key not in self._ready:
            self._ready[key] = self._prepare(*key)
        return self._ready[key](q, k, v)

    def _prepare(self, impl: str, device: torch.device, num_keys: int, window: int) -> _Plan | _Library:
        if impl == "sdpa":
            return _plan(self.cu_q, self.cu_k, self.kv_rows, device, window)
        longest = self.longest or (_longest(self.cu_q), _longest(self.cu_k))
        lengths = Lengths(self.cu_q.to(device), self.cu_k.to(device), *longest)
        shared = self.shared or _shared(self.kv_rows, num_keys)
        # a window that holds every key is none, for which the libraries have faster kernels
        return _Library(impl, lengths, shared, self.deterministic, (window,) if 0 < window < lengths.max_k else ())


def _check(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, kv_rows: Tensor | None) -> None:
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q (T, H, C), k and v (Tk, K, C) with H a multiple of K, got {q.shape=} {k.shape=} {v.shape=}"
        )
    num_k = k.shape[0] if kv_rows is None else kv_rows.shape[0]
    if cu_q.shape != cu_k.shape or cu_q[-1] != q.shape[0] or cu_k[-1] != num_k:
        raise ValueError(f"cu_q must end at {q.shape[0]} and cu_k at {num_k}, got {cu_q=} {cu_k=}")


def _longest(cu: Tensor) -> int:
    return int((cu[1:] - cu[:-1]).max()) if len(cu) > 1 else 0


def _shared(kv_rows: Tensor | None, num_rows: int) -> SharedKeys | None:
    if kv_rows is None:
        return None
    return SharedKeys(kv_rows, kv_rows.argsort(stable=True), kv_rows.bincount(minlength=num_rows))


# a GPU's libraries: keys and values gathered, one call for all segments


@dataclass(frozen=True)
class _Library:
    impl: str  # of LIBRARIES
    lengths: Lengths
    shared: SharedKeys | None
    deterministic: bool
    window: tuple[int, ...]  # keys that a query sees; (): all

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attend, given = LIBRARIES[self.impl], (self.lengths, self.deterministic, *self.window)
        if self.shared is None:
            return attend(q, k, v, *given)
        all_k, all_v = (_Gather.apply(x, *self.shared) for x in (k, v))  # type: ignore[no-untyped-call]
        with _kept_once({all_k: (k, self.shared.rows), all_v: (v, self.shared.rows)}):
            return attend(q, all_k, all_v, *given)


class _Gather(torch.autograd.Function):
    """x[rows]. Its gradient sums a row's readers in their order and in fp32; index_add_ on a GPU would use atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, order: Tensor, num_readers: Tensor) -> Tensor:
        ctx.save_for_backward(order, num_readers)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None, None]:
        order, num_readers = ctx.saved_tensors
        wide = torch.promote_types(dout.dtype, torch.float32)
        # unsafe: its check of the lengths, which were counted from the rows, waits for the device twice
        dx = torch.segment_reduce(dout[order].to(wide), "sum", lengths=num_readers, axis=0, initial=0, unsafe=True)
        return dx.to(dout.dtype), None, None, None


@contextmanager
def _kept_once(gathered: dict[Tensor, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """What autograd saves of gathered tensors inside is their source and its rows; the backward gathers again."""
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        yield  # activation checkpointing saves nothing at all here, but only as long as its own hooks are on top
        return
    with torch.autograd.graph.saved_tensors_hooks(_Sources(gathered).pack, _gathered_again):
        yield


class _Sources:
    """Where gathered tensors come from, found by their address."""

    def __init__(self, gathered: dict[Tensor, tuple[Tensor, Tensor]]) -> None:
        self._by_address = {x.data_ptr(): (x.dtype, x.numel(), *source) for x, source in gathered.items()}

    def pack(self, x: Tensor) -> Tensor | Gathered:
        if x.data_ptr() not in self._by_address or not x.numel():
            return x
        dtype, numel, source, rows = self._by_address[x.data_ptr()]
        return (source.detach(), rows, x.shape, x.stride()) if (x.dtype, x.numel()) == (dtype, numel) else x


def _gathered_again(kept: Tensor | Gathered) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    source, rows, shape, stride = kept
    return source.index_select(0, rows.flatten()).as_strided(shape, stride)


def _flash_attn(
    q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, deterministic: bool, window: int = 0, *, module: str
) -> Tensor:
    library = importlib.import_module(module)
    # keys beside a query's own: how many before it, how many after; -1: all, which `causal` takes back
    sides: dict[str, Any] = {"window_size": (window - 1, 0)} if window else {}
    out = library.flash_attn_varlen_func(q, k, v, *lengths, causal=True, deterministic=deterministic, **sides)
    attended: Tensor = out[0] if isinstance(out, tuple) else out  # the first releases of 3 return log-sum-exp as well
    return attended


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, deterministic: bool, window: int = 0) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # here, because it imports torch's compiler: seconds

    grouped: dict[str, Any] = {"enable_gqa": True}
    if not _knows_gqa(varlen_attn):
        grouped, (k, v) = {}, (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = varlen_attn(q, k, v, *lengths, window_size=(window - 1, 0), **grouped)
    assert isinstance(out, Tensor)
    if deterministic and out.grad_fn is not None:
        _DeterministicMode(out.grad_fn)
    return out


@cache
def _knows_gqa(varlen_attn: Any) -> bool:
    return "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.12 and later


LIBRARIES: dict[str, Callable[..., Tensor]] = {  # q, k, v, lengths, deterministic, window
    "flash-attn-3": partial(_flash_attn, module="flash_attn_interface"),
    "flash-attn": partial(_flash_attn, module="flash_attn"),
    "torch-varlen": _torch_varlen,
}


class _DeterministicMode:
    """One backward in torch's deterministic mode: elsewhere it adds up dq in whatever order comes.

    The mode is global and would refuse other ops of a training step, so it is on for this one alone; and without its
    habit of writing NaN into new memory first, which costs a pass over each gradient. Where this backward raises, torch
    runs no hook after it, and the mode stays: the step is lost then anyway.
    """

    def __init__(self, node: torch.autograd.graph.Node) -> None:
        self._before: list[tuple[int, bool]] = []
        node.register_prehook(self.enter)
        node.register_hook(self.leave)

    def enter(self, *_: Any) -> None:
        memory: Any = torch.utils.deterministic
        self._before.append((torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory))
        torch.set_deterministic_debug_mode("error")
        memory.fill_uninitialized_memory = False

    def leave(self, *_: Any) -> None:
        memory: Any = torch.utils.deterministic
        mode, memory.fill_uninitialized_memory = self._before.pop()
        torch.set_deterministic_debug_mode(mode)


# CPU and fp32: scaled_dot_product_attention, a batch for segments of similar lengths


@dataclass(frozen=True)
class _Bucket:
    """Segments of similar lengths, padded on the right to one batch."""

    q_rows: Tensor  # (B, mq) rows of q; padding repeats row 0
    k_rows: Tensor  # (B, mk) rows of k and v
    real: Tensor  # indices into (B*mq,) of what is not padding
    mask: Tensor | None  # (B, 1, mq, mk) bool; None: plain causal, where padding on the right is never seen


@dataclass(frozen=True)
class _Plan:
    buckets: list[_Bucket]
    order: Tensor  # (T,) where each row of q lies in the buckets' outputs, one after the other

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        for b in self.buckets:
            q_b, k_b, v_b = _rows(q, b.q_rows), _rows(k, b.k_rows), _rows(v, b.k_rows)  # (B, H or K, m, C)
            with _kept_once({q_b: (q, b.q_rows), k_b: (k, b.k_rows), v_b: (v, b.k_rows)}):
                o_b = F.scaled_dot_product_attention(q_b, k_b, v_b, b.mask, is_causal=b.mask is None, enable_gqa=True)
            outs.append(o_b.transpose(1, 2).flatten(0, 1).index_select(0, b.real))  # (rows of this bucket, H, C)
        return torch.cat(outs).index_select(0, self.order) if outs else torch.empty_like(q)


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    batched: Tensor = x.index_select(0, rows.flatten()).unflatten(0, rows.shape)
    return batched.transpose(1, 2)


def _plan(cu_q: Tensor, cu_k: Tensor, kv_rows: Tensor | None, device: torch.device, window: int) -> _Plan:
    """Few calls for many segments: lengths that round up to the same step of a sqrt(2) ladder share a batch."""
    groups = defaultdict(list)
    for q0, q1, k0, k1 in zip(*(cu.tolist() for cu in (cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:])), strict=True):
        if q1 > q0:
            groups[_rung(q1 - q0), _rung(k1 - k0), q1 - q0 == k1 - k0].append((q0, q1, k0, k1))
    buckets = [
        _bucket(torch.tensor(spans), square, kv_rows, device, window)
        for (_, _, square), spans in sorted(groups.items())
    ]
    rows = torch.cat([b.q_rows.flatten()[b.real] for b in buckets]) if buckets else torch.empty(0, dtype=torch.long)
    return _Plan(buckets, rows.argsort())


def _rung(n: int) -> int:
    step = 16
    while step < n:
        step += step // 2 if step & (step - 1) == 0 else step // 3
    return step


def _bucket(spans: Tensor, square: bool, kv_rows: Tensor | None, device: torch.device, window: int) -> _Bucket:
    q0, q1, k0, k1 = spans.unbind(1)  # (B,)
    len_q, len_k = q1 - q0, k1 - k0
    i, j = torch.arange(int(len_q.max())), torch.arange(int(len_k.max()))
    in_q, in_k = i < len_q[:, None], j < len_k[:, None]  # (B, mq), (B, mk)
    q_rows = torch.where(in_q, q0[:, None] + i, q0[:, None])
    k_rows = torch.where(in_k, k0[:, None] + j, k0[:, None])
    k_rows = k_rows if kv_rows is None else kv_rows.cpu()[k_rows]
    mask, is_cut = None, 0 < window < int(len_k.max())
    if is_cut or not square:
        newest = i + (len_k - len_q)[:, None]  # (B, mq) the last key that each query sees
        seen = (j <= newest[..., None]) & in_k[:, None, :]  # (B, mq, mk)
        if is_cut:  # a query of the padding sees what the segment's last one does: of no key a softmax may be NaN
            seen &= j > (newest.minimum(len_k[:, None] - 1) - window)[..., None]
        mask = seen[:, None].to(device)
    return _Bucket(q_rows.to(device), k_rows.to(device), in_q.flatten().nonzero()[:, 0].to(device), mask)
