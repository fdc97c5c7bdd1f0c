"""The Triton policy kernel, interpreted where there is no GPU, against autograd of the loss in fp64."""

import itertools

import pytest
import torch

from tests.conftest import assert_no_worse
from thinkmid.kernels import dr_grpo_loss, launch
from thinkmid.kernels.gpu import policy as gpu
from thinkmid.kernels.streams import DevicePolicy

# numpy's, under the interpreter, where a GPU says nothing
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")
# inv_denom, clip_low, clip_high, is_cap, dual_clip, beta, entropy_coef, padding
SCALARS = [0.25, 0.2, 0.3, 1.5, 2.5, 0.1, 0.03, 0.0]
STREAMS = ("old_logp", "sampler_logp", "ref_logp", "mask")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(gpu, "BLOCK_R", 64)


def case(num_rows, present=STREAMS, scalars=SCALARS):
    def row(scale=1.0):
        return torch.randn(num_rows, device=DEVICE) * scale

    logp = -row().exp()
    made = {name: logp + row(0.6) for name in STREAMS[:3]}
    made["mask"] = torch.where(torch.rand(num_rows, device=DEVICE) < 0.3, 0.0, row().abs())
    streams = [made[name] if name in present else None for name in STREAMS]
    adv = torch.where(torch.rand(num_rows, device=DEVICE) < 0.2, 0.0, row())
    scalars = torch.tensor(scalars, device=DEVICE)
    return logp, DevicePolicy(adv, *streams, scalars, scalars[6].item() != 0), row().abs()


def loss_of(logp, policy, entropy):
    """Each row's loss, whose graph holds what the objective lets through, and the metrics by counting."""
    wide = [x.to(logp.dtype) if isinstance(x, torch.Tensor) else x for x in policy[:6]]
    adv, old, sampler, ref, mask, scalars = wide
    inv_denom, low, high, cap, dual, beta, coef, _ = scalars.tolist()
    old = logp.detach() if old is None else old
    mask = torch.ones_like(logp) if mask is None else mask
    ratio = (logp - old).exp()
    free, bound = ratio * adv, ratio.detach().clamp(1 - low, 1 + high) * adv
    clipped = bound < free
    objective = torch.where(clipped, bound, free)
    objective = torch.where((adv < 0) & (dual * adv > objective), dual * adv, objective)
    gap = torch.zeros_like(logp) if sampler is None else (old - sampler).detach()
    importance = gap.exp().clamp(max=cap)
    delta = torch.zeros_like(logp) if ref is None else ref - logp
    kl = delta.exp() - delta - 1
    loss = -importance * objective + beta * kl - (0.0 if entropy is None else coef * entropy)
    kept = mask != 0
    entropy = torch.zeros_like(logp) if entropy is None else entropy
    metrics = (
        torch.ones_like(logp), ratio, clipped & (adv < 0), clipped & (adv > 0), gap.abs(), importance >= cap,
        importance, kl, entropy,
    )  # fmt: skip
    sums = [m[kept].to(logp.dtype).sum() for m in metrics]
    return mask * inv_denom * loss, torch.stack([*sums, gap[kept].abs().max() if kept.any() else gap.sum() * 0])


def expected(logp, policy, entropy, dtype):
    logp = logp.detach().clone().to(dtype).requires_grad_()
    loss, metrics = loss_of(logp, policy, None if entropy is None else entropy.to(dtype))
    (dlogp,) = torch.autograd.grad(loss.sum(), logp)
    return loss.detach(), dlogp, metrics.detach()


def check(logp, policy, entropy):
    exact, naive = (expected(logp, policy, entropy, t) for t in (torch.float64, torch.float32))
    for ours, want, honest in zip(gpu.policy_rows(logp, policy, entropy), exact, naive, strict=True):
        eps = torch.finfo(torch.float32).eps
        assert_no_worse(ours, want, want + torch.maximum((honest - want).abs().max(), eps * want.abs().max()))


@pytest.mark.parametrize("present", [p for n in range(5) for p in itertools.combinations(STREAMS, n)])
def test_any_set_of_streams_gives_loss_slope_and_metrics(present):
    check(*case(70, present))


@pytest.mark.parametrize("num_rows", [1, 63, 64, 65, 131])
def test_every_row_is_counted_once(num_rows):
    check(*case(num_rows))


def test_the_caps_may_be_off():
    check(*case(70, STREAMS, [0.25, 0.2, 0.3, INF, INF, 0.0, 0.0, 0.0]))


