import math

import pytest
import torch
from conftest import assert_no_worse

from thinkmid import _csrc
from thinkmid.kernels import launch
from thinkmid.kernels.rows import row_grad, row_policy, row_stats
from thinkmid.kernels.streams import Policy, Scores

SIZES = [(1, 1), (3, 2), (5, 15), (5, 16), (5, 17), (2, 1023), (2, 1024), (2, 1025), (3, 2500)]
TEMPERATURE, BIAS, SOFTCAP = {"temperature"}, {"bias"}, {"softcap"}
SHAPED = [set(), TEMPERATURE, BIAS, SOFTCAP, TEMPERATURE | BIAS | SOFTCAP]


@pytest.fixture(params=[*_csrc.isas(), "torch"])
def path(request, monkeypatch):
    """Every instruction set of this CPU, and the torch twin in fp32."""
    if request.param == "torch":
        monkeypatch.setattr(launch, "has_cpp", lambda: False)
        yield "torch"
    else:
        was = _csrc.isa()
        _csrc.use_isa(request.param)
        yield request.param
        _csrc.use_isa(was)


class Case:
    def __init__(self, rows, vocab, shaped, scale=3.0, seed=0):
        rng = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=rng, dtype=torch.float64)

        self.z, self.targets = normal(rows, vocab) * scale, torch.randint(vocab, (rows,), generator=rng)
        self.targets[-1] = vocab - 1
        self.temperature = normal(rows).abs() + 0.5 if "temperature" in shaped else None
        self.bias = normal(vocab) if "bias" in shaped else None
        self.softcap = 4.0 if "softcap" in shaped else None
        self.dlogp, self.dentropy = normal(rows), normal(rows)
        self.policy = {n: normal(rows) for n in ("adv", "old_logp", "sampler_logp", "ref_logp", "mask")}

    def scores(self, dtype):
        wide = (None if x is None else x.to(dtype) for x in (self.temperature, self.bias))
        return Scores(*wide, self.softcap)

    def naive(self, dtype, dlogp, dentropy):
        """By autograd through log_softmax: logp, entropy, dz."""
        z, scores = self.z.to(dtype).requires_grad_(), self.scores(dtype)
        s = z if scores.bias is None else z + scores.bias
        s = s if scores.softcap is None else scores.softcap * (s / scores.softcap).tanh()
        s = s if scores.temperature is None else s / scores.temperature[:, None]
        logp_all = s.log_softmax(-1)
        logp = logp_all.gather(1, self.targets[:, None])[:, 0]
        entropy = -(logp_all.exp() * logp_all).sum(-1)
        (dz,) = torch.autograd.grad((logp * dlogp.to(dtype)).sum() + (entropy * dentropy.to(dtype)).sum(), z)
        return logp.detach(), entropy.detach(), dz


@pytest.mark.parametrize("shaped", SHAPED, ids=str)
@pytest.mark.parametrize(("rows", "vocab"), SIZES)
def test_a_row_is_no_worse_than_autograd_through_log_softmax(path, rows, vocab, shaped):
    case = Case(rows, vocab, shaped)
    exact, plain = (case.naive(d, case.dlogp, case.dentropy) for d in (torch.float64, torch.float32))
    scores = case.scores(torch.float32)
    stats = row_stats(case.z.float(), case.targets, scores, True)
    out = torch.empty(rows, vocab)
    row_grad(case.z.float(), case.targets, stats, case.dlogp.float(), case.dentropy.float(), scores, out)
    for ours, want, other in zip((stats.logp, stats.entropy, out), exact, plain, strict=True):
        # a vocabulary of one has nothing but zeros, and rounding is not always naive's enemy in a handful of numbers
        assert_no_worse(ours, want, other + 2e-6 * want.abs().max().float() + 1e-7)


@pytest.mark.parametrize("coef", [0.0, 0.3])
@pytest.mark.parametrize("shaped", [set(), TEMPERATURE | BIAS | SOFTCAP], ids=str)
def test_one_kernel_does_what_statistics_policy_and_gradient_do_in_fp64(path, shaped, coef):
    case = Case(7, 1037, shaped)
    found = []
    for dtype in (torch.float64, torch.float32):
        near = row_stats(case.z.to(dtype, copy=True), case.targets, case.scores(dtype), True).logp
        streams = {n: x.to(dtype) for n, x in case.policy.items()}
        streams |= {n: near + 0.3 * streams[n] for n in ("old_logp", "sampler_logp", "ref_logp")}
        policy = Policy(**streams, denom=5.0, is_cap=1.2, dual_clip=1.5, beta=0.1, entropy_coef=coef)
        out = torch.empty_like(case.z, dtype=dtype)
        stats = row_policy(case.z.to(dtype, copy=True), case.targets, policy, case.scores(dtype), True, out)
        found.append((stats.logp, stats.entropy, out))
    for want, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), want, rtol=1e-5, atol=2e-6)
    assert found[0][2].abs().max() > 0.01


