import math
from itertools import product

import pytest
import torch
from conftest import assert_no_worse, assert_same

from thinkmid.kernels import Metrics, dr_grpo_loss, plan_rows

R = 41
PLAIN = {"old_logp": None, "sampler_logp": None, "ref_logp": None, "mask": None, "entropy": None}
SCALARS = {"denom": 3.0, "clip_low": 0.2, "clip_high": 0.2, "is_cap": None, "dual_clip": None, "beta": 0.0}
SCALARS["entropy_coef"] = 0.0


def reference(logp, adv, *, denom, old_logp, sampler_logp, ref_logp, mask, entropy, **k):
    """One token at a time with plain numbers in the branches; old None: the ratio is 1 with the gradient of logp."""
    loss, sums = 0.0 * logp.sum(), dict.fromkeys(Metrics._fields, 0.0)
    for t in range(len(logp)):
        weight = 1.0 if mask is None else mask[t].item()
        if not weight:
            continue
        before = logp[t].detach() if old_logp is None else old_logp[t]
        ratio = torch.exp(logp[t] - before)
        bound = min(max(ratio.item(), 1 - k["clip_low"]), 1 + k["clip_high"])
        clipped = bound * adv[t].item() < ratio.item() * adv[t].item()
        objective = bound * adv[t] if clipped else ratio * adv[t]
        if k["dual_clip"] and adv[t] < 0 and objective < k["dual_clip"] * adv[t]:
            objective = k["dual_clip"] * adv[t]
        gap = 0.0 if sampler_logp is None else (before - sampler_logp[t]).item()
        capped = k["is_cap"] is not None and math.exp(gap) >= k["is_cap"]
        importance = k["is_cap"] if capped else math.exp(gap)
        kl = torch.zeros(())
        if ref_logp is not None:
            kl = torch.exp(ref_logp[t] - logp[t]) - (ref_logp[t] - logp[t]) - 1
        h = torch.zeros(()) if entropy is None else entropy[t]
        loss = loss + weight / denom * (-importance * objective + k["beta"] * kl - k["entropy_coef"] * h)
        up = adv[t].item() > 0
        row = [1, ratio.item(), clipped and not up, clipped and up, abs(gap), capped, importance, kl.item()]
        for name, value in zip(Metrics._fields, [*row, h.item()], strict=False):
            sums[name] += value
        sums["gap_max"] = max(sums["gap_max"], abs(gap))
    return loss, sums


def streams(dtype=torch.float64):
    """Half of the tokens lie near the old log-prob, half far outside the clip range."""
    far = torch.where(torch.arange(R) % 2 == 0, 0.05, 1.0)
    logp = -torch.rand(R, dtype=torch.float64) * 5
    old, sampler, ref = (logp + torch.randn(R, dtype=torch.float64) * far for _ in range(3))
    adv, mask = torch.randn(R, dtype=torch.float64), torch.rand(R, dtype=torch.float64)
    adv[::7], mask[5::9] = 0, 0
    old[3], sampler[4] = logp[3], old[4]  # ties: ratio 1, importance 1
    entropy = torch.rand(R, dtype=torch.float64)
    given = {"old_logp": old, "sampler_logp": sampler, "ref_logp": ref, "mask": mask}
    logp, entropy = (x.to(dtype).requires_grad_() for x in (logp, entropy))
    return logp, adv.to(dtype), {n: x.to(dtype) for n, x in given.items()} | {"entropy": entropy}


CAPS = [None, 1.0, 1.7]
OPTIONS = list(product(CAPS, [0.0, 0.3], [(0.2, 0.2), (0.1, 0.5), (1.0, 0.0)], [None, 1.5], [0.0, 0.4]))