def test_entropy_may_be_absent():
    logp, policy, _ = case(70)
    check(logp, policy, None)


@pytest.mark.parametrize("path", ["triton", "cpp", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entropy_may_be_a_column_and_of_another_dtype(path, dtype, monkeypatch):
    if path == "cpp" and DEVICE != "cpu":
        pytest.skip("csrc is for the CPU")
    monkeypatch.setattr(launch, "row_path", lambda x: path)
    logp, policy, entropy = case(70)
    table = torch.stack((entropy, torch.full_like(entropy, 99.0)), 1).to(dtype).requires_grad_()
    loss, metrics = dr_grpo_loss(logp, policy.adv, denom=4.0, mask=policy.mask, entropy=table[:, 0], entropy_coef=0.5)
    plain, _ = dr_grpo_loss(logp, policy.adv, denom=4.0, mask=policy.mask)
    bonus = 0.5 / 4 * (policy.mask * entropy).sum()
    torch.testing.assert_close(loss, plain - bonus)
    torch.testing.assert_close(metrics.entropy, entropy[policy.mask != 0].sum())
    (slope,) = torch.autograd.grad(loss, table)
    torch.testing.assert_close(slope[:, 0], (-0.5 / 4 * policy.mask).to(dtype))


def test_on_policy_the_ratio_is_exactly_1_and_nothing_is_clipped():
    logp, policy, _ = case(70, ())
    policy = policy._replace(scalars=torch.tensor([0.5, 0.0, 0.0, INF, INF, 0.0, 0.0, 0.0], device=DEVICE))
    loss, dlogp, metrics = gpu.policy_rows(logp, policy, None)
    assert torch.equal(dlogp, -0.5 * policy.adv)  # at the tie of both branches the whole gradient flows
    assert torch.equal(loss, dlogp)
    assert metrics.tolist() == [70, 70, 0, 0, 0, 0, 70, 0, 0, 0]


def by_hand(**values):
    """Rows of logp 0 and given streams."""
    rows = {name: torch.tensor(x, device=DEVICE) for name, x in values.items() if name != "scalars"}
    streams = [rows.get(name) for name in STREAMS]
    scalars = torch.tensor(values.get("scalars", [1, 0.2, 0.2, INF, INF, 0, 0, 0]), device=DEVICE)
    return gpu.policy_rows(torch.zeros_like(rows["adv"]), DevicePolicy(rows["adv"], *streams, scalars, False), None)


def test_a_ratio_that_overflows_gives_zero_where_the_advantage_or_the_mask_is_zero():
    loss, dlogp, _ = by_hand(
        adv=[0.0, 1.0, 1.0, -1.0], old_logp=[-200.0] * 4, sampler_logp=[-400.0, -200.0, -400.0, -200.0],
        mask=[1.0, 1.0, 0.0, 0.0],
    )  # fmt: skip
    assert loss.tolist() == [0.0, pytest.approx(-1.2), 0.0, 0.0]
    assert dlogp.tolist() == [0.0, 0.0, 0.0, 0.0]


def test_dual_clip_bounds_the_loss_of_a_bad_token():
    loss, dlogp, _ = by_hand(adv=[-2.0, -2.0], old_logp=[-80.0, -0.5], scalars=[1, 0.2, 0.2, INF, 3, 0, 0, 0])
    assert loss.tolist() == [6.0, pytest.approx(2 * 2.718281828**0.5, rel=1e-6)]
    assert dlogp.tolist() == [0.0, pytest.approx(2 * 2.718281828**0.5, rel=1e-6)]


def test_nan_stays_in_its_row_and_shows_in_the_metrics():
    logp, policy, entropy = case(70, STREAMS[:3])
    logp[5] = float("nan")
    loss, dlogp, metrics = gpu.policy_rows(logp, policy._replace(adv=policy.adv + 3), entropy)
    assert loss.isnan().nonzero().flatten().tolist() == dlogp.isnan().nonzero().flatten().tolist() == [5]
    assert metrics[1].isnan()


def test_an_impossible_token_on_policy_is_no_nan():
    logp, policy, _ = case(70, ())
    logp[5] = -INF
    loss, dlogp, metrics = gpu.policy_rows(logp, policy, None)
    assert loss[5] == dlogp[5] == -0.25 * policy.adv[5]
    assert metrics.isfinite().all()


def test_no_rows_are_no_work():
    loss, dlogp, metrics = gpu.policy_rows(*case(0))
    assert len(loss) == len(dlogp) == 0
    assert metrics.tolist() == [0.0] * 10
