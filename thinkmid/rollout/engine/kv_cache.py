"""Keys and values of sequences being decoded, each prefix stored once, and the newest tokens' attention over both."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from thinkmid.kernels import launch
from thinkmid.model.transformer import ModelConfig

KEY_STEP = 16  # positions are read in steps of so many
NEVER = -1e30  # bias of a key that is not seen; finite, see partial_attention


class Attention:
    """attend(layer, q, k, v) of one token per sequence: its key and value enter the cache, at position count (B,).

    q (B, H, C); k, v (B, K, C); returns (B, H, C) in q's dtype. With a window, keys of the prefix and then of the
    sequence's own fall out of sight, one a step; they stay in the cache.
    """

    def __init__(self, cache: Cache, families: Families, count: NDArray[np.int64]):
        self._cache, self._families = cache, families
        self._count = torch.from_numpy(count).to(cache.k[0].device)
        self._is_cpp = launch.row_path(cache.k[0]) == "cpp"
        if not self._is_cpp:
            num, longest = len(count), int(count.max()) + 1
            self._length = min(-(-longest // KEY_STEP) * KEY_STEP, cache.max_len)
            self._biases: dict[int, tuple[Tensor, Tensor | None]] = {}  # of each window
            self._rows = torch.arange(num, device=self._count.device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int = 0) -> Tensor:
        return self._cpp(layer, q, k, v, window) if self._is_cpp else self._torch(layer, q, k, v, window)

    def _cpp(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        _csrc = launch.cpp()

        cache, families, prefix, num_keys = self._cache, self._families, self._families.cache, k.shape[1]
        q, k, v = (x.contiguous() for x in (q, k, v))
        out = torch.empty_like(q)
        stored = (cache.k[layer], cache.v[layer], prefix.k[layer], prefix.v[layer])
        tensors = (q, k, v, *stored, self._count, families.slot, families.lengths, out)
        sizes = [len(q), num_keys, q.shape[1] // num_keys, q.shape[2], cache.max_len, prefix.max_len]
        _csrc.decode_attention(sizes, window, [launch.address(x) for x in tensors])
        return out

    def _torch(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        cache, (num, num_keys) = self._cache, k.shape[:2]
        cache.k[layer][self._rows, :, :, self._count] = k
        cache.v[layer][self._rows, :, self._count] = v
        # the heads of a group are queries of one key head
        heads = q.reshape(num * num_keys, -1, q.shape[-1])  # (B*K, H/K, C)
        if window not in self._biases:
            self._biases[window] = self._own_bias(window), self._families.bias(self._count, window, heads.shape[1])
        own_bias, bias = self._biases[window]
        own, own_lse = partial_attention(heads, *cache.first(layer, num, self._length), own_bias)
        if self._families.length:
            out, lse = self._families.attention(layer, heads, bias)
            own = own.lerp_(out, (lse - own_lse).sigmoid_())
        return own.view_as(q).to(q.dtype)

    def _own_bias(self, window: int) -> Tensor:
        at, newest = torch.arange(self._length, device=self._count.device), self._count[:, None]
        unseen = (at > newest) | (at <= newest - window) if window else at > newest
        return bias_of(unseen, self._cache.k[0].shape[1])


def partial_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention over some of the keys, and the log of its denominator, (N, m, 1), by which parts are weighed; fp32.

    q (N, m, C); k (N, C, length), v (N, length, C); returns (N, m, C). bias (N, 1 or m, length) is finite, so that a
    part without keys weighs 0; None: all keys are seen.
    """
    scores, scale = _product(q, k), q.shape[-1] ** -0.5
    scores = scores.mul_(scale) if bias is None else torch.add(bias, scores, alpha=scale)
    p = scores.softmax(-1)
    lse = scores.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log_()  # logsumexp would take another pass
    return _product(p.to(v.dtype), v), lse


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y (N, m, n) in fp32: 16 bits would round scores of 10 by 0.03."""
    if x.dtype == torch.float32:
        return torch.bmm(x, y)
    # on a GPU from 16 bits with fp32 sums; the CPU's products know no other dtype than their inputs'
    return torch.bmm(x, y, out_dtype=torch.float32) if x.is_cuda else torch.bmm(x.float(), y.float())


def bias_of(unseen: Tensor, num_keys: int) -> Tensor:
    """(N*K, 1, length) what to add to the scores: NEVER where unseen (N, length), else 0."""
    bias = torch.zeros(unseen.shape, device=unseen.device).masked_fill_(unseen, NEVER)
    return bias.repeat_interleave(num_keys, 0)[:, None]


class Cache:
    """Keys and values, one row per sequence or prefix: k[layer] (rows, K, C, max_len), v[layer] (rows, K, max_len, C).

    Keys lie transposed: the scores of neighbouring positions are neighbours.
    """

    def __init__(self, cfg: ModelConfig, num_rows: int, max_len: int, like: Tensor):
        """like: a tensor of the dtype and on the device."""
        self.max_len = -(-max_len // KEY_STEP) * KEY_STEP
        num_keys, size = cfg.kv_heads, cfg.head_dim
        # zeros: masked keys still meet a multiplication, and 0 * NaN is NaN
        self.k = [like.new_zeros(num_rows, num_keys, size, self.max_len) for _ in range(cfg.layers)]
        self.v = [like.new_zeros(num_rows, num_keys, self.max_len, size) for _ in range(cfg.layers)]

    def first(self, layer: int, num: int, length: int) -> tuple[Tensor, Tensor]:
        """k (num*K, C, length), v (num*K, length, C): the first positions of the first rows."""
        return self.k[layer][:num, ..., :length].flatten(0, 1), self.v[layer][:num, :, :length].flatten(0, 1)

    def reserve(self, num_rows: int, max_len: int = 0) -> None:
        """Room for at least so many rows and positions; what is stored stays."""
        more = max(0, num_rows - len(self.k[0]))
        wider = max(self.max_len, -(-max_len // KEY_STEP) * KEY_STEP) - self.max_len
        if more or wider:
            for layer, (k, v) in enumerate(zip(self.k, self.v, strict=True)):
                self.k[layer] = F.pad(k, (0, wider, 0, 0, 0, 0, 0, more))
                self.v[layer] = F.pad(v, (0, 0, 0, wider, 0, 0, 0, more))
            self.max_len += wider

    def move(self, moves: list[tuple[int, int]]) -> None:
        """Rows (from, to): the last rows fill the gaps that finished ones left."""
        if moves:
            source, target = (list(x) for x in zip(*moves, strict=True))
            for x in (*self.k, *self.v):
                x[target] = x[source]


class Prefixes:
    """The prefixes in use, each stored once however many siblings read it. A prompt is known by a number."""

    def __init__(self, cfg: ModelConfig, like: Tensor):
        self.cache = Cache(cfg, 0, 0, like)
        self.slot: dict[int, int] = {}  # prompt -> row of the cache; slots 0, 1, ... are taken
        self._length = np.zeros(0, np.int64)

    def add(self, lengths: dict[int, int]) -> None:
        """A slot for each new prompt, with room for so many tokens."""
        first, size = len(self.slot), len(self.slot) + len(lengths)
        self.slot |= {prompt: slot for slot, prompt in enumerate(lengths, start=first)}
        self.cache.reserve(size, max(lengths.values(), default=0))
        self._length = np.append(self._length[:first], np.array([*lengths.values()], np.int64))

    def keep(self, prompts: set[int]) -> None:
        """Drop all others; the last slots fill the gaps."""
        gone = [p for p in self.slot if p not in prompts]
        holes = sorted(self.slot.pop(p) for p in gone)
        holes = [h for h in holes if h < len(self.slot)]
        last = [p for p, s in self.slot.items() if s >= len(self.slot)]
        self.cache.move([(self.slot[p], hole) for p, hole in zip(last, holes, strict=True)])
        for p, hole in zip(last, holes, strict=True):
            self._length[hole] = self._length[self.slot[p]]
            self.slot[p] = hole

    def families(self, prompts: Iterable[int]) -> Families:
        """prompts: of each row."""
        slots = np.array([self.slot[p] for p in prompts], np.int64)
        return Families(self.cache, self._length[: len(self.slot)], slots)


class Families:
    """Which rows read which prefix, for as long as no sequence comes or goes."""

    def __init__(self, cache: Cache, length_A: NDArray[np.int64], slot_B: NDArray[np.int64]):
        self.cache, self.length = cache, int(length_A.max(initial=0))
        device = cache.k[0].device
        self.slot, self.lengths = (torch.from_numpy(x).to(device) for x in (slot_B, length_A[slot_B]))
        if launch.row_path(cache.k[0]) != "cpp":
            self._group(length_A, slot_B)

    def _group(self, length_A: NDArray[np.int64], slot_B: NDArray[np.int64]) -> None:
        """All siblings query their prefix at once: a matrix product instead of one row at a time."""
        cache = self.cache
        device, num_keys = cache.k[0].device, cache.k[0].shape[1]
        num_A = np.bincount(slot_B, minlength=len(length_A))
        order, most = slot_B.argsort(kind="stable"), int(num_A.max(initial=0))
        place_B = np.empty_like(slot_B)  # of each row among its siblings
        place_B[order] = np.arange(len(slot_B)) - (num_A.cumsum() - num_A)[slot_B[order]]
        members = np.zeros((len(length_A), most), np.int64)  # rows; padding repeats row 0
        members[slot_B, place_B] = np.arange(len(slot_B))
        # queries come as (B*K,); they are read as (A, K, most), and what they find is put back
        head = np.arange(num_keys)
        read = members[:, None] * num_keys + head[:, None]  # (A, K, most)
        put = (slot_B[:, None] * num_keys + head) * most + place_B[:, None]  # (B, K)
        self._read, self._put = (torch.from_numpy(x.reshape(-1)).to(device) for x in (read, put))
        self._shape, self._members = (len(length_A), num_keys, most), torch.from_numpy(members).to(device)
        self._bias = None
        if (length_A < self.length).any():
            unseen = torch.from_numpy(np.arange(self.length) >= length_A[:, None]).to(device)
            self._bias = bias_of(unseen, num_keys)

    def bias(self, count: Tensor, window: int, group: int) -> Tensor | None:
        """Of the prefixes' keys, for attention(); count (B,) of each row's own keys before the newest, group = H/K.

        A window ends elsewhere for each sibling.
        """
        if not window or not self.length:
            return self._bias
        oldest = (self.lengths + count - window)[self._members, None]  # (A, most, 1) the first key that is not seen
        gone = torch.arange(self.length, device=count.device) <= oldest
        bias = gone.repeat_interleave(group, 1).repeat_interleave(self._shape[1], 0) * NEVER  # (A*K, most*m, length)
        return bias if self._bias is None else bias.minimum(self._bias)

    def attention(self, layer: int, q: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """partial_attention of q (B*K, H/K, C) over the prefixes, rows in q's order; bias of bias()."""
        num, num_keys, most = self._shape
        m, size = q.shape[1:]
        q = q.index_select(0, self._read).view(num * num_keys, most * m, size)
        out, lse = partial_attention(q, *self.cache.first(layer, num, self.length), bias)
        return out.view(-1, m, size).index_select(0, self._put), lse.view(-1, m, 1).index_select(0, self._put)