@pytest.mark.parametrize("absent", [set(), {"old_logp"}, {"sampler_logp", "mask"}, {"ref_logp", "entropy"}], ids=str)
def test_loss_gradients_and_sums_are_those_of_a_loop_over_tokens(absent):
    for cap, beta, (low, high), dual, coef in OPTIONS:
        options = {"clip_low": low, "clip_high": high, "dual_clip": dual}
        options["is_cap"] = None if "sampler_logp" in absent else cap
        options["beta"] = 0.0 if "ref_logp" in absent else beta
        options["entropy_coef"] = 0.0 if "entropy" in absent else coef
        exact = None
        for dtype, fn in ((torch.float64, reference), (torch.float64, dr_grpo_loss), (torch.float32, dr_grpo_loss)):
            torch.manual_seed(0)
            logp, adv, given = streams(dtype)
            given = PLAIN | {n: x for n, x in given.items() if n not in absent}
            loss, sums = fn(logp, adv, **given, **(SCALARS | options))
            sums = sums if fn is reference else {n: x.item() for n, x in sums._asdict().items()}
            inputs = [logp, given["entropy"]] if options["entropy_coef"] else [logp]
            found = {n: x.double() for n, x in zip("lh", torch.autograd.grad(loss, inputs), strict=False)}
            found["loss"] = loss.detach().double()
            if exact is None:
                exact, exact_sums = found, sums
            elif dtype == torch.float64:
                assert_same(found, exact)
                assert sums == pytest.approx(exact_sums)
            else:
                for name, want in exact.items():
                    torch.testing.assert_close(found[name], want, rtol=2e-5, atol=2e-6)
                assert sums == pytest.approx(exact_sums, rel=1e-5, abs=1e-6)


def test_any_shape_will_do_if_all_have_it():
    logp, adv, given = streams()
    flat, _ = dr_grpo_loss(logp[:40], adv[:40], denom=3, old_logp=given["old_logp"][:40], mask=given["mask"][:40])
    square = {n: given[n][:40].reshape(5, 8) for n in ("old_logp", "mask")}
    loss, _ = dr_grpo_loss(logp[:40].reshape(5, 8), adv[:40].reshape(5, 8), denom=3, **square)
    assert loss == flat
    assert torch.equal(*(torch.autograd.grad(x, logp)[0] for x in (flat, loss)))


def test_the_first_update_has_a_ratio_of_exactly_one():
    """Gradient -A / denom to the last bit: no exp of a difference that is almost 0."""
    logp, adv, _ = streams(torch.float32)
    loss, sums = dr_grpo_loss(logp, adv, denom=4)
    loss.backward()
    assert torch.equal(logp.grad, -adv / 4)
    assert sums.ratio == sums.rows == R


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("adv", [1.0, -1.0])
@pytest.mark.parametrize("old", [None, -1.5])
def test_inside_the_clip_range_the_whole_gradient_passes_at_a_ratio_of_one(adv, old, dtype):
    """torch.minimum of two equal branches would pass half of it."""
    logp = torch.tensor([-1.5], requires_grad=True, dtype=dtype)
    old = None if old is None else torch.tensor([old], dtype=dtype)
    loss, sums = dr_grpo_loss(logp, torch.tensor([adv]), denom=1, old_logp=old, clip_low=0.0, clip_high=0.0)
    loss.backward()
    assert logp.grad.item() == -adv
    assert sums.clipped_low + sums.clipped_high == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("ratio", "adv", "passes"), [(1.5, 1.0, False), (1.5, -1.0, True), (0.5, 1.0, True), (0.5, -1.0, False)]
)
def test_clipping_stops_only_what_would_go_further(ratio, adv, passes, dtype):
    logp = torch.tensor([-1.0], dtype=dtype, requires_grad=True)
    old = logp.detach() - math.log(ratio)
    loss, sums = dr_grpo_loss(logp, torch.tensor([adv]), denom=1, old_logp=old)
    loss.backward()
    assert logp.grad.item() == pytest.approx(-ratio * adv if passes else 0.0)
    assert loss.item() == pytest.approx(-adv * (ratio if passes else 1 + 0.2 * (1 if ratio > 1 else -1)))
    assert (sums.clipped_high.item(), sums.clipped_low.item()) == ((0, 0) if passes else (adv > 0, adv < 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_do_not_count_may_hold_anything(dtype):
    logp, adv, given = streams(dtype)
    weight = torch.ones(R, dtype=dtype)
    weight[:5] = 0
    keep = slice(5, None)
    want, _ = dr_grpo_loss(logp[keep], adv[keep], denom=2, old_logp=given["old_logp"][keep])
    broken = given["old_logp"].clone()
    broken[:5] = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e30])
    loss, sums = dr_grpo_loss(logp, adv, denom=2, old_logp=broken, mask=weight)
    assert loss.item() == pytest.approx(want.item())
    assert torch.autograd.grad(loss, logp)[0][:5].eq(0).all()
    assert sums.rows == R - 5
    # a ratio of e^200 meets an advantage of 0
    zero, _ = dr_grpo_loss(logp, torch.zeros(R), denom=2, old_logp=logp.detach() - 200)
    assert zero == 0
    assert torch.autograd.grad(zero, logp)[0].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_nan_is_not_lost(dtype):
    logp, adv, given = streams(dtype)
    with torch.no_grad():
        logp[1] = math.nan
    loss, sums = dr_grpo_loss(logp, adv, denom=2, sampler_logp=given["sampler_logp"])
    assert loss.isnan()
    assert sums.gap.isnan()
    assert sums.gap_max.isnan()


