"""TRL, Liger and a plain fp64 loop agree with ours where the definitions coincide.

They coincide in: log-prob of the target, temperature, softcap, entropy and its gradient (TRL); the clipped objective
with the Dr. GRPO denominator, two-sided clipping with delta above 1 + clip_high, k3, a cut importance weight (Liger).
They do not, and are not compared, in:
- advantage 0 where the ratio overflows: 0 here, NaN in Liger and TRL (0 * inf);
- TRL's entropy bonus: a mean over tokens there, over the constant denominator here;
- delta (TRL, Liger) cuts the ratio for either sign of advantage, dual_clip for negative ones: they part below
  1 + clip_high;
- Liger takes the importance weight ready-made, ours cuts exp(old - sampler) at is_cap; TRL's default masks whole
  sequences instead (its `token_truncate` is ours);
- the KL correction by the ratio (`use_bias_correction_kl`), which we do not have.
"""

import math

import pytest
import torch
from conftest import assert_no_worse

from benchmarks.rivals import Case, liger_grpo_loss, trl_logprob
from thinkmid.kernels import dr_grpo_loss, fused_linear_dr_grpo, linear_logprob

N, D, V = 211, 16, 131
DENOM = 40.0


def make_case(dtype=torch.float32):
    hidden, weight = torch.randn(N, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64)
    targets = torch.randint(V, (N,))
    hidden, weight = hidden.to(dtype).double(), weight.to(dtype).double()
    away = torch.where(torch.arange(N) % 3 == 0, 0.05, 1.2) * torch.randn(N, dtype=torch.float64).sign()
    logp = (hidden @ weight.T).log_softmax(-1)[torch.arange(N), targets]
    case = Case(
        hidden=hidden, weight=weight, targets=targets, advantages=torch.randn(N, dtype=torch.float64),
        old_logp=logp + away, denom=DENOM,
    )  # fmt: skip
    return case.to(dtype), case.to(torch.float64)


def gradients(loss, case):
    return [loss.detach(), *torch.autograd.grad(loss, (case.hidden, case.weight))]


def plain_dr_grpo(case, *, sampler=None, cap=math.inf, ref=None, beta=0.0, low=0.2, high=0.2, dual=math.inf):
    """Row by row, branch by branch, in fp64; gradient by autograd through the branch that was taken."""
    total = 0.0
    for n in range(len(case.targets)):
        z = case.weight @ case.hidden[n]
        logp = z[case.targets[n]] - z.logsumexp(0)
        adv, old = case.advantages[n].item(), case.old_logp[n].item()
        ratio = (logp - old).exp()
        objective = ratio * adv
        if adv > 0 and ratio > 1 + high:
            objective = torch.tensor((1 + high) * adv)
        if adv < 0 and ratio < 1 - low:
            objective = torch.tensor((1 - low) * adv)
        if adv < 0 and ratio > dual:
            objective = torch.tensor(dual * adv)
        weight = 1.0 if sampler is None else min(math.exp(old - sampler[n].item()), cap)
        kl = 0.0 if ref is None else (ref[n] - logp).exp() - (ref[n] - logp) - 1
        total = total + beta * kl - weight * objective
    return total / case.denom


def compare(ours, exact, peer, naive=None):
    """Ours against the worse of peer and naive, where there is one; the peer against fp64."""
    for n, (mine, want, other) in enumerate(zip(ours, exact, peer, strict=True)):
        # agreeing with a peer says something while its own error is rounding
        assert (other.double() - want).norm() <= 1e-4 * want.norm()
        if want.ndim:
            honest = [other] if naive is None else [other, naive[n]]
            assert_no_worse(mine, want, max(honest, key=lambda x: (x.double() - want).abs().max()))
        else:  # the rounding of a single number is luck
            torch.testing.assert_close(mine.double(), want, rtol=1e-6, atol=1e-6)


OPTIONS = {
    "first update": {"old": None},
    "clipping": {},
    "uneven clipping": {"low": 0.1, "high": 0.5},
    "two-sided clipping": {"dual": 1.6},
    "importance weight": {"cap": 1.3},
    "kl": {"beta": 0.3},
    "all": {"low": 0.1, "high": 0.3, "dual": 2.5, "cap": 1.1, "beta": 0.1},
}


