"""The laws of training: one denominator, shared prefixes, dead groups, sampled tokens, versions, fp32.

The truth of most tests is the formula of the paper, one sample at a time, through plain forwards in fp64.
"""

from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import TINY, assert_no_worse, assert_same, join_ranks, random_groups, random_model, spawn
from safetensors.torch import load_file, save_file

from thinkmid import config
from thinkmid.data.pack import duplicated, make_pack, plan
from thinkmid.kernels import head
from thinkmid.kernels.head import linear_logprob
from thinkmid.kernels.policy import dr_grpo_loss
from thinkmid.model import weights
from thinkmid.model.transformer import Yarn
from thinkmid.rollout.engine import weight_sync
from thinkmid.run.ranks import Ranks
from thinkmid.train import advantage, fsdp, optim, rlmt, rollouts
from thinkmid.train.config import LossConfig
from thinkmid.train.loss import logprobs, policy_loss
from thinkmid.train.rollouts import refuse_stale
from thinkmid.train.step import train_step

NAN = float("nan")
DENOM, CAP = 3.0, 1.5  # a cap that some samples reach
# two dead groups, verdicts that failed, one of them alone in its group
REWARDS_P_G = [
    [1, 0, 0, 1], [0, 0, 0, 0], [1, NAN, 0, 0], [0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, NAN], [NAN, NAN, 1, NAN],
]  # fmt: skip
GROUPS = random_groups(REWARDS_P_G)
LOSS = LossConfig(denom=DENOM, is_cap=CAP)
ESTIMATORS = ("dr_grpo", "grpo", "rloo", "token-mean")


def truth(model, groups, estimator, *, first_update=True, level="token"):
    """Loss and gradients from prefix + tokens of one sample at a time; weights and advantages written out again."""
    model.zero_grad()
    num_samples = sum(len(g.samples) for g in groups)
    num_drawn = sum(s.drawn.sum() for g in groups for s in g.samples)
    loss = torch.zeros((), dtype=torch.float64)
    for group in groups:
        known = [r for r in group.rewards if r == r]
        for sample, reward in zip(group.samples, group.rewards, strict=True):
            if reward != reward or max(known) == min(known):
                continue
            adv = reward - np.mean(known)
            adv /= {"grpo": np.std(known) + 1e-6, "rloo": 1 - 1 / len(known)}.get(estimator, 1)
            divisor = {"grpo": num_samples * max(1, sample.drawn.sum()), "token-mean": num_drawn}
            tokens = torch.tensor([*group.prompt.tokens, *sample.tokens])
            logp = model.logits(tokens[:-1])[-len(sample.tokens) :].log_softmax(-1)
            gaps = [logp[t, token].item() - sample.logp[t].item() for t, token in enumerate(sample.tokens)]
            whole = np.exp(sum(gap for gap, drawn in zip(gaps, sample.drawn, strict=True) if drawn))
            for t, token in enumerate(sample.tokens):
                if not sample.drawn[t]:
                    continue
                ratio = (logp[t, token] - sample.logp[t].item()).exp()
                if level == "sequence":
                    ratio = torch.tensor(whole)
                if first_update:  # the gradient of logp itself, scaled
                    term = ratio.detach().clamp(max=CAP) * (logp[t, token] - logp[t, token].detach() + 1) * adv
                else:
                    term = min(ratio * adv, ratio.clamp(0.8, 1.2) * adv)
                loss = loss - term / divisor.get(estimator, num_samples * DENOM)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


def as_units(groups, estimator="dr_grpo", keep_dead=False):
    return advantage.units(groups, LossConfig(denom=DENOM, estimator=estimator, kl=0.1 * keep_dead), 4)


def gradients(model, units, capacity, *, first_update=True, cfg=LOSS):
    """Loss and gradients as a step forms them: units -> packs -> loss -> backward, summed."""
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for batch in plan(units, capacity=capacity, ranks=1, pair_cost=0.01)[0]:
        loss, _ = policy_loss(model, make_pack(batch), cfg, temperature=1.0, first_update=first_update)
        loss.backward()
        total += loss.detach()
    return {"loss": total} | {name: p.grad.clone() for name, p in model.named_parameters()}


def smallest_capacity(units):
    return max(part.length for unit in units for part in duplicated(unit))


def close(ours, exact):
    """As assert_same, where advantages and weights went through the fp32 streams of a pack."""
    for name, want in exact.items():
        error = (ours[name] - want).abs().max()
        assert error <= 1e-6 * want.abs().max(), f"{name}: {error} of {want.abs().max()}"


