from itertools import product

import pytest
import torch
from conftest import assert_same

from thinkmid.kernels.policy import dr_grpo_loss

R = 41


def reference(logp, adv, weight, old, sampler, cap, ref, beta, low, high):
    """One token at a time with plain numbers in the branches; old None: the ratio is 1 with the gradient of logp."""
    loss, sums = 0.0, dict.fromkeys(("ratio", "clipped", "capped", "importance", "kl"), 0.0)
    for t in range(len(logp)):
        before = logp[t].detach() if old is None else old[t]
        ratio = torch.exp(logp[t] - before)
        bound = min(max(ratio.item(), 1 - low), 1 + high)
        clipped = bound * adv[t].item() < ratio.item() * adv[t].item()
        term = -bound * adv[t] if clipped else -ratio * adv[t]
        importance = 1.0 if sampler is None else torch.exp(before - sampler[t]).item()
        capped = cap is not None and importance >= cap
        importance = cap if capped else importance
        term = term * importance
        if beta:
            kl = torch.exp(ref[t] - logp[t]) - (ref[t] - logp[t]) - 1
            term = term + beta * kl
            sums["kl"] += kl.item()
        loss = loss + weight[t] * term
        for name, value in zip(sums, (ratio.item(), clipped, capped, importance), strict=False):
            sums[name] += value
    return loss, sums


def streams():
    """Half of the tokens lie near the old log-prob, half far outside the clip range."""
    far = torch.where(torch.arange(R) % 2 == 0, 0.05, 1.0)
    logp = -torch.rand(R, dtype=torch.float64) * 5
    old, sampler, ref = (logp + torch.randn(R, dtype=torch.float64) * far for _ in range(3))
    adv = torch.randn(R, dtype=torch.float64)
    adv[::7] = 0
    old[3], sampler[4] = logp[3], old[4]  # ties: ratio 1, importance 1
    return logp.requires_grad_(), adv, torch.rand(R, dtype=torch.float64), old, sampler, ref


OPTIONS = list(product([False, True], [None, 1.0, 1.7], [0.0, 0.3], [(0.2, 0.2), (0.1, 0.5), (1.0, 0.0)]))


@pytest.mark.parametrize("given_sampler", [False, True], ids=["no sampler", "sampler"])
def test_loss_gradient_and_sums_are_those_of_a_loop_over_tokens(given_sampler):
    for given_old, cap, beta, (low, high) in OPTIONS:
        logp, adv, weight, old, sampler, ref = streams()
        old, sampler = old if given_old else None, sampler if given_sampler else None
        loss, sums = dr_grpo_loss(
            logp, adv, weight, old_logp=old, sampler_logp=sampler, is_cap=cap, ref_logp=ref, beta=beta,
            clip_low=low, clip_high=high,
        )  # fmt: skip
        exact, exact_sums = reference(logp, adv, weight, old, sampler, cap, ref, beta, low, high)
        assert_same(
            {"loss": loss, "dlogp": torch.autograd.grad(loss, logp)[0]},
            {"loss": exact, "dlogp": torch.autograd.grad(exact, logp)[0]},
        )
        assert {name: sums[name].item() for name in exact_sums} == pytest.approx(exact_sums)


def test_gap_is_the_distance_of_old_and_sampler():
    logp, adv, weight, old, sampler, _ = streams()
    _, sums = dr_grpo_loss(logp, adv, weight, old_logp=old, sampler_logp=sampler)
    distances = [abs(a - b) for a, b in zip(old.tolist(), sampler.tolist(), strict=True)]
    assert sums["gap"].item() == pytest.approx(sum(distances))
    assert sums["gap_max"].item() == max(distances)
    assert not any(x.requires_grad for x in sums.values())


@pytest.mark.parametrize("adv", [1.0, -1.0])
@pytest.mark.parametrize("old", [None, -1.5])
def test_inside_the_clip_range_the_whole_gradient_passes_at_a_ratio_of_one(adv, old):
    """torch.minimum of two equal branches would pass half of it."""
    logp = torch.tensor([-1.5], requires_grad=True)
    old = None if old is None else torch.tensor([old])
    loss, sums = dr_grpo_loss(logp, torch.tensor([adv]), torch.tensor([1.0]), old_logp=old, clip_low=0.0, clip_high=0.0)
    loss.backward()
    assert logp.grad.item() == -adv
    assert sums["clipped"] == 0


@pytest.mark.parametrize(
    ("ratio", "adv", "passes"), [(1.5, 1.0, False), (1.5, -1.0, True), (0.5, 1.0, True), (0.5, -1.0, False)]
)
def test_clipping_stops_only_what_would_go_further(ratio, adv, passes):
    logp = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    old = logp.detach() - torch.tensor(ratio, dtype=torch.float64).log()
    loss, sums = dr_grpo_loss(logp, torch.tensor([adv]), torch.tensor([1.0]), old_logp=old)
    loss.backward()
    assert logp.grad.item() == pytest.approx(-ratio * adv if passes else 0.0)
    assert loss.item() == pytest.approx(-adv * (ratio if passes else 1 + 0.2 * (1 if ratio > 1 else -1)))
    assert bool(sums["clipped"]) != passes


def test_no_tokens_give_a_loss_of_zero():
    none = torch.zeros(0, requires_grad=True)
    loss, sums = dr_grpo_loss(none, none, none, old_logp=none, sampler_logp=none, is_cap=2.0, ref_logp=none, beta=0.1)
    loss.backward()
    assert loss == 0
    assert {x.item() for x in sums.values()} == {0.0}