@pytest.mark.parametrize("fused", [True, False], ids=["one pass", "log-prob then loss"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_liger_and_a_plain_loop_give_our_loss_and_gradients(options, fused):
    pytest.importorskip("liger_kernel")
    options = dict(options)
    case, exact = make_case()
    first = "old" in options and options.pop("old") is None
    if first:  # ratio 1: ours and Liger's own default against the true log-prob in the loop
        logp = (exact.hidden @ exact.weight.T).log_softmax(-1)[torch.arange(N), exact.targets].detach()
        exact = Case(**(vars(exact) | {"old_logp": logp}))
        case = Case(**(vars(case) | {"old_logp": logp.float()}))
    sampler, ref = (case.old_logp + 0.4 * torch.randn(N) for _ in range(2))
    low, high = options.get("low", 0.2), options.get("high", 0.2)
    ours = {"clip_low": low, "clip_high": high, "dual_clip": options.get("dual"), "beta": options.get("beta", 0.0)}
    ours |= {"old_logp": None if first else case.old_logp, "denom": DENOM}
    theirs = {"epsilon_low": low, "epsilon_high": high, "delta": options.get("dual"), "beta": options.get("beta", 0.0)}
    if "cap" in options:
        ours |= {"sampler_logp": sampler, "is_cap": options["cap"]}
        theirs["vllm_is_ratio"] = (case.old_logp - sampler).exp().clamp(max=options["cap"])
    if "beta" in options:
        ours["ref_logp"] = ref
        theirs["ref_per_token_logps"] = ref
    loop = plain_dr_grpo(exact, sampler=sampler if "cap" in options else None,
                         ref=ref if "beta" in options else None, **options)  # fmt: skip
    if fused:
        mine = fused_linear_dr_grpo(case.hidden, case.weight, case.targets, case.advantages, **ours)
        loss, metrics = mine.loss, mine.metrics
    else:
        loss, metrics = dr_grpo_loss(linear_logprob(case.hidden, case.weight, case.targets), case.advantages, **ours)
    peer, logged = liger_grpo_loss(case, **theirs)
    compare(gradients(loss, case), gradients(loop, exact), gradients(peer, case))
    clipped = (metrics.clipped_low + metrics.clipped_high) / metrics.rows
    assert clipped.item() == pytest.approx(logged[-1].item())
    if "beta" in options:
        assert (metrics.kl / metrics.rows).item() == pytest.approx(logged[0].item(), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("used", ["logp", "entropy", "both"])
def test_trl_gives_our_log_probs_entropies_and_gradients(temperature, softcap, used):
    pytest.importorskip("trl.kernels")
    case, exact = make_case()
    dlogp, dentropy = torch.randn(2, N, dtype=torch.float64)
    dlogp, dentropy = dlogp * (used != "entropy"), dentropy * (used != "logp")

    def results(case, logp, entropy):
        total = (logp * dlogp.to(logp.dtype)).sum() + (entropy * dentropy.to(logp.dtype)).sum()
        return [logp.detach(), entropy.detach(), *torch.autograd.grad(total, (case.hidden, case.weight))]

    def plain(case):
        z = case.hidden @ case.weight.T
        logps = ((softcap * (z / softcap).tanh() if softcap else z) / temperature).log_softmax(-1)
        return results(case, logps[torch.arange(N), case.targets], -(logps.exp() * logps).sum(-1))

    logp, entropy, *_ = trl_logprob(case, temperature=temperature, softcap=softcap, outputs=("entropy",))
    mine = linear_logprob(
        case.hidden, case.weight, case.targets, temperature=temperature, softcap=softcap, return_entropy=True
    )
    compare(results(case, *mine), plain(exact), results(case, logp, entropy), plain(case))


def test_liger_scores_what_we_score():
    pytest.importorskip("liger_kernel")
    from benchmarks.rivals import liger_scaled_logprob

    case, exact = make_case(torch.bfloat16)
    want = (exact.hidden @ exact.weight.T).log_softmax(-1)[torch.arange(N), exact.targets]
    peer = liger_scaled_logprob(case)
    dlogp = torch.randn(N)
    ours = linear_logprob(case.hidden, case.weight, case.targets)
    sums = [(x * dlogp.to(x.dtype)).sum() for x in (ours, want, peer)]
    results = [torch.autograd.grad(s, (c.hidden, c.weight)) for s, c in zip(sums, (case, exact, case), strict=True)]
    assert_no_worse(ours, want, peer)
    for mine, true, other in zip(*results, strict=True):
        assert_no_worse(mine, true, other)
