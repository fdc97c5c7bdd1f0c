"""Units (a prefix and its replies) -> Packs: which units share a forward, on which rank, and the tensors of one."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, DTypeLike, NDArray

from thinkmid.types import Pack

_csrc: Any  # a module in C++ without type information
try:
    from thinkmid import _csrc  # type: ignore[attr-defined, no-redef]
except ImportError:  # no compiler at install time: the twins below give the same answers, slower
    _csrc = None

Array = NDArray[Any]
STREAMS = ("ce_w", "pg_w", "adv", "logp_old")  # of a Reply, beside its tokens
# of a Pack, put together part by part
DTYPES: dict[str, DTypeLike] = dict.fromkeys(("tokens", "positions", "kv_rows", "rows", "targets", "reply"), np.int64)
DTYPES |= dict.fromkeys(STREAMS, np.float32)
ALIGN = 16  # bytes; for an address that 16 does not divide Triton compiles its kernels once more


@dataclass(frozen=True, kw_only=True)
class Reply:
    """Tokens after a prefix with the streams of types.Pack, all (n,)."""

    tokens: Array
    ce_w: Array
    pg_w: Array
    adv: Array
    logp_old: Array

    @staticmethod
    def text(tokens: ArrayLike, weight: float | Array) -> Reply:
        """Tokens that carry next-token loss and nothing else."""
        tokens = np.asarray(tokens)
        zeros = np.zeros(len(tokens), np.float32)
        ce_w = np.broadcast_to(np.asarray(weight, np.float32), zeros.shape)
        return Reply(tokens=tokens, ce_w=ce_w, pg_w=zeros, adv=zeros, logp_old=zeros)


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What stays together: a prefix that carries no loss, and the replies that share it. A document is one reply."""

    name: str
    prefix: np.ndarray  # (p,), at least one token
    replies: list[Reply]

    @property
    def length(self) -> int:
        """Rows in a forward. The last token of a reply predicts nothing and is left out."""
        return len(self.prefix) + sum(len(r.tokens) - 1 for r in self.replies)

    @property
    def pairs(self) -> int:
        """Query-key pairs of attention."""
        p = len(self.prefix)
        return p * p // 2 + sum((n := len(r.tokens) - 1) * p + n * n // 2 for r in self.replies)


