import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import TINY, assert_same, join_ranks, random_groups, random_model, spawn
from hypothesis import given, settings
from hypothesis import strategies as st

from thinkmid.data.pack import make_pack, plan
from thinkmid.model import weights
from thinkmid.train import advantage, exchange, optim, shard
from thinkmid.train.config import LossConfig
from thinkmid.train.loss import logprobs, policy_loss
from thinkmid.train.step import train_step
from thinkmid.types import Group, Prompt, Sample

ALONE = shard.Ranks(0, 1, torch.device("cpu"), None)
LOSS = LossConfig(denom=3.0)
GROUPS = random_groups([[1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 0, 1]], seed=4)


def planned(groups, ranks, capacity=200):
    units = advantage.units(groups, estimator="dr_grpo", num_siblings=4, denom=3.0, keep_dead=False)
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
    model = shard.shard(random_model(), ranks, compute_dtype=torch.float32)
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


def sum_worker(rank, folder):
    ranks = join_ranks(rank, 2, folder)
    for tied in (False, True):
        norms = []
        for who in (ranks, ALONE):
            model = random_model(replace(TINY, tied=tied))
            if who is ranks:
                shard.shard(model, ranks, compute_dtype=torch.float32)
            optimizer = optim.adamw(model, optim.OptimConfig(lr=0.01))
            norms.append(step(model, optimizer, planned(GROUPS, who, capacity=30), who).grad_norm)
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_gradients_of_ranks_are_summed_in_fp32(tmp_path):
    """The laws run in fp64, for which FSDP2 chooses other operations."""
    spawn(sum_worker, 2, str(tmp_path))


def stale_worker(rank, world, folder, tied):
    ranks = join_ranks(rank, world, folder)
    model = shard.shard(random_model(replace(TINY, tied=tied)), ranks, compute_dtype=torch.float32)
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


TEXT = st.text(max_size=8)
SAMPLE = st.tuples(
    st.lists(st.tuples(st.integers(0, 2**31 - 1), st.floats(width=32), st.booleans()), max_size=6),
    st.sampled_from(["eos", "suffix", "unclosed"]), st.integers(0, 99), st.integers(0, 2**40),
)  # fmt: skip
REWARD = st.one_of(st.just(math.nan), st.floats(allow_nan=False, allow_infinity=False))


def as_sample(rows, finish, num_think, version):
    tokens, logp, drawn = (
        np.array([row[i] for row in rows], dtype) for i, dtype in enumerate((np.int32, np.float32, bool))
    )
    return Sample(tokens=tokens, logp=logp, drawn=drawn, finish=finish, num_think=num_think, version=version)


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
    arrays = [(s.tokens.tobytes(), s.logp.tobytes(), s.drawn.tobytes()) for s in group.samples]
    samples = [(*a, s.finish, s.num_think, s.version) for a, s in zip(arrays, group.samples, strict=True)]
    rewards = ["nan" if r != r else float(r).hex() for r in group.rewards]
    p = group.prompt
    return (p.id, list(p.tokens), p.meta, samples, rewards, group.whys)


@settings(max_examples=100, deadline=None)
@given(groups=groups_of_a_rank())
def test_groups_survive_the_exchange_bit_by_bit(groups):
    indices = [7 * i + 2 for i in range(len(groups))]
    back = exchange.unpack(exchange.pack(groups, indices))
    assert [i for i, _ in back] == indices
    assert [exactly(g) for _, g in back] == [exactly(g) for g in groups]
    dtypes = {(s.tokens.dtype.name, s.logp.dtype.name, s.drawn.dtype.name) for _, g in back for s in g.samples}
    assert dtypes <= {("int32", "float32", "bool")}
