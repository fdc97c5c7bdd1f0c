"""The row kernel and the fused scoring kernel on a GPU, against autograd in fp64."""

import pytest
import torch
from conftest import assert_no_worse

from thinkmid.kernels.rows import row_grad, row_policy, row_stats
from thinkmid.kernels.streams import Policy, Scores

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

RAGGED = [(1, 2), (3, 1023), (5, 1025), (7, 4099), (2, 128256), (3, 151937)]
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap and bias": {"softcap": 20.0, "bias": True},
    "all": {"temperature": 1.4, "softcap": 15.0, "bias": True},
}


def make_inputs(num, vocab, *, temperature=None, bias=False, softcap=None):
    z = 3 * torch.randn(num, vocab, device="cuda")
    targets = torch.randint(vocab, (num,), device="cuda")
    targets[-1] = vocab - 1  # the last column of the last tile
    heat = None if temperature is None else temperature + torch.rand(num, device="cuda")
    return z, targets, Scores(heat, torch.randn(vocab, device="cuda") if bias else None, softcap)


def compare(ours, exact, naive):
    """On a handful of rows naive may be right by luck: its error counts as two roundings in fp32 at least."""
    for got, want, plain in zip(ours, exact, naive, strict=True):
        error = (plain.to(got.dtype).double() - want).abs().max()
        floor = 2 * torch.finfo(torch.float32).eps * (1 + want.abs().max())
        assert_no_worse(got, want, want + torch.maximum(error, floor))


def logits(z, scores):
    z = z if scores.bias is None else z + scores.bias.to(z.dtype)
    z = z if scores.softcap is None else scores.softcap * (z / scores.softcap).tanh()
    return z if scores.temperature is None else z / scores.temperature.to(z.dtype)[:, None]


def truth(z, targets, scores, loss):
    """Log-prob, entropy, and the gradient of loss(logp, entropy) with respect to z, by autograd in z's dtype."""
    z = z.detach().clone().requires_grad_()
    logps = logits(z, scores).log_softmax(-1)
    logp = logps.gather(1, targets[:, None])[:, 0]
    entropy = -(logps.exp() * logps).sum(-1)
    return logp.detach(), entropy.detach(), torch.autograd.grad(loss(logp, entropy), z)[0]


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("num", "vocab"), RAGGED)
def test_ragged_chunks_give_the_gradients_of_fp64(num, vocab, options, out_dtype):
    z, targets, scores = make_inputs(num, vocab, **options)
    dlogp, dentropy = torch.randn(2, num, device="cuda")

    def loss(logp, entropy):
        return (logp * dlogp.to(logp.dtype)).sum() + (entropy * dentropy.to(logp.dtype)).sum()

    exact, naive = truth(z.double(), targets, scores, loss), truth(z, targets, scores, loss)
    stats = row_stats(z.clone(), targets, scores, True)
    out = torch.empty(num, vocab, device="cuda", dtype=out_dtype)
    row_grad(z.clone(), targets, stats, dlogp, dentropy, scores, out)
    assert (stats.logp <= 0).all()
    compare((stats.logp, stats.entropy, out), exact, naive)


@pytest.mark.parametrize(("num", "vocab"), RAGGED)
@pytest.mark.parametrize("in_place", [True, False])
def test_ragged_chunks_with_the_policy_inside_give_the_gradients_of_fp64(num, vocab, in_place):
    z, targets, scores = make_inputs(num, vocab, temperature=0.8)
    with torch.no_grad():
        now = logits(z, scores).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    adv = torch.randn(num, device="cuda")
    old = now + torch.where(torch.arange(num, device="cuda") % 2 == 0, 0.05, 0.6) * torch.randn_like(now).sign()
    policy = Policy(adv=adv, denom=7.0, old_logp=old, ref_logp=old, beta=0.1, entropy_coef=0.02)

    def loss(logp, entropy):
        adv_, old_ = adv.to(logp.dtype), old.to(logp.dtype)
        ratio = (logp - old_).exp()
        term = torch.min(ratio * adv_, ratio.clamp(0.8, 1.2) * adv_)
        kl = (old_ - logp).exp() - (old_ - logp) - 1
        return (0.1 * kl - term - 0.02 * entropy).sum() / 7

    exact, naive = truth(z.double(), targets, scores, loss), truth(z, targets, scores, loss)
    given = z.clone()
    out = given if in_place else torch.empty(num, vocab, device="cuda", dtype=torch.bfloat16)
    stats = row_policy(given, targets, policy, scores, True, out)
    compare((stats.logp, stats.entropy, out), exact, naive)


def test_one_broken_row_stays_alone_and_shows():
    z, targets, scores = make_inputs(5, 4099)
    z[2, 77] = torch.nan
    whole = row_stats(z.clone(), targets, scores, True)
    rest = torch.arange(5, device="cuda") != 2
    apart = row_stats(z[rest], targets[rest], scores, True)
    assert whole.logp[2].isnan()
    assert whole.entropy[2].isnan()
    assert torch.equal(whole.logp[rest], apart.logp)
    assert torch.equal(whole.entropy[rest], apart.entropy)


def test_extreme_scores_stay_finite():
    """Exponents of 1e4 overflow unless the maximum is taken first; equal scores have entropy log V."""
    z, targets, scores = make_inputs(4, 4099)
    z[0], z[1], z[2] = 1e4, -1e4, 0.0
    z[3] = 0.0
    z[3, targets[3]] = 1e4
    stats = row_stats(z, targets, scores, True)
    flat = torch.full((3,), 4099.0, device="cuda").log()
    torch.testing.assert_close(stats.logp[:3], -flat)
    torch.testing.assert_close(stats.entropy[:3], flat)
    assert stats.logp[3] == 0
    assert stats.entropy[3] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num", "vocab", "width"), [(1, 257, 64), (129, 1000, 136), (300, 32003, 256)])
def test_the_fused_forward_scores_ragged_shapes_as_fp64_does(num, vocab, width, dtype):
    from thinkmid.kernels.gpu.logprob import linear_logprob_forward

    hidden, weight = (torch.randn(n, width, device="cuda").to(dtype) for n in (num, vocab))
    weight = weight * 2 * width**-0.5
    targets = torch.randint(vocab, (num,), device="cuda")
    targets[-1] = vocab - 1

    def plain(h, w):
        logps = (h @ w.T).to(torch.promote_types(h.dtype, torch.float32)).log_softmax(-1)
        return logps.gather(1, targets[:, None])[:, 0], -(logps.exp() * logps).sum(-1)

    logp, entropy, _ = linear_logprob_forward(hidden, weight, targets, Scores(), True)
    exact, naive = plain(hidden.double(), weight.double()), plain(hidden, weight)
    compare((logp, entropy), exact, naive)
