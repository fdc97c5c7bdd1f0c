"""The Triton row kernel, interpreted where there is no GPU, against fp64 autograd through the formula."""

import math
import mmap

import pytest
import torch

from tests.conftest import assert_no_worse
from thinkmid.kernels.gpu import rows
from thinkmid.kernels.streams import DevicePolicy, Scores, Stats

# numpy's, under the interpreter, where a GPU says nothing
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAIN = {"temperature": None, "bias": None, "softcap": None}


SHIPPED = rows._shape


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    # rows of several blocks, short enough for the interpreter
    monkeypatch.setattr(rows, "_shape", lambda z: {"BLOCK_V": 256, "num_warps": 1})


def logits(z, temperature, bias, softcap):
    x = z if bias is None else z + bias
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    return x if temperature is None else x / temperature[:, None]


def formula(z, y, scores, dtype):
    """z as a leaf of that dtype, log-prob, entropy, log-sum-exp; the entropy of log-probs, which does not cancel."""
    z = z.detach().clone().to(dtype).requires_grad_()
    # autograd makes 0 * inf of a closed column; one at -1e6 has probability 0 just as well
    scores = [x.to(dtype).clamp(min=-1e6) if isinstance(x, torch.Tensor) else x for x in scores.values()]
    s = logits(z, *scores)
    logp = s.log_softmax(-1)
    p = logp.exp()
    entropy = -torch.where(p == 0, 0.0, p * logp).sum(-1)
    return z, logp[torch.arange(len(y), device=y.device), y], entropy, s.logsumexp(-1)


def gradient(z, y, scores, g, e, dtype):
    z, logp, entropy, _ = formula(z, y, scores, dtype)
    pairs = [(x, d.to(dtype)) for x, d in ((logp, g), (entropy, e)) if d is not None]
    return torch.autograd.grad([x for x, _ in pairs], z, [d for _, d in pairs])[0]


def case(num_rows=5, V=1000, spread=3.0, **scores):
    """z (c, V), targets with the first and the last column among them, gradients."""
    z = torch.randn(num_rows, V, device=DEVICE) * spread
    y = torch.randint(V, (num_rows,), device=DEVICE)
    y[: min(2, num_rows)] = torch.tensor([V - 1, 0], device=DEVICE)[:num_rows]
    return z, y, PLAIN | scores, torch.randn(num_rows, device=DEVICE), torch.randn(num_rows, device=DEVICE)


def tempers(num_rows):
    return torch.linspace(0.3, 2.5, num_rows, device=DEVICE)


def with_option(name):
    bias = torch.randn(1000, device=DEVICE)
    if name == "closed columns":
        bias[torch.rand(1000, device=DEVICE) < 0.4] = -math.inf
        bias[256:512] = -math.inf  # a whole block
        bias[[0, 999]] = 0.0  # columns that are targets
    options = {
        "plain": {}, "temperature": {"temperature": tempers(5)}, "bias": {"bias": bias}, "softcap": {"softcap": 5.0},
        "all": {"temperature": tempers(5), "bias": bias, "softcap": 5.0}, "closed columns": {"bias": bias},
    }  # fmt: skip
    z, y, scores, g, e = case(**options[name])
    y = torch.where(y % 2 == 1, 999, 0) if name == "closed columns" else y
    return z, y, scores, g, e


OPTIONS = ["plain", "temperature", "bias", "softcap", "all", "closed columns"]


def rounded(exact, size):
    """The honest alternative where the formula happens to be exact: one rounding to fp32 of numbers of that size."""
    return exact + torch.finfo(torch.float32).eps / 2 * size.abs().max()


def check_stats(z, y, scores):
    _, *exact = formula(z, y, scores, torch.float64)
    _, *naive = formula(z, y, scores, torch.float32)
    got = rows.row_stats(z, y, Scores(**scores), True)
    for ours, want, honest in zip(got, exact, naive, strict=True):
        floor = rounded(want, want.abs() + 1)  # the 1: logarithms of sums near 1 are differences
        assert_no_worse(ours, want, max(honest.double(), floor, key=lambda x: (x - want).abs().max()))
    assert (got[0] <= 0).all()