def test_gradients_may_be_written_over_strided_scores(path):
    case = Case(5, 100, set())
    scores = Scores()
    wide = torch.full((5, 130), 7.0)
    wide[:, 10:110] = case.z.float()
    stats = row_stats(case.z.float(), case.targets, scores, False)
    want = torch.empty(5, 100)
    row_grad(case.z.float(), case.targets, stats, case.dlogp.float(), None, scores, want)
    z = wide[:, 10:110]
    row_grad(z, case.targets, stats, case.dlogp.float(), None, scores, z)
    assert torch.equal(z, want)
    assert wide[:, :10].eq(7).all()
    assert wide[:, 110:].eq(7).all()


def run(z, targets, dlogp=None):
    stats = row_stats(z.clone(), targets, Scores(), True)
    out = torch.empty_like(z)
    row_grad(
        z.clone(), targets, stats, torch.ones(len(z)) if dlogp is None else dlogp, torch.ones(len(z)), Scores(), out
    )
    return stats, out


def test_extreme_scores(path):
    """Row by row: huge and equal; a spread of 2e4; a target that is certain; one that cannot be; -inf among others."""
    z = torch.zeros(5, 1100)
    z[0] = 1e4
    z[1] = torch.linspace(-1e4, 1e4, 1100)
    z[2, 3] = 200
    z[3, 0] = 200
    z[4, ::2] = -math.inf
    targets = torch.tensor([5, 1099, 3, 9, 1])
    stats, out = run(z, targets)
    exact = z.double().log_softmax(-1)
    torch.testing.assert_close(stats.logp.double(), exact[range(5), targets], rtol=1e-6, atol=1e-6)
    assert stats.logp.le(0).all()
    want = torch.tensor([math.log(1100), 0, 0, 0, math.log(550)])
    torch.testing.assert_close(stats.entropy[[0, 2, 3, 4]], want[[0, 2, 3, 4]], rtol=1e-6, atol=1e-6)
    assert out.isfinite().all()
    assert out[4, ::2].eq(0).all()
    assert out[3, 9] == 1
    # fp32 has steps of 1e-3 near 1e4, where the log-sum-exp of the first row lies
    assert out.sum(1).abs().le(torch.tensor([1e-3, 1e-3, 2e-5, 2e-5, 2e-5])).all()


def test_a_nan_spoils_its_own_row_and_no_other(path):
    z, targets = torch.randn(4, 1500), torch.tensor([0, 1, 2, 3])
    z[1, 700], z[2, 1499] = math.nan, math.inf
    stats, out = run(z, targets)
    assert stats.logp.isnan().tolist() == stats.entropy.isnan().tolist() == [False, True, True, False]
    assert out.isnan().all(1).tolist() == [False, True, True, False]
    assert not out[[0, 3]].isnan().any()


def test_near_certainty_the_gradient_of_the_target_keeps_its_digits(path):
    """1 - p as a difference would have one digit left, and none in bf16."""
    z = torch.zeros(1, 500)
    z[0, 7] = 21.0
    _, out = run(z, torch.tensor([7]), torch.ones(1))
    stats = row_stats(z.clone(), torch.tensor([7]), Scores(), False)
    row_grad(z, torch.tensor([7]), stats, torch.ones(1), None, Scores(), out)
    exact = -math.expm1(torch.zeros(500).double().index_fill(0, torch.tensor(7), 21.0).log_softmax(0)[7].item())
    assert out[0, 7].item() == pytest.approx(exact, rel=0.1)


def test_a_row_without_coefficient_has_a_gradient_of_exactly_zero(path):
    z = torch.randn(3, 70)
    stats = row_stats(z.clone(), torch.tensor([1, 2, 3]), Scores(), False)
    out = torch.full((3, 70), math.nan)
    row_grad(z, torch.tensor([1, 2, 3]), stats, torch.tensor([0.0, 1.0, 0.0]), None, Scores(), out)
    assert out[[0, 2]].eq(0).all()
    assert out[1].ne(0).any()
