from dataclasses import fields, replace
from itertools import pairwise
from math import ceil

import numpy as np
import pytest
import torch
from conftest import random_groups
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from thinkmid.data import pack
from thinkmid.data.pack import Reply, Unit, make_pack, plan, split
from thinkmid.train import advantage
from thinkmid.train.config import LossConfig

NUMBERED = settings(max_examples=200, deadline=None)
ITEMS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 30).map(lambda x: x / 4)), max_size=40)


def unit(name, prefix, reply_lengths):
    """Tokens are numbered, so that each is told apart."""
    ids = iter(range(10**6))
    replies = [Reply.text(np.array([next(ids) for _ in range(n)]), 1.0) for n in reply_lengths]
    return Unit(name=name, prefix=np.arange(prefix) + 1000, replies=replies)


UNITS = st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 12), min_size=1, max_size=6)), max_size=12)


@pytest.mark.skipif(pack._csrc is None, reason="csrc was not built")
@NUMBERED
@given(items=ITEMS, capacity=st.integers(1, 60), num_bins=st.integers(1, 9))
def test_the_cpp_and_python_packers_give_the_same_bins(items, capacity, num_bins):
    lengths, costs = [length for length, _ in items], [cost for _, cost in items]
    assert pack._csrc.best_fit(lengths, capacity) == pack._best_fit(lengths, capacity)
    ours = pack._csrc.balance(costs, lengths, capacity, num_bins)
    assert ours == pack._balance(costs, lengths, capacity, num_bins)


@NUMBERED
@given(items=ITEMS, capacity=st.integers(1, 60))
def test_best_fit_opens_a_bin_only_for_what_fits_nowhere(items, capacity):
    lengths = [length for length, _ in items]
    bin_of = pack._best_fit(lengths, capacity)
    contents = [[n for n, b in zip(lengths, bin_of, strict=True) if b == at] for at in sorted(set(bin_of))]
    assert all(sum(c) <= capacity or len([n for n in c if n]) == 1 for c in contents)
    # any two bins overflow together, else the second would not have been opened
    assert all(sum(a) + sum(b) > capacity for i, a in enumerate(contents) for b in contents[:i] if all(a) and all(b))


@NUMBERED
@given(shapes=UNITS, spare=st.integers(0, 40), ranks=st.integers(1, 5), pair_cost=st.sampled_from([0.0, 0.01, 1.0]))
def test_a_plan_fits_keeps_every_reply_and_gives_ranks_the_same_number_of_steps(shapes, spare, ranks, pair_cost):
    units = [unit(f"u{i}", p, replies) for i, (p, replies) in enumerate(shapes)]
    capacity = max([p + n - 1 for p, replies in shapes for n in replies], default=1) + spare
    planned = plan(units, capacity=capacity, ranks=ranks, pair_cost=pair_cost)
    assert len(planned) == ranks
    assert len({len(steps) for steps in planned}) == 1
    batches = [batch for steps in planned for batch in steps]
    assert all(sum(u.length for u in batch) <= capacity for batch in batches)
    assert all(len(make_pack(batch).tokens) <= capacity for batch in batches)
    seen = sorted((u.name, tuple(u.prefix), tuple(r.tokens)) for batch in batches for u in batch for r in u.replies)
    assert seen == sorted((u.name, tuple(u.prefix), tuple(r.tokens)) for u in units for r in u.replies)
    # packs that run at the same time are neighbours in cost
    costs = [
        [sum(u.length + pair_cost * u.pairs for u in batch) for batch in step] for step in zip(*planned, strict=True)
    ]
    assert all(min(now) >= max(later) for now, later in pairwise(costs))
    # a rank idles only where the number of packs does not divide by the ranks
    assert sum(not batch for batch in batches) < ranks or not units


def test_a_plan_is_the_same_on_every_rank_whatever_the_order_of_equal_units():
    units = [unit(f"u{i}", 3, [4, 4]) for i in range(9)]
    first, again = (plan(units, capacity=30, ranks=4, pair_cost=0.1) for _ in range(2))
    assert [[[u.name for u in b] for b in r] for r in first] == [[[u.name for u in b] for b in r] for r in again]