def check_gradient(z, y, scores, g, e, dtype=torch.float32):
    exact = gradient(z, y, scores, g, e, torch.float64)
    naive = gradient(z, y, scores, g, e, torch.float32).to(dtype)
    _, entropy, lse = rows.row_stats(z, y, Scores(**scores), True)
    out = torch.empty(z.shape, dtype=dtype, device=DEVICE)
    rows.row_grad(z, y, Stats(None, entropy, lse), g, e, Scores(**scores), out)
    # p = exp(s - lse) is as good as s and lse in fp32
    loss_of_lse = rounded(exact, exact.abs().max() * (1 + lse.abs().max()))
    assert_no_worse(out, exact, max(naive.double(), loss_of_lse, key=lambda x: (x - exact).abs().max()))


@pytest.mark.parametrize("option", OPTIONS)
def test_statistics_are_those_of_the_formula(option):
    z, y, scores, _, _ = with_option(option)
    check_stats(z, y, scores)


@pytest.mark.parametrize("V", [1, 2, 97, 255, 256, 257, 513])
def test_any_number_of_columns_is_covered_once(V):
    z, y, scores, g, e = case(3, V)
    check_stats(z, y, scores)
    check_gradient(z, y, scores, g, e)


@pytest.mark.parametrize("V", [640, 2049, 70001])
def test_the_shipped_blocks_fit_the_row(V, monkeypatch):
    monkeypatch.setattr(rows, "_shape", SHIPPED)
    z, y, scores, g, e = case(2, V)
    check_stats(z, y, scores)
    check_gradient(z, y, scores, g, e)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("with_entropy", [False, True])
def test_gradient_is_that_of_autograd(option, with_entropy):
    z, y, scores, g, e = with_option(option)
    check_gradient(z, y, scores, g, e if with_entropy else None)


def test_entropy_alone_may_be_asked_for():
    z, y, scores, _, e = case()
    check_gradient(z, y, scores, None, e)


