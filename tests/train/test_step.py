import math
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, assert_same, join_ranks, random_groups, random_model, spawn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from thinkmid.data.pack import Reply, Unit, make_pack, plan
from thinkmid.kernels import attention, launch
from thinkmid.model import weights
from thinkmid.model.transformer import Transformer
from thinkmid.run.ranks import Ranks
from thinkmid.train import advantage, fsdp, job, optim, rollouts
from thinkmid.train.config import LossConfig, ModelSection
from thinkmid.train.loss import logprobs, policy_loss, text_loss
from thinkmid.train.step import train_step
from thinkmid.types import STREAMS, Group, Prompt, Sample

ALONE = Ranks(0, 1, torch.device("cpu"), None)
LOSS = LossConfig(denom=3.0)
GROUPS = random_groups([[1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 0, 1]], seed=4)


def planned(groups, ranks, capacity=200):
    units = advantage.units(groups, LOSS, 4)
    return plan(units, capacity=capacity, ranks=ranks.world, pair_cost=0.0)[ranks.rank]


def step(model, optimizer, batches, ranks=ALONE, lr=0.01, clip=0.0):
    loss_fn = partial(policy_loss, model, cfg=LOSS, temperature=1.0, first_update=True)
    return train_step(model, optimizer, batches, loss_fn, ranks, lr=lr, clip=clip)


def snapshot(model, optimizer):
    """Weights and moments, whole."""
    weights.reshard(model)
    tensors = optim.state_tensors(model, optimizer)
    return {k: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for k, t in tensors.items()}


def broken_worker(rank, folder):
    ranks = join_ranks(rank, 2, folder)
    model = fsdp.shard(random_model(), ranks, compute_dtype=torch.float32)
    optimizer = optim.adamw(model, optim.OptimConfig(lr=0.01))
    step(model, optimizer, planned(GROUPS, ranks), ranks)
    before = snapshot(model, optimizer)
    samples = [replace(s, logp=np.full_like(s.logp, np.nan)) for s in GROUPS[1].samples]
    batches = planned([GROUPS[0], replace(GROUPS[1], samples=samples), GROUPS[2]], ranks, capacity=30)
    assert [[u.name for u in batch] for batch in batches] == [["prompt 1", "prompt 2"], ["prompt 0"]][rank : rank + 1]
    stats = step(model, optimizer, batches, ranks)
    assert stats.broken == ["prompt 1", "prompt 2"]  # rank 1, whose loss is finite, says so too
    assert not math.isfinite(stats.sums["loss"])
    assert_same(snapshot(model, optimizer), before)
    fine = step(model, optimizer, planned(GROUPS, ranks), ranks)  # and nothing of it is left
    assert fine.broken == []
    assert math.isfinite(fine.grad_norm)


def test_a_loss_that_is_not_finite_skips_the_update_on_both_ranks_and_names_the_pack(tmp_path):
    spawn(broken_worker, 2, str(tmp_path))


def test_a_gradient_that_is_not_finite_under_a_finite_loss_skips_too():
    model = random_model()
    optimizer = optim.adamw(model, optim.OptimConfig(lr=0.01))
    before = snapshot(model, optimizer)

    def loss_fn(pack):
        return (model.norm.weight * 0).sqrt().sum(), {}

    stats = train_step(model, optimizer, planned(GROUPS, ALONE), loss_fn, ALONE, lr=0.01, clip=1.0)
    assert stats.broken == ["the gradient, though every loss is finite"]
    assert_same(snapshot(model, optimizer), before)


def test_clipping_scales_the_gradient_and_reports_the_norm_it_had():
    moments, norms = [], []
    for clip in (0.0, 1e9, 1e-3):
        model = random_model(dtype=torch.float64)
        optimizer = optim.adamw(model, optim.OptimConfig(lr=0.01, betas=(0.0, 0.95)))  # the moment is the gradient
        norms.append(step(model, optimizer, planned(GROUPS, ALONE), clip=clip).grad_norm)
        moments.append({name: optimizer.state[p]["exp_avg"] for name, p in model.named_parameters()})
    norm = sum(m.square().sum() for m in moments[0].values()).sqrt().item()
    assert norms == pytest.approx([norm] * 3)
    assert_same(moments[1], moments[0])
    for name, m in moments[0].items():
        torch.testing.assert_close(moments[2][name] * norm / 1e-3, m, rtol=1e-5, atol=1e-9)


def test_sums_add_over_packs_and_maxima_stay_maxima():
    def run(capacity):
        model = random_model(dtype=torch.float64)
        return step(model, optim.adamw(model, optim.OptimConfig(lr=0.01)), planned(GROUPS, ALONE, capacity))

    one, many = run(1000), run(24)
    assert len(planned(GROUPS, ALONE, 1000)) == 1 < len(planned(GROUPS, ALONE, 24))
    assert many.sums == pytest.approx(one.sums)
    assert one.sums["gap_max"] > one.sums["gap"] / one.sums["tokens"]
    drawn = [s.drawn.sum() for g in GROUPS for s in g.samples]
    assert one.sums["tokens"] == sum(drawn)