def test_ranks_wait_less_than_a_twentieth_for_the_slowest():
    rng = np.random.default_rng(0)
    prefixes, lengths_P_G = rng.integers(64, 1024, 96).tolist(), (rng.lognormal(5, 0.6, (96, 8)) + 1).astype(int)
    units = [unit(f"u{i}", p, n) for i, (p, n) in enumerate(zip(prefixes, lengths_P_G, strict=True))]
    pair_cost = 1e-4

    def cost(batch):
        return sum(u.length + pair_cost * u.pairs for u in batch)

    planned = plan(units, capacity=16384, ranks=8, pair_cost=pair_cost)
    slowest = sum(max(cost(batch) for batch in step) for step in zip(*planned, strict=True))
    total = sum(cost(batch) for steps in planned for batch in steps)
    assert slowest <= 1.05 * total / 8
    rows = sum(part.length for u in units for part in split(u, 16384))
    assert len(planned[0]) <= ceil(rows / (0.9 * 16384 * 8))


def test_a_reply_too_long_for_a_pack_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^book 7: prefix 5 \+ reply 6 exceed a pack of 10 tokens$"):
        plan([unit("fits", 2, [2]), unit("book 7", 5, [2, 7])], capacity=10, ranks=2, pair_cost=0.0)


@NUMBERED
@given(p=st.integers(1, 9), replies=st.lists(st.integers(1, 12), min_size=1, max_size=9), spare=st.integers(0, 30))
def test_cost_counts_the_rows_and_the_attended_pairs_of_the_pack(p, replies, spare):
    u = unit("u", p, replies)
    got = make_pack([u])
    assert u.length == len(got.tokens)
    pairs = 0
    for q0, q1, k0, k1 in zip(got.cu_q[:-1], got.cu_q[1:], got.cu_k[:-1], got.cu_k[1:], strict=True):
        pairs += sum(int(k1 - k0) - int(q1 - q0) + i + 1 for i in range(int(q1 - q0)))
    # the estimate leaves out half of each diagonal
    assert abs(u.pairs - pairs) <= (u.length + len(replies) + 1)


def slow_pack(units):
    """Tokens, positions, (queries, keys) of each segment, and rows with loss, written down one token at a time."""
    tokens, positions, segments, losses = [], [], [], []
    for u in units:
        p, start = len(u.prefix), len(tokens)
        for i, token in enumerate(u.prefix):
            tokens.append(token)
            positions.append(i)
        prefix_rows = list(range(start, start + p))
        if len(u.replies) > 1:
            segments.append((prefix_rows, prefix_rows))
        for reply in u.replies:
            own = list(range(len(tokens), len(tokens) + len(reply.tokens) - 1))
            for i, token in enumerate(reply.tokens[:-1]):
                tokens.append(token)
                positions.append(p + i)
            if len(u.replies) == 1:
                segments.append((prefix_rows + own, prefix_rows + own))
            elif own:
                segments.append((own, prefix_rows + own))
            for row, t in zip([prefix_rows[-1], *own], range(len(reply.tokens)), strict=True):
                if reply.ce_w[t] or reply.pg_w[t]:
                    streams = (reply.tokens, reply.ce_w, reply.pg_w, reply.adv, reply.logp_old)
                    losses.append((row, *(s[t] for s in streams)))
    return tokens, positions, segments, losses


def as_lists(got):
    kv_rows = torch.arange(len(got.tokens)) if got.kv_rows is None else got.kv_rows
    q, k = got.cu_q.tolist(), got.cu_k.tolist()
    segments = [(list(range(q[i], q[i + 1])), kv_rows[k[i] : k[i + 1]].tolist()) for i in range(len(q) - 1)]
    streams = (got.rows, got.targets, got.ce_w, got.pg_w, got.adv, got.logp_old)
    losses = list(zip(*(s.tolist() for s in streams), strict=True))
    return got.tokens.tolist(), got.positions.tolist(), segments, losses


@pytest.mark.parametrize("siblings", [1, 2, 5])
def test_a_pack_is_what_the_slow_construction_writes_down(siblings):
    groups = random_groups(np.random.default_rng(siblings).integers(0, 2, (7, siblings)).tolist(), seed=siblings)
    units = advantage.units(groups, LossConfig(denom=2.0, kl=0.1), siblings)
    text = Unit(name="text", prefix=np.array([3]), replies=[Reply.text(np.arange(11), np.linspace(0, 1, 11))])
    units.insert(2, text)
    got = make_pack(units)
    slow = slow_pack(units)
    assert as_lists(got) == slow
    assert (got.kv_rows is None) == (siblings == 1)
    assert got.owner == [u.name for u in units]
    assert (got.cu_q.dtype, got.cu_k.dtype, got.tokens.dtype, got.adv.dtype) == (
        torch.int32, torch.int32, torch.int64, torch.float32,
    )  # fmt: skip
    assert got.max_q == max(len(queries) for queries, _ in slow[2])
    assert got.max_k == max(len(keys) for _, keys in slow[2])
    assert got.ce_at.tolist() == [i for i, (_, _, ce_w, *_) in enumerate(slow[3]) if ce_w]
    assert got.pg_at.tolist() == [i for i, (_, _, _, pg_w, *_) in enumerate(slow[3]) if pg_w]
    keys = [row for _, keys in slow[2] for row in keys]
    if siblings == 1:
        assert got.kv_order is got.kv_readers is None
    else:
        assert got.kv_order.tolist() == sorted(range(len(keys)), key=keys.__getitem__)
        assert got.kv_readers.tolist() == [keys.count(row) for row in range(len(slow[0]))]