@pytest.mark.parametrize(("dtype", "ulp"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_a_narrow_gradient_is_rounded_once(dtype, ulp):
    z, y, scores, g, e = case()
    exact = gradient(z, y, scores, g, e, torch.float64)
    _, entropy, lse = rows.row_stats(z, y, Scores(**scores), True)
    out = torch.empty(5, 1024, dtype=dtype, device=DEVICE)[:, :1000]
    rows.row_grad(z, y, Stats(None, entropy, lse), g, e, Scores(**scores), out)
    # the interpreter truncates to bf16 where a GPU rounds to nearest
    slack = 2 * ulp if dtype == torch.bfloat16 and DEVICE == "cpu" else ulp
    assert ((out.double() - exact).abs() <= slack * exact.abs() + 2**-24).all()


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_large_scores_keep_log_prob_and_entropy(scale):
    z, y, scores, _, _ = case()
    z = torch.where(torch.rand(z.shape, device=DEVICE) < 0.5, z + scale, z)
    y[2] = z[2].argmax()
    check_stats(z, y, scores)
    check_stats(z + scale, y, scores)


def test_equal_scores_share_the_probability():
    z, y, scores, _, _ = case()
    for value in (0.0, -1e4, 1e4):
        logp, entropy, lse = rows.row_stats(torch.full_like(z, value), y, Scores(**scores), True)
        torch.testing.assert_close(logp, torch.full_like(logp, -math.log(1000)), rtol=1e-6, atol=0)
        torch.testing.assert_close(entropy, -logp, rtol=1e-6, atol=0)
        torch.testing.assert_close(lse, value - logp, rtol=1e-6, atol=0)


def test_a_sure_token_has_log_prob_near_0_never_above():
    z, y, scores, g, e = case(40, 300, spread=1.0)
    z[torch.arange(40), y] = torch.linspace(5, 60, 40, device=DEVICE)
    check_stats(z, y, scores)
    check_gradient(z, y, scores, g, e)


def test_nan_stays_in_its_row():
    z, y, scores, g, e = case()
    z[1, 700] = math.nan
    logp, entropy, lse = rows.row_stats(z, y, Scores(**scores), True)
    rows.row_grad(z, y, Stats(None, entropy, lse), g, e, Scores(**scores), z)
    for x in (logp, entropy, lse, z[:, 3]):
        assert x.isnan().tolist() == [False, True, False, False, False]


def test_no_rows_are_no_work():
    z, y, scores, g, e = case(0)
    logp, entropy, lse = rows.row_stats(z, y, Scores(**scores), True)
    rows.row_grad(z, y, Stats(None, entropy, lse), g, e, Scores(**scores), z)
    assert len(logp) == len(entropy) == len(lse) == 0


def test_rows_may_lie_apart_and_unaligned():
    z, y, scores, g, e = case()
    wide = torch.full((5, 2011), math.nan, device=DEVICE)
    view = wide[:, 7:1007]
    view.copy_(z)
    check_stats(view, y, scores)
    plain = torch.empty_like(z)
    _, entropy, lse = rows.row_stats(z, y, Scores(**scores), True)
    rows.row_grad(z, y, Stats(None, entropy, lse), g, e, Scores(**scores), plain)
    rows.row_grad(view, y, Stats(None, entropy, lse), g, e, Scores(**scores), view)  # in place
    assert torch.equal(view, plain)
    assert wide[:, :7].isnan().all()
    assert wide[:, 1007:].isnan().all()


def test_the_target_slope_keeps_its_digits_where_p_is_near_1():
    # the row's gradient at the target is 1 - p: formed from a p in bf16 nothing of it would be left
    z = torch.zeros(1, 300, device=DEVICE)
    z[0, 9] = 12.0
    y, out = torch.tensor([9], device=DEVICE), torch.empty(1, 300, dtype=torch.bfloat16, device=DEVICE)
    one = torch.ones(1, device=DEVICE)
    lse = rows.row_stats(z, y, Scores(**PLAIN), False)[2]
    rows.row_grad(z, y, Stats(None, None, lse), one, None, Scores(**PLAIN), out)
    left = 1 - 1 / (1 + 299 * math.exp(-12))
    assert abs(out[0, 9].item() - left) <= 2**-7 * left


# the policy decides each row's slope inside the kernel


def policy_case(name):
    z, y, scores, _, _ = case(6)
    logp = formula(z, y, scores, torch.float32)[1].detach()
    near = [logp + 0.4 * torch.randn_like(logp) for _ in range(3)]
    adv = torch.tensor([1.0, -1.0, 0.0, 2.0, -0.5, 1.5], device=DEVICE)
    scalars = [0.125, 0.2, 0.3, 2.0, 3.0, 0.0, 0.0, 0.0]
    mask = torch.tensor([1.0, 1, 1, 0, 2, 1], device=DEVICE)
    if name == "on policy":
        streams = (None, None, None, None)
    elif name == "every stream":
        streams, scalars[5], scalars[6] = (*near, mask), 0.1, 0.02
    elif name == "entropy":
        streams, scalars[6] = (None, None, None, mask), 0.02
    policy = DevicePolicy(adv, *streams, torch.tensor(scalars, device=DEVICE), scalars[6] != 0)
    return z, y, policy


def loss_rows(logp, entropy, policy):
    """Of the policy, written with a graph that only the rules of the objective cut."""
    adv, old, sampler, ref, mask, scalars, _ = (x.to(logp.dtype) if isinstance(x, torch.Tensor) else x for x in policy)
    inv_denom, low, high, cap, dual, beta, coef, _ = scalars.tolist()
    old = logp.detach() if old is None else old
    ratio = (logp - old).exp()
    free, bound = ratio * adv, ratio.detach().clamp(1 - low, 1 + high) * adv
    objective = torch.where(bound < free, bound, free)
    objective = torch.where((adv < 0) & (dual * adv > objective), dual * adv, objective)
    weight = 1.0 if sampler is None else (old - sampler).exp().clamp(max=cap).detach()
    loss = -weight * objective - coef * entropy
    if ref is not None:
        loss = loss + beta * ((ref - logp).exp() - (ref - logp) - 1)
    return inv_denom * loss * (1.0 if mask is None else mask)


def policy_gradient(z, y, policy, dtype):
    z, logp, entropy, _ = formula(z, y, PLAIN, dtype)
    return torch.autograd.grad(loss_rows(logp, entropy, policy).sum(), z)[0]


@pytest.mark.parametrize("name", ["on policy", "every stream", "entropy"])
def test_the_policy_kernel_gives_the_gradient_of_the_loss(name):
    z, y, policy = policy_case(name)
    exact, naive = (policy_gradient(z, y, policy, t) for t in (torch.float64, torch.float32))
    before, want = z.clone(), rows.row_stats(z, y, Scores(**PLAIN), True)
    logp, entropy, _ = rows.row_policy(z, y, policy, Scores(**PLAIN), True, z)
    assert torch.equal(logp, want[0])
    assert torch.equal(entropy, want[1])
    assert_no_worse(z, exact, naive)
    out = torch.empty(z.shape, dtype=torch.float16, device=DEVICE)
    rows.row_policy(before, y, policy, Scores(**PLAIN), False, out)
    assert_no_worse(out, exact, exact.half())


def test_policy_gradient_survives_large_scores():
    # through log-sum-exp in fp32, 1e4 would leave p three digits
    z, y, policy = policy_case("entropy")
    z += 1e4
    exact, naive = (policy_gradient(z, y, policy, t) for t in (torch.float64, torch.float32))
    rows.row_policy(z, y, policy, Scores(**PLAIN), False, z)
    assert_no_worse(z, exact, naive)


def test_an_overflowing_ratio_without_advantage_leaves_zeros():
    z, y, policy = policy_case("on policy")
    old = torch.full((6,), -1e4, device=DEVICE)
    policy = policy._replace(old_logp=old, adv=torch.tensor([0.0, 1, 0, 1, 0, 1], device=DEVICE))
    rows.row_policy(z, y, policy, Scores(**PLAIN), False, z)
    assert torch.equal(z, torch.zeros_like(z))


# two rows 2^31 elements apart, in memory of which only the touched pages exist


class Apart(torch.Tensor):
    """Rows that really lie STRIDE elements apart; torch is told of the first pages alone and copies no more."""

    STRIDE = 2**31 + 64

    def stride(self, dim=None):
        return super().stride() if dim is None else (self.STRIDE, 1)[dim]


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter wraps 32-bit offsets as a GPU would, without the memory")
def test_offsets_of_rows_pass_two_to_the_31():
    z, y, scores, g, e = case(2, 300)
    # the second half: an offset that wraps is negative, and must find zeros there, not the end of the process
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which the module names from Python 3.13 on
    with mmap.mmap(-1, 2 * 4 * (Apart.STRIDE + 2**20), flags=flags) as memory:
        start = 4 * (Apart.STRIDE + 2**20)
        lines = [
            torch.frombuffer(memory, dtype=torch.float32, count=600, offset=start + 4 * Apart.STRIDE * r)
            for r in (0, 1)
        ]
        for line, row in zip(lines, z, strict=True):
            line[:300] = row
        apart = lines[0].reshape(2, 300).as_subclass(Apart)
        got = rows.row_stats(apart, y, Scores(**scores), True)
        want = rows.row_stats(z, y, Scores(**scores), True)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        rows.row_grad(apart, y, Stats(None, want[1], want[2]), g, e, Scores(**scores), apart)
        rows.row_grad(z, y, Stats(None, want[1], want[2]), g, e, Scores(**scores), z)
        assert torch.equal(torch.stack([line[:300] for line in lines]), z)
        del apart, got, lines, line