def best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Bin of each length by best-fit decreasing; what exceeds the capacity gets a bin of its own."""
    bin_of: list[int] = (_csrc.best_fit if _csrc else _best_fit)(lengths, capacity)
    return bin_of


def balance(costs: list[float], lengths: list[int], capacity: int, num_bins: int) -> list[int]:
    """Bin of each item, dearest first into the cheapest bin with room; [] when an item finds none."""
    bin_of: list[int] = (_csrc.balance if _csrc else _balance)(costs, lengths, capacity, num_bins)
    return bin_of


def plan(units: list[Unit], *, capacity: int, ranks: int, pair_cost: float) -> list[list[list[Unit]]]:
    """Units by rank and micro-step, the same number of micro-steps on every rank; some may be empty.

    capacity: rows of a pack. Larger units are split among their replies; a single reply with its prefix must fit.
    pair_cost: cost of one query-key pair, in costs of one row.
    """
    units = [part for unit in units for part in split(unit, capacity)]
    if not units:
        return [[] for _ in range(ranks)]
    lengths = [u.length for u in units]
    costs = [u.length + pair_cost * u.pairs for u in units]
    fitted = best_fit(lengths, capacity)
    num_bins = -(-(max(fitted) + 1) // ranks) * ranks
    bin_of = balance(costs, lengths, capacity, num_bins) or fitted
    bins = [[i for i in range(len(units)) if bin_of[i] == b] for b in range(num_bins)]
    # packs that run at the same time should cost the same: FSDP waits for the slowest at every block
    bins = [bin for _, bin in sorted((-sum(costs[i] for i in b), b) for b in bins)]
    return [[[units[i] for i in b] for b in bins[rank::ranks]] for rank in range(ranks)]


def split(unit: Unit, capacity: int) -> list[Unit]:
    """The unit, or several with the same prefix that each fit."""
    if unit.length <= capacity:
        return [unit]
    room = capacity - len(unit.prefix)
    lengths = [len(r.tokens) - 1 for r in unit.replies]
    if max(lengths) > room:
        raise ValueError(
            f"{unit.name}: prefix {len(unit.prefix)} + reply {max(lengths)} exceed a pack of {capacity} tokens"
        )
    bin_of = best_fit(lengths, room)
    parts = [[r for r, at in zip(unit.replies, bin_of, strict=True) if at == b] for b in range(max(bin_of) + 1)]
    return [replace(unit, replies=part) for part in parts]


def duplicated(unit: Unit) -> list[Unit]:
    """The same loss with the prefix once per reply: what other trainers run, and the truth of law 2."""
    return [replace(unit, replies=[r]) for r in unit.replies]


def make_pack(units: list[Unit], device: torch.device | str = "cpu") -> Pack:
    """Tensors of one forward. Without units: one token without loss, so that ranks agree on the number of forwards."""
    b = _Builder()
    for unit in units:
        b.add(unit)
    if not units:
        b.segment(np.zeros(1, np.int64), 0, [(0, 1)])
    return b.finish([u.name for u in units], device)


class _Builder:
    """Arrays of a pack, one list of parts for each."""

    def __init__(self) -> None:
        self.length, self.num_replies, self.cu_q, self.cu_k = 0, 0, [0], [0]
        self.parts: dict[str, list[Array]] = {name: [] for name in DTYPES}

    def segment(self, tokens: Array, position: int, keys: Sequence[tuple[int, int]]) -> None:
        """Append query rows; keys are spans of rows, the last one the segment's own."""
        self.parts["tokens"].append(tokens)
        self.parts["positions"].append(np.arange(position, position + len(tokens)))
        self.parts["kv_rows"] += [np.arange(lo, hi) for lo, hi in keys]
        self.length += len(tokens)
        self.cu_q.append(self.length)
        self.cu_k.append(self.cu_k[-1] + sum(hi - lo for lo, hi in keys))

    def add(self, unit: Unit) -> None:
        start, p = self.length, len(unit.prefix)
        if len(unit.replies) == 1:
            (reply,) = unit.replies
            n = p + len(reply.tokens) - 1
            self.segment(np.concatenate([unit.prefix, reply.tokens[:-1]]), 0, [(start, start + n)])
            self._loss(reply, np.arange(start + p - 1, start + n))
            return
        self.segment(unit.prefix, 0, [(start, start + p)])
        for reply in unit.replies:
            at, n = self.length, len(reply.tokens) - 1
            if n:
                self.segment(reply.tokens[:-1], p, [(start, start + p), (at, at + n)])
            # the last row of the prefix predicts the first token of every reply
            self._loss(reply, np.concatenate([[start + p - 1], np.arange(at, at + n)]))

    def _loss(self, reply: Reply, rows: Array) -> None:
        """The rows that predict the reply's tokens, those of weight 0 left out."""
        live = (reply.ce_w != 0) | (reply.pg_w != 0)
        found = {name: getattr(reply, name) for name in STREAMS} | {"targets": reply.tokens, "rows": rows}
        for name, values in found.items():
            self.parts[name].append(values[live])
        self.parts["reply"].append(np.full(live.sum(), self.num_replies))
        self.num_replies += bool(live.any())

    def finish(self, owner: list[str], device: torch.device | str) -> Pack:
        arrays = {name: _cat(parts, DTYPES[name]) for name, parts in self.parts.items()}
        arrays |= {"cu_q": np.array(self.cu_q, np.int32), "cu_k": np.array(self.cu_k, np.int32)}
        for at, weight in (("ce_at", arrays["ce_w"]), ("pg_at", arrays["pg_w"])):
            if not weight.all():
                arrays[at] = weight.nonzero()[0]
        kv_rows = arrays.pop("kv_rows")
        if self.cu_k != self.cu_q:
            readers = np.bincount(kv_rows, minlength=self.length)
            arrays |= {"kv_rows": kv_rows, "kv_order": kv_rows.argsort(kind="stable"), "kv_readers": readers}
        max_q, max_k = (int(np.diff(cu).max()) for cu in (self.cu_q, self.cu_k))
        return Pack(**upload(arrays, device), max_q=max_q, max_k=max_k, owner=owner)


def upload(arrays: dict[str, Array], device: torch.device | str) -> dict[str, torch.Tensor]:
    """The arrays as tensors on the device: views of one buffer that took one copy, on the CPU none."""
    places, end = {}, 0
    for name, x in arrays.items():
        places[name] = slice(end, end + x.nbytes)
        end += -(-x.nbytes // ALIGN) * ALIGN
    # from memory that is not pinned a copy waits until the device has done all that it was given
    host = torch.empty(end, dtype=torch.uint8, pin_memory=torch.device(device).type == "cuda")
    for name, x in arrays.items():
        host[places[name]].numpy()[:] = x.view(np.uint8)
    there = host.to(device, non_blocking=True)
    return {name: there[places[name]].view(getattr(torch, x.dtype.name)) for name, x in arrays.items()}


def _cat(arrays: Iterable[Array], dtype: DTypeLike) -> Array:
    return np.concatenate([np.zeros(0, dtype), *arrays], dtype=dtype, casting="unsafe")


def _best_fit(lengths: list[int], capacity: int) -> list[int]:
    bin_of, num_bins = [0] * len(lengths), 0
    open_bins: list[tuple[int, int]] = []  # (room left, bin), sorted
    for item in _falling(lengths):
        at = bisect_left(open_bins, (lengths[item], 0))
        room, b = open_bins.pop(at) if at < len(open_bins) else (capacity, num_bins)
        num_bins = max(num_bins, b + 1)
        insort(open_bins, (room - lengths[item], b))
        bin_of[item] = b
    return bin_of


def _balance(costs: list[float], lengths: list[int], capacity: int, num_bins: int) -> list[int]:
    bin_of, room, spent = [0] * len(lengths), [capacity] * num_bins, [0.0] * num_bins
    for item in _falling(costs):
        free = [(spent[b], b) for b in range(num_bins) if room[b] >= lengths[item]]
        if not free:
            return []
        _, b = min(free)
        spent[b] += costs[item]
        room[b] -= lengths[item]
        bin_of[item] = b
    return bin_of


def _falling(values: Sequence[float]) -> list[int]:
    """Indices by falling value, equal ones in their order."""
    return sorted(range(len(values)), key=values.__getitem__, reverse=True)