def test_replies_of_one_token_hang_on_the_prefix_alone():
    u = unit("u", 4, [1, 1, 3])
    got = make_pack([u])
    assert as_lists(got) == slow_pack([u])
    assert got.cu_q.tolist() == [0, 4, 6]
    assert got.rows.tolist() == [3, 3, 3, 4, 5]
    alone = make_pack([unit("u", 4, [1])])
    assert (alone.cu_q.tolist(), alone.rows.tolist(), alone.targets.tolist()) == ([0, 4], [3], [0])


def test_a_pack_of_nothing_is_one_token_without_loss():
    got = make_pack([])
    assert as_lists(got) == ([0], [0], [([0], [0])], [])
    assert got.owner == []
    assert (got.max_q, got.max_k, got.ce_at, got.pg_at) == (1, 1, None, None)


def test_rows_of_one_kind_alone_are_not_listed():
    text = make_pack([unit("u", 1, [3])])
    assert text.ce_at is None
    assert text.pg_at.tolist() == []


LENGTHS = st.lists(st.tuples(st.sampled_from(["int64", "int32", "float32"]), st.integers(0, 9)), min_size=1, max_size=9)


@NUMBERED
@given(shapes=LENGTHS)
def test_what_is_uploaded_are_the_arrays_in_one_buffer_each_where_triton_wants_it(shapes):
    rng = np.random.default_rng(len(shapes))
    arrays = {str(i): rng.integers(-99, 99, n).astype(dtype) for i, (dtype, n) in enumerate(shapes)}
    got = pack.upload(arrays, "cpu")
    assert got.keys() == arrays.keys()
    for name, x in arrays.items():
        one_by_one = torch.tensor(x)
        assert got[name].dtype == one_by_one.dtype
        assert torch.equal(got[name], one_by_one)
        assert got[name].data_ptr() % 16 == 0 or not len(x)
    assert len({t.untyped_storage().data_ptr() for t in got.values()}) == 1


class Copies(TorchDispatchMode):
    """Counts the ops that bring data from the host to the meta device, which stands in for a GPU."""

    num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        here = any(isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in args)
        self.num += here and isinstance(out, torch.Tensor) and out.device.type == "meta"
        return out


@pytest.mark.parametrize("units", [[], [unit("text", 1, [7])], [unit("a", 3, [2, 5]), unit("b", 1, [4])]])
def test_a_pack_takes_one_copy_to_the_device(units):
    with Copies() as copies:
        got = make_pack(units, "meta")
    assert copies.num == 1
    here = make_pack(units)
    for field in fields(here):
        mine, there = getattr(here, field.name), getattr(got, field.name)
        if isinstance(mine, torch.Tensor):
            assert (there.device.type, there.dtype, there.shape) == ("meta", mine.dtype, mine.shape), field.name
        else:
            assert there == mine, field.name


@pytest.mark.parametrize(("device", "pinned"), [("cuda", True), (torch.device("cuda", 1), True), ("cpu", False)])
def test_a_gpu_is_copied_to_from_pinned_memory_without_a_wait(device, pinned, monkeypatch):
    seen, empty = [], torch.empty

    def fake_empty(*shape, dtype, pin_memory):
        seen.append(pin_memory)
        return empty(*shape, dtype=dtype)

    def fake_to(self, device, non_blocking=False):
        seen.append((device, non_blocking))
        return self

    monkeypatch.setattr(pack.torch, "empty", fake_empty)
    monkeypatch.setattr(torch.Tensor, "to", fake_to)
    got = make_pack([unit("u", 2, [3, 4])], device)
    monkeypatch.undo()
    assert seen == [pinned, (device, True)]
    assert as_lists(got) == slow_pack([unit("u", 2, [3, 4])])


def test_weights_of_a_text_may_differ_by_token():
    got = make_pack([replace(unit("u", 1, [3]), replies=[Reply.text(np.array([5, 6, 7]), np.array([0.5, 0.0, 2.0]))])])
    assert (got.rows.tolist(), got.targets.tolist(), got.ce_w.tolist()) == ([0, 2], [5, 7], [0.5, 2.0])