def test_the_library_loss_is_no_worse_than_the_formula_in_fp32():
    logp, adv, given = streams(torch.float32)

    def formula(logp, adv, old, sampler):
        ratio = (logp - old).exp()
        term = torch.minimum(ratio * adv, ratio.clamp(0.8, 1.2) * adv)
        return -((old - sampler).exp().clamp(max=2) * term).sum() / 7

    old, sampler = given["old_logp"], given["sampler_logp"]
    loss, _ = dr_grpo_loss(logp, adv, denom=7, old_logp=old, sampler_logp=sampler, is_cap=2)
    wide = logp.detach().double().requires_grad_()
    exact = torch.autograd.grad(formula(wide, adv.double(), old.double(), sampler.double()), wide)[0]
    plain = torch.autograd.grad(formula(logp, adv, old, sampler), logp)[0]
    assert_no_worse(torch.autograd.grad(loss, logp)[0], exact, plain)


def test_no_tokens_give_a_loss_of_zero():
    for dtype in (torch.float32, torch.float64):
        none = torch.zeros(0, requires_grad=True, dtype=dtype)
        kept = none.detach()
        loss, sums = dr_grpo_loss(none, kept, denom=1, old_logp=kept, sampler_logp=kept, ref_logp=kept, beta=0.1)
        loss.backward()
        assert loss == 0
        assert {x.item() for x in sums} == {0.0}


def test_live_rows_are_those_that_add_something():
    adv, mask = torch.tensor([0.0, 1.0, -2.0, 0.0, 3.0]), torch.tensor([1, 1, 0, 0, 1])
    assert plan_rows(mask, adv).index.tolist() == [1, 4]
    assert plan_rows(None, adv).index.tolist() == [1, 2, 4]
    assert plan_rows(mask, adv, beta=0.1).index.tolist() == plan_rows(mask, adv, 0, 0.1).index.tolist() == [0, 1, 4]
    assert plan_rows(None, torch.ones(3)) == (None, 3)
    assert plan_rows(None, torch.zeros(3)).num == 0


ONE = torch.ones(3)
WRONG = [
    ({"denom": 0}, "denom must be a positive number, got 0"),
    ({"denom": -1.0}, r"denom must be a positive number, got -1\.0"),
    ({"denom": math.nan}, "denom must be a positive number, got nan"),
    ({"advantages": torch.ones(4)}, r"advantages has shape \(4,\), logp \(3,\)"),
    ({"old_logp": ONE.bfloat16()}, r"old_logp must be float32 \(or float64\), got torch\.bfloat16"),
    ({"logp": ONE.half()}, r"logp must be float32 \(or float64\), got torch\.float16"),
    ({"mask": ONE.to("meta")}, "mask is on meta, logp on cpu"),
    ({"beta": 0.1}, r"beta 0\.1 needs ref_logp; got None"),
    ({"is_cap": 2.0}, r"is_cap 2\.0 needs sampler_logp; got None"),
    ({"entropy_coef": 0.1}, r"entropy_coef 0\.1 needs entropy; got None"),
    ({"dual_clip": 1.0}, r"dual_clip must exceed 1, got 1\.0"),
    ({"clip_low": 1.5}, r"clip_low must lie in \[0, 1\] and clip_high be at least 0, got 1\.5 and 0\.2"),
]


@pytest.mark.parametrize(("change", "line"), WRONG, ids=[next(iter(change)) for change, _ in WRONG])
def test_impossible_arguments_are_refused_with_both_values(change, line):
    given = {"logp": ONE, "advantages": ONE, "denom": 1} | change
    with pytest.raises(ValueError, match=line):
        dr_grpo_loss(**given)


def test_there_is_no_default_denominator():
    with pytest.raises(TypeError, match="denom"):
        dr_grpo_loss(ONE, ONE)