# Law 1: one denominator.


@pytest.mark.parametrize("first_update", [True, False], ids=["first update", "later update"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_packed_step_is_the_formula_sample_by_sample(estimator, first_update):
    model = random_model(dtype=torch.float64)
    ours = gradients(model, as_units(GROUPS, estimator), 10_000, first_update=first_update)
    exact = truth(model, GROUPS, estimator, first_update=first_update)
    assert all(g.abs().max() > 1e-4 for g in exact.values())
    close(ours, exact)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_packing_order_and_dead_groups_change_no_gradient(estimator):
    model = random_model(dtype=torch.float64)
    units = as_units(GROUPS, estimator)
    exact = gradients(model, units, 10_000)
    least = smallest_capacity(units)
    assert any(unit.length > least for unit in units), "no group is split among its replies"
    for capacity in (least, least + 1, 29):
        assert_same(gradients(model, units, capacity), exact)
    assert_same(gradients(model, as_units(GROUPS[::-1], estimator), 29), exact)
    kept = as_units(GROUPS, estimator, keep_dead=True)
    assert len(kept) == len(GROUPS) > len(units)
    assert_same(gradients(model, kept, 29), exact)


def two_steps(ranks, model, groups, capacity, clip):
    """Weights and statistics after an update on all groups and a second on some of them, one rank's share at a time."""
    optimizer = optim.adamw(model, optim.OptimConfig(lr=1.0, weight_decay=0.1))
    stats = []
    for some in (groups, groups[:1]):  # one group: fewer units than ranks
        batches = plan(as_units(some), capacity=capacity, ranks=ranks.world, pair_cost=0.01)[ranks.rank]
        loss_fn = partial(policy_loss, model, cfg=LOSS, temperature=1.0, first_update=True)
        stats.append(train_step(model, optimizer, batches, loss_fn, ranks, lr=0.01, clip=clip))
    named = {f"sum {i} {k}": v for i, s in enumerate(stats) for k, v in (s.sums | {"norm": s.grad_norm}).items()}
    out = {name: torch.tensor(value, dtype=torch.float64) for name, value in named.items()}
    return out | {name: tensor.clone() for name, tensor in weights.stream(model)}


# rows of a pack, norm to clip at, tied head
SPLITS = [(24, 0.0, False), (200, 0.05, True)]


def ranks_worker(rank, world, folder):
    ranks = join_ranks(rank, world, folder)
    mine = list(range(rank, len(GROUPS), world))  # 7 groups: 4 and 3, or 2, 2, 2 and 1
    groups = rollouts.all_groups([GROUPS[i] for i in mine], mine, ranks)
    for capacity, clip, tied in SPLITS:
        model = random_model(replace(TINY, tied=tied), dtype=torch.float64)
        fsdp.shard(model, ranks, compute_dtype=torch.float64)
        result = two_steps(ranks, model, groups, capacity, clip)
        save_file(result, f"{folder}/{capacity}-{rank}")


@pytest.mark.parametrize("world", [2, 4])
def test_the_number_of_ranks_changes_no_weight(world, tmp_path):
    spawn(ranks_worker, world, world, str(tmp_path))
    assert TINY.ffn % 2 == TINY.vocab % 2 == 1  # rows of matrices do not divide by the ranks
    alone = Ranks(0, 1, torch.device("cpu"), None)  # and no FSDP
    for capacity, clip, tied in SPLITS:
        exact = two_steps(alone, random_model(replace(TINY, tied=tied), dtype=torch.float64), GROUPS, capacity, clip)
        for rank in range(world):
            ours = load_file(tmp_path / f"{capacity}-{rank}")
            assert ours.keys() == exact.keys()
            for key, want in exact.items():
                # Adam divides by gradients that may be small: what is left of 1e-16 is larger than in a gradient
                torch.testing.assert_close(ours[key], want, rtol=1e-8, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")


def test_without_a_denominator_nothing_starts(tmp_path, capsys):
    toml = tmp_path / "run.toml"
    toml.write_text('run = {folder = "x", steps = 1}\nmodel.folder = "m"\ndata.paths = ["d"]\noptim.lr = 1e-3\n')
    with pytest.raises(SystemExit) as end:
        config.run(rlmt.main, [str(toml)])
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "loss" in lines[0]
    with pytest.raises(SystemExit) as end:
        config.run(rlmt.main, [str(toml), "--loss.clip-low", "0.1"])
    assert end.value.code == 2
    assert "loss.denom" in capsys.readouterr().err


# Law 2: a prefix is shared, never approximated.


# windows that end inside a prefix, inside a reply, and before a token's own
WINDOWED = [
    {"kind": "mistral", "window": 1, "windowed_layers": (0, 1)},
    {"kind": "mistral", "window": 4, "windowed_layers": (0, 1)},
    {"kind": "smollm3", "window": 3, "windowed_layers": (1,), "no_rope_layers": (1,)},
    {"kind": "olmo3", "window": 5, "windowed_layers": (0,), "rope_scaling": Yarn(
        factor=4.0, attention_factor=1.2, original_max_positions=16
    )},
]  # fmt: skip


@pytest.mark.parametrize("family", [{"kind": kind} for kind in ("llama", "qwen2", "qwen3", "olmo2")] + WINDOWED)
@pytest.mark.parametrize("capacity", [29, 10_000])
def test_a_shared_prefix_gives_the_loss_and_gradients_of_its_copies(family, capacity):
    model = random_model(replace(TINY, **family), dtype=torch.float64)
    units = as_units(GROUPS)
    copies = [part for unit in units for part in duplicated(unit)]
    shared = gradients(model, units, capacity, first_update=False)
    assert sum(u.length for u in units) < sum(u.length for u in copies)
    assert_same(shared, gradients(model, copies, capacity, first_update=False))


# Law 3: dead groups.


def test_dead_groups_make_no_unit_but_count_in_the_denominator():
    model = random_model(dtype=torch.float64)
    live = random_groups([[1, 0, 0, 1], [0, 1, 0, 0]])
    dead = random_groups([[0, 0, 0, 0], [1, 1, 1, 1], [NAN, 1, NAN, NAN]], seed=1)
    assert as_units(dead) == []
    assert [u.name for u in as_units(live + dead)] == [u.name for u in as_units(live)]
    without, among = gradients(model, as_units(live), 100), gradients(model, as_units(live + dead), 100)
    close({name: x * 5 / 2 for name, x in among.items()}, without)


def test_an_update_of_dead_groups_runs_no_forward_and_moves_the_weights_by_momentum():
    model, lr, decay, (b1, b2) = random_model(dtype=torch.float64), 0.01, 0.1, (0.9, 0.95)
    optimizer = optim.adamw(model, optim.OptimConfig(lr=1.0, weight_decay=decay, betas=(b1, b2)))
    ranks = Ranks(0, 1, torch.device("cpu"), None)
    exact = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = gradients(model, as_units(GROUPS), 10_000)
    optimizer.zero_grad()
    live = plan(as_units(GROUPS), capacity=10_000, ranks=1, pair_cost=0)[0]
    train_step(
        model, optimizer, live, partial(policy_loss, model, cfg=LOSS, temperature=1.0, first_update=True), ranks,
        lr=lr, clip=0.0,
    )  # fmt: skip
    dead = plan(as_units([GROUPS[1], GROUPS[4]]), capacity=10_000, ranks=1, pair_cost=0)[0]
    stats = train_step(model, optimizer, dead, lambda pack: pytest.fail("a forward"), ranks, lr=lr, clip=1.0)
    assert (stats.grad_norm, stats.broken) == (0.0, [])
    for name, w in exact.items():
        m, v = torch.zeros_like(w), torch.zeros_like(w)
        for t, g in ((1, grads[name]), (2, torch.zeros_like(w))):
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            w = w * (1 - lr * decay * (w.ndim == 2)) - lr * m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + 1e-8)
        exact[name] = w
    assert_same({name: p.detach() for name, p in model.named_parameters()}, exact)


def test_kl_and_entropy_keep_dead_groups():
    assert not LossConfig(denom=1).keeps_dead
    assert LossConfig(denom=1, kl=0.1).keeps_dead
    assert LossConfig(denom=1, entropy=0.1).keeps_dead


# Law 4: only sampled tokens.


def predictions(pack):
    """Each row with loss, as (the tokens it sees, the token it predicts, advantage, weight, sampler's log-prob)."""
    kv_rows = torch.arange(len(pack.tokens)) if pack.kv_rows is None else pack.kv_rows
    out = []
    for row, *streams in zip(pack.rows, pack.targets, pack.adv, pack.pg_w, pack.logp_old, strict=True):
        s = int((pack.cu_q <= row).sum()) - 1
        after = pack.cu_q[s + 1] - 1 - row  # bottom-right aligned: so many last keys are hidden from this row
        seen = kv_rows[pack.cu_k[s] : pack.cu_k[s + 1] - after]
        assert seen[-1] == row
        assert torch.equal(pack.positions[seen], torch.arange(len(seen)))
        out.append((tuple(pack.tokens[seen].tolist()), *(x.item() for x in streams)))
    return Counter(out)


@pytest.mark.parametrize("share", [True, False], ids=["shared", "duplicated"])
@pytest.mark.parametrize("capacity", [24, 10_000])
def test_loss_falls_on_each_drawn_token_once_after_what_its_sampler_saw(share, capacity):
    expected = Counter()
    for g in GROUPS:
        for sample, a in zip(g.samples, advantage.advantages(g.rewards, "dr_grpo"), strict=True):
            for t in np.flatnonzero(sample.drawn if a == a and a else []):
                seen = (*g.prompt.tokens, *sample.tokens[:t].tolist())
                weight = np.float32(1 / (len(GROUPS) * 4 * DENOM))
                expected[(seen, int(sample.tokens[t]), np.float32(a), weight, sample.logp[t])] += 1
    units = as_units(GROUPS)
    assert any(not s.drawn[0] for g in GROUPS for s in g.samples)
    if not share:
        units = [part for unit in units for part in duplicated(unit)]
    packs = [make_pack(batch) for batch in plan(units, capacity=capacity, ranks=2, pair_cost=0.1)[0]]
    packs += [make_pack(batch) for batch in plan(units, capacity=capacity, ranks=2, pair_cost=0.1)[1]]
    assert sum((predictions(pack) for pack in packs), Counter()) == expected


def test_the_last_row_of_a_prefix_predicts_the_first_token_of_every_sibling():
    (group,) = random_groups([[1, 0, 0, 1]], seed=5)
    group = replace(group, samples=[replace(s, drawn=np.ones_like(s.drawn)) for s in group.samples])
    pack = make_pack(as_units([group]))
    at = pack.rows == len(group.prompt.tokens) - 1
    assert pack.targets[at].tolist() == [s.tokens[0] for s in group.samples]
    assert pack.rows.min() == len(group.prompt.tokens) - 1  # no row of the prefix before it


def test_tokens_that_were_forced_change_nothing_but_what_follows_sees():
    """The last token of a sample, forced: neither what it is nor its log-prob matters."""
    model = random_model(dtype=torch.float64)
    (group,) = random_groups([[1, 0, 0, 1]], seed=6)
    samples = [replace(s, drawn=np.arange(len(s.tokens)) < len(s.tokens) - 1) for s in group.samples]
    other = [
        replace(s, tokens=np.append(s.tokens[:-1], (s.tokens[-1] + 1) % TINY.vocab), logp=np.append(s.logp[:-1], -9.0))
        for s in samples
    ]
    before, after = (gradients(model, as_units([replace(group, samples=x)]), 100) for x in (samples, other))
    assert before["loss"] != 0
    assert_same(after, before)


# Law 5: detached importance weights.


def test_importance_weights_are_truncated_and_detached():
    logp = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    sampler = torch.tensor([-1.5, -1.0, -3.0], requires_grad=True)
    loss, metrics = dr_grpo_loss(logp, torch.tensor([1.0, -2.0, 0.5]), denom=10, sampler_logp=sampler, is_cap=2.0)
    loss.backward()
    # -0.1 * min(exp(0.5), 2) * 1;  -0.1 * exp(-1) * -2;  -0.1 * min(exp(2.5), 2) * 0.5
    torch.testing.assert_close(logp.grad, torch.tensor([-0.16487213, 0.07357589, -0.1]))
    torch.testing.assert_close(loss.item(), -0.16487213 + 0.07357589 - 0.1)
    assert sampler.grad is None
    assert metrics.capped == 1


@pytest.mark.parametrize("capacity", [29, 10_000])
def test_a_sequence_has_one_truncated_detached_weight(capacity):
    model, cfg = random_model(dtype=torch.float64), replace(LOSS, is_level="sequence", is_cap=CAP)
    ours = gradients(model, as_units(GROUPS), capacity, cfg=cfg)
    close(ours, truth(model, GROUPS, "dr_grpo", level="sequence"))
    by_token = gradients(model, as_units(GROUPS), capacity)
    assert (ours["norm.weight"] - by_token["norm.weight"]).abs().max() > 1e-3 * by_token["norm.weight"].abs().max()


def test_the_first_update_has_a_ratio_of_exactly_one_and_clips_nothing():
    pack = make_pack(as_units(GROUPS))
    assert (pack.logp_old.std() > 0.5).item()
    _, sums = policy_loss(random_model(), pack, LOSS, temperature=1.0, first_update=True)
    assert sums["ratio"] == sums["tokens"] == len(pack.rows)
    assert sums["clipped"] == 0
    _, sums = policy_loss(random_model(), pack, LOSS, temperature=1.0, first_update=False)
    assert sums["clipped"] > 0


def test_without_a_cap_there_is_no_importance_weight():
    model, pack = random_model(dtype=torch.float64), make_pack(as_units(GROUPS))
    agreed = replace(pack, logp_old=logprobs(model, pack).detach())  # every weight is 1
    grads = []
    for cfg, some in ((LossConfig(denom=DENOM, is_cap=0), pack), (LOSS, agreed), (LOSS, pack)):
        model.zero_grad()
        policy_loss(model, some, cfg, temperature=1.0, first_update=True)[0].backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert_same(grads[0], grads[1])
    assert not torch.equal(grads[0]["norm.weight"], grads[2]["norm.weight"])


# Law 7: versions, and proof of what the engine holds.


def test_a_sample_of_other_weights_is_refused_by_name():
    groups = random_groups([[1, 0], [0, 1]], version=3)
    refuse_stale(groups, 3)
    late = groups[1].samples[1]
    for wrong in (2, 4):
        versions = late.versions.copy()
        versions[-1] = wrong  # one token is enough
        groups[1].samples[1] = replace(late, versions=versions)
        with pytest.raises(RuntimeError, match=rf"prompt 1: .*version {wrong}, the trainer holds 3"):
            refuse_stale(groups, 3)


class Held:
    """An engine that holds what it is given, after `spoil` had a go at it."""

    def __init__(self, spoil):
        self.spoil, self.version, self.held = spoil, -1, {}

    def load_weights(self, named, version):
        self.held, self.version = {name: tensor.clone() for name, tensor in named}, version
        self.spoil(self.held)

    def named_weights(self):
        return iter(self.held.items())

    def part(self, name, whole):
        return whole


def changed(held):
    w = held["model.layers.1.mlp.up_proj.weight"]
    w[3, 4] = torch.nextafter(w[3, 4], torch.tensor(9.0, dtype=w.dtype)) if w.dtype == torch.float32 else w[3, 4] * 1.01


def swapped(held):
    a, b = "model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.v_proj.weight"
    held[a], held[b] = held[b], held[a]


def stale(held):
    held["model.layers.1.self_attn.o_proj.weight"][-1] -= 0.01


def rows_swapped(held):
    w = held["model.layers.1.mlp.down_proj.weight"]
    w[[0, 1]] = w[[1, 0]]


def absent(held):
    del held["model.layers.1.mlp.up_proj.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spoil", [changed, swapped, stale, rows_swapped, absent], ids=lambda f: f.__name__)
def test_sync_catches_an_engine_whose_weights_differ(spoil, dtype):
    good, bad = Held(lambda held: None), Held(spoil)
    sums = weight_sync.push(random_model(), good, 4, dtype)
    assert (good.version, weight_sync.difference(good, sums, {})) == (4, "")
    weight_sync.push(random_model(), bad, 4, dtype)
    assert "model.layers.1." in weight_sync.difference(bad, sums, {})


# Law 13: fp32 where it matters.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_probs_of_half_precision_inputs_are_fp32_sums(dtype, monkeypatch):
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 1)  # chunks of 16 rows: dW is a sum of many
    hidden, weight = torch.rand(1003, 40).to(dtype), torch.randn(257, 40).to(dtype)
    targets, dlogp = torch.zeros(1003, dtype=torch.long), torch.ones(1003)  # terms of one sign: a bf16 sum would stall

    def run(fn, dtype):
        h, w = (x.detach().to(dtype, copy=True).requires_grad_() for x in (hidden, weight))
        logp = fn(h, w)
        (logp * dlogp).sum().backward()
        return logp.detach(), h.grad, w.grad

    def naive(h, w):
        return (h @ w.T).to(torch.promote_types(h.dtype, torch.float32)).log_softmax(-1)[torch.arange(1003), targets]

    ours = run(lambda h, w: linear_logprob(h, w, targets), dtype)
    assert ours[0].dtype == torch.float32
    for a, exact, b in zip(ours, run(naive, torch.float64), run(naive, dtype), strict=True):
        assert_no_worse(a, exact, b)
