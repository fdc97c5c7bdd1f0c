"""Units (a prefix and its replies) -> Packs: which units share a forward, on which rank, and the tensors of one."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, replace

import numpy as np
import torch

from thinkmid.types import Pack

try:
    from thinkmid import _csrc
except ImportError:  # no compiler at install time: the twins below give the same answers, slower
    _csrc = None

ALIGN = 16  # bytes; for an address that 16 does not divide Triton compiles its kernels once more


@dataclass(frozen=True, kw_only=True)
class Reply:
    """Tokens after a prefix with the streams of types.Pack, all (n,)."""

    tokens: np.ndarray
    ce_w: np.ndarray
    pg_w: np.ndarray
    adv: np.ndarray
    logp_old: np.ndarray

    @staticmethod
    def text(tokens, weight: float | np.ndarray) -> Reply:
        """Tokens that carry next-token loss and nothing else."""
        zeros = np.zeros(len(tokens), np.float32)
        ce_w = np.broadcast_to(np.float32(weight), zeros.shape)
        return Reply(tokens=np.asarray(tokens), ce_w=ce_w, pg_w=zeros, adv=zeros, logp_old=zeros)


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
    return (_csrc.best_fit if _csrc else _best_fit)(lengths, capacity)


def balance(costs: list[float], lengths: list[int], capacity: int, num_bins: int) -> list[int]:
    """Bin of each item, dearest first into the cheapest bin with room; [] when an item finds none."""
    return (_csrc.balance if _csrc else _balance)(costs, lengths, capacity, num_bins)


def packing_path() -> str:
    return "C++" if _csrc else "Python (csrc was not built)"


def plan(units: list[Unit], *, capacity: int, ranks: int, pair_cost: float) -> list[list[list[Unit]]]:
    """Units by rank and micro-step, the same number of micro-steps on every rank; a rank may get an empty one.

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
    bins.sort(key=lambda b: (-sum(costs[i] for i in b), b))
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
    def __init__(self):
        self.length, self.num_replies = 0, 0
        self.tokens, self.positions, self.kv, self.rows, self.reply, self.replies = [], [], [], [], [], []
        self.cu_q, self.cu_k = [0], [0]

    def segment(self, tokens, position, keys):
        """Append query rows; keys are spans of rows, the last one the segment's own."""
        self.tokens.append(tokens)
        self.positions.append(np.arange(position, position + len(tokens)))
        self.length += len(tokens)
        self.kv += [np.arange(lo, hi) for lo, hi in keys]
        self.cu_q.append(self.length)
        self.cu_k.append(self.cu_k[-1] + sum(hi - lo for lo, hi in keys))

    def add(self, unit: Unit):
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

    def _loss(self, reply, rows):
        live = (reply.ce_w != 0) | (reply.pg_w != 0)
        self.rows.append(rows[live])
        self.reply.append(np.full(live.sum(), self.num_replies))
        self.num_replies += bool(live.any())
        self.replies.append([a[live] for a in (reply.tokens, reply.ce_w, reply.pg_w, reply.adv, reply.logp_old)])

    def finish(self, owner, device) -> Pack:
        targets, ce_w, pg_w, adv, logp_old = zip(*self.replies, strict=True) if self.replies else [()] * 5
        arrays = {
            "tokens": _cat(self.tokens, np.int64),
            "positions": _cat(self.positions, np.int64),
            "cu_q": np.array(self.cu_q, np.int32),
            "cu_k": np.array(self.cu_k, np.int32),
            "rows": _cat(self.rows, np.int64),
            "targets": _cat(targets, np.int64),
            "ce_w": _cat(ce_w, np.float32),
            "pg_w": _cat(pg_w, np.float32),
            "adv": _cat(adv, np.float32),
            "logp_old": _cat(logp_old, np.float32),
            "reply": _cat(self.reply, np.int64),
        }
        for at, weight in (("ce_at", arrays["ce_w"]), ("pg_at", arrays["pg_w"])):
            if not weight.all():
                arrays[at] = weight.nonzero()[0]
        if self.cu_k != self.cu_q:
            kv_rows = _cat(self.kv, np.int64)
            readers = np.bincount(kv_rows, minlength=self.length)
            arrays |= {"kv_rows": kv_rows, "kv_order": kv_rows.argsort(kind="stable"), "kv_readers": readers}
        max_q, max_k = (int(np.diff(cu).max()) for cu in (self.cu_q, self.cu_k))
        return Pack(**upload(arrays, device), max_q=max_q, max_k=max_k, owner=owner)


def upload(arrays: dict[str, np.ndarray], device: torch.device | str) -> dict[str, torch.Tensor]:
    """The arrays as tensors on the device: views of one buffer that took one copy, on the CPU none."""
    sizes = [-(-x.nbytes // ALIGN) * ALIGN for x in arrays.values()]
    # from memory that is not pinned a copy waits until the device has done all that it was given
    host = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=torch.device(device).type == "cuda")
    for x, room in zip(arrays.values(), host.split(sizes), strict=True):
        room.numpy()[: x.nbytes] = x.view(np.uint8)
    rooms = zip(arrays.items(), host.to(device, non_blocking=True).split(sizes), strict=True)
    return {name: room[: x.nbytes].view(getattr(torch, x.dtype.name)) for (name, x), room in rooms}


def _cat(arrays, dtype):
    return np.concatenate([np.zeros(0, dtype), *arrays], dtype=dtype, casting="unsafe")


def _best_fit(lengths, capacity):
    bin_of, num_bins = [0] * len(lengths), 0
    open_bins: list[tuple[int, int]] = []  # (room left, bin), sorted
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(open_bins, (lengths[item], 0))
        room, b = open_bins.pop(at) if at < len(open_bins) else (capacity, num_bins)
        num_bins = max(num_bins, b + 1)
        insort(open_bins, (room - lengths[item], b))
        bin_of[item] = b
    return bin_of


def _balance(costs, lengths, capacity, num_bins):
    bin_of, room, spent = [0] * len(lengths), [capacity] * num_bins, [0.0] * num_bins
    for item in sorted(range(len(lengths)), key=lambda i: -costs[i]):
        free = [b for b in range(num_bins) if room[b] >= lengths[item]]
        if not free:
            return []
        b = min(free, key=lambda b: (spent[b], b))
        spent[b] += costs[item]
        room[b] -= lengths[item]
        bin_of[item] = b
    return bin_of