@dataclass(frozen=True)
class Unread(Ranks):
    """A rank whose device stands for a GPU that nothing may be read from, but for the sums of a step."""

    reads: list = field(default_factory=list)

    def sum(self, values):
        assert all(x.device == self.device for x in values.values())
        self.reads.append(sorted(values))
        return dict.fromkeys(values, 1.0)


class Copies(TorchDispatchMode):
    """Writes down the ops that bring data from the host to the meta device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        here = any(isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in args)
        if here and isinstance(out, torch.Tensor) and out.device.type == "meta":
            self.seen.append(func)
        return out


LOSSES = {
    "text": lambda model: partial(text_loss, model),
    **{
        name: lambda model, cfg=cfg, first=first: partial(
            policy_loss, model, cfg=cfg, temperature=0.7, first_update=first, reference=model if cfg.kl else None
        )
        for name, cfg, first in (
            ("first update", LOSS, True),
            ("later update", LOSS, False),
            ("kl and entropy", replace(LOSS, kl=0.1, entropy=0.1), True),
            ("next token", replace(LOSS, next_token=0.5), True),
            ("of sequences", replace(LOSS, is_level="sequence", next_token=0.5), True),
        )
    },
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_reads_the_device_once_and_copies_to_it_once_a_pack(loss, checkpointing, monkeypatch):
    """On the meta device .item(), nonzero, x[mask] and the like raise: there is nothing to read."""
    monkeypatch.setattr(launch, "attention_path", lambda q: "torch-varlen")
    # torch has none for meta; that ours waits for nothing is shown in test_attention.py
    monkeypatch.setattr(torch, "segment_reduce", lambda x, *_, lengths, **__: x.new_empty(len(lengths), *x.shape[1:]))
    with torch.device("meta"):
        model = Transformer(replace(TINY, head_dim=16), checkpointing=checkpointing).bfloat16()
    model.rope(torch.zeros(1, device="meta"))  # copies its frequencies once
    batches = planned(GROUPS, ALONE, capacity=24)
    text = Unit(name="text", prefix=np.array([3]), replies=[Reply.text(np.arange(11), 0.5)])
    batches = [*batches, [text], [*batches[0], text], []]
    ranks = Unread(0, 1, torch.device("meta"), None)
    with Copies() as copies:
        stats = train_step(
            model, torch.optim.SGD(model.parameters()), batches, LOSSES[loss](model), ranks, lr=0.1, clip=1.0
        )
    assert not stats.broken
    assert copies.seen == [torch.ops.aten._to_copy.default] * len(batches)
    (read,) = ranks.reads
    assert {"loss", "grad_norm_max"} <= set(read)
    assert stats.grad_norm == 1.0
    assert "grad_norm_max" not in stats.sums


def test_a_pack_is_built_between_the_forward_and_the_backward_of_the_one_before(monkeypatch):
    told = []

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, name):
            ctx.name = name
            told.append(f"forward {name}")
            return x.sum()

        @staticmethod
        def backward(ctx, dloss):
            told.append(f"backward {ctx.name}")
            return None, None

    def build(units, device):
        told.append(f"build {units[0].name}")
        return make_pack(units, device)

    monkeypatch.setattr("thinkmid.train.step.make_pack", build)
    model = random_model()
    optimizer = optim.adamw(model, optim.OptimConfig(lr=0.01))
    text = Unit(name="a", prefix=np.array([3]), replies=[Reply.text(np.arange(3), 0.5)])
    batches = [[replace(text, name=name)] for name in "abc"]

    def loss_fn(pack):
        return Loss.apply(model.norm.weight, *pack.owner), {}

    train_step(model, optimizer, batches, loss_fn, ALONE, lr=0.01, clip=1.0)
    assert told == [
        "build a", "forward a", "build b", "backward a", "forward b", "build c", "backward b", "forward c",
        "backward c",
    ]  # fmt: skip


@pytest.mark.parametrize("deterministic", [True, False])
def test_what_attention_is_asked_for_is_what_the_config_says(deterministic, monkeypatch):
    asked = []

    def library(q, k, v, lengths, deterministic):
        asked.append(deterministic)
        return q * 1

    monkeypatch.setattr(launch, "attention_path", lambda q: "torch-varlen")
    monkeypatch.setitem(attention.LIBRARIES, "torch-varlen", library)
    monkeypatch.setattr(fsdp, "shard", lambda model, ranks, compute_dtype: model)
    source, section = SimpleNamespace(model_cfg=TINY), ModelSection(deterministic=deterministic)
    model = job.sharded_model(source, section, ALONE, filled=False)
    logprobs(model, make_pack(planned(GROUPS, ALONE)[0]))
    assert asked == [deterministic] * TINY.layers


def embedding_worker(rank, folder):
    """Gradients with the embedding gathered for the backward, as FSDP2 does it unasked, and without."""
    ranks = join_ranks(rank, 2, folder)
    batches = planned(GROUPS, ranks, capacity=24)
    grads, gathers = [], []
    for again in (True, False):
        model = fsdp.shard(random_model(), ranks, compute_dtype=torch.bfloat16)
        if again:
            model.embed_tokens.set_unshard_in_backward(True)
        with torch.profiler.profile() as profile:
            for units in batches:
                loss, _ = policy_loss(model, make_pack(units), LOSS, temperature=1.0, first_update=True)
                loss.backward()
        gathers.append(sum("all_gather_copy_out" in e.name and "embed_tokens" in e.name for e in profile.events()))
        grads.append([p.grad.full_tensor() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert grads[0][0].abs().max() > 0
    assert len(batches) > 1
    assert gathers == [2 * len(batches), len(batches)]


def test_the_embedding_is_gathered_for_the_forward_alone_and_no_gradient_changes(tmp_path):
    spawn(embedding_worker, 2, str(tmp_path))


def sum_worker(rank, folder):
    ranks = join_ranks(rank, 2, folder)
    for tied in (False, True):
        norms = []
        for who in (ranks, ALONE):
            model = random_model(replace(TINY, tied=tied))
            if who is ranks:
                fsdp.shard(model, ranks, compute_dtype=torch.float32)
            optimizer = optim.adamw(model, optim.OptimConfig(lr=0.01))
            norms.append(step(model, optimizer, planned(GROUPS, who, capacity=30), who).grad_norm)
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_gradients_of_ranks_are_summed_in_fp32(tmp_path):
    """The laws run in fp64, for which FSDP2 chooses other operations."""
    spawn(sum_worker, 2, str(tmp_path))


def stale_worker(rank, world, folder, tied):
    ranks = join_ranks(rank, world, folder)
    model = fsdp.shard(random_model(replace(TINY, tied=tied)), ranks, compute_dtype=torch.float32)
    optimizer = optim.adamw(model, optim.OptimConfig(lr=0.1))
    step(model, optimizer, planned(GROUPS, ranks), ranks, lr=0.1)
    pack = make_pack(planned(GROUPS, ALONE)[0])
    with torch.no_grad():
        before = logprobs(model, pack)  # leaves the head whole
        step(model, optimizer, [], ranks, lr=0.1)  # all groups dead: no backward, momentum moves the weights
        after = logprobs(model, pack)
        weights.reshard(model)
        exact = logprobs(model, pack)
    assert torch.equal(after, exact)
    assert (after - before).abs().mean() > 0.01


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_an_update_without_a_backward_reaches_the_next_forward(world, tied, tmp_path):
    spawn(stale_worker, world, world, str(tmp_path), tied)


TEXT, INT32 = st.text(max_size=8), st.integers(0, 2**31 - 1)
SAMPLE = st.tuples(
    st.lists(st.tuples(INT32, st.floats(width=32), st.booleans(), INT32), max_size=6),
    st.sampled_from(["eos", "suffix", "unclosed"]), st.integers(0, 99),
)  # fmt: skip
REWARD = st.one_of(st.just(math.nan), st.floats(allow_nan=False, allow_infinity=False))


def as_sample(rows, finish, num_think):
    streams = {name: np.array([row[i] for row in rows], dtype) for i, (name, dtype) in enumerate(STREAMS.items())}
    return Sample(**streams, finish=finish, num_think=num_think)


@st.composite
def groups_of_a_rank(draw):
    groups = []
    for _ in range(draw(st.integers(0, 4))):
        samples = draw(st.lists(SAMPLE, min_size=1, max_size=4))
        prompt = Prompt(
            id=draw(TEXT), tokens=draw(st.lists(st.integers(0, 2**31), min_size=1, max_size=5)),
            meta=draw(st.dictionaries(TEXT, TEXT, max_size=2)),
        )  # fmt: skip
        rewards = draw(st.lists(REWARD, min_size=len(samples), max_size=len(samples)))
        groups.append(
            Group(
                prompt=prompt,
                samples=[as_sample(*drawn) for drawn in samples],
                rewards=rewards,
                whys=draw(st.lists(TEXT, min_size=len(samples), max_size=len(samples))),
            )
        )
    return groups


def exactly(group):
    """Everything in a group, floats by their bits."""
    arrays = [(s.tokens.tobytes(), s.logp.tobytes(), s.drawn.tobytes(), s.versions.tobytes()) for s in group.samples]
    samples = [(*a, s.finish, s.num_think) for a, s in zip(arrays, group.samples, strict=True)]
    rewards = ["nan" if r != r else float(r).hex() for r in group.rewards]
    p = group.prompt
    return (p.id, list(p.tokens), p.meta, samples, rewards, group.whys)


@settings(max_examples=100, deadline=None)
@given(groups=groups_of_a_rank())
def test_groups_survive_the_exchange_bit_by_bit(groups):
    indices = [7 * i + 2 for i in range(len(groups))]
    back = rollouts.unpack(rollouts.pack(groups, indices))
    assert [i for i, _ in back] == indices
    assert [exactly(g) for _, g in back] == [exactly(g) for g in groups]
    dtypes = {(s.tokens.dtype.name, s.logp.dtype.name, s.drawn.dtype.name) for _, g in back for s in g.samples}
    assert dtypes <= {("int32", "float32", "bool")}
