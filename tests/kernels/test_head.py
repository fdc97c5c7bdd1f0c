import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_no_worse, assert_same
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.head import with_peak
from thinkmid.kernels import dr_grpo_loss, fused_linear_dr_grpo, head, launch, linear_cross_entropy, linear_logprob

DOUBLE, FLOAT = torch.float64, torch.float32


def naive(hidden, weight, targets, temperature=1.0, bias=None, softcap=None):
    """log_softmax of all logits; entropy with 0 log 0 = 0."""
    z = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    z = z if softcap is None else softcap * (z / softcap).tanh()
    z = z / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature)
    logp = z.log_softmax(-1)
    return logp[torch.arange(len(targets)), targets], torch.special.entr(logp.exp()).sum(-1)


def inputs(rows, vocab, width=7, dtype=DOUBLE):
    hidden, weight = torch.randn(rows, width, dtype=DOUBLE), torch.randn(vocab, width, dtype=DOUBLE)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), torch.randint(vocab, (rows,))


def streams(rows, dtype=DOUBLE):
    """Per-row inputs of the policy: a third of the advantages and a quarter of the mask are 0."""
    adv, mask = torch.randn(rows, dtype=DOUBLE), torch.rand(rows, dtype=DOUBLE)
    adv[::3], mask[::4] = 0, 0
    given = {"adv": adv, "mask": mask} | {
        f"{n}_logp": -3 * torch.rand(rows, dtype=DOUBLE) for n in ("old", "sampler", "ref")
    }
    given = {n: x.to(dtype) for n, x in given.items()}
    return given.pop("adv"), given


def with_gradients(fn, hidden, weight, dlogp, dentropy):
    logp, entropy = fn(hidden, weight)
    dhidden, dweight = torch.autograd.grad((logp * dlogp).sum() + (entropy * dentropy).sum(), (hidden, weight))
    return {"logp": logp.detach(), "entropy": entropy.detach(), "dhidden": dhidden, "dweight": dweight}


# linear_logprob


@pytest.mark.parametrize("return_entropy", [False, True], ids=["logp", "entropy too"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("temperature", [0.7, "of rows"])
def test_gradients_are_those_of_finite_differences(temperature, softcap, return_entropy):
    hidden, weight, targets = inputs(7, 11, width=5)
    targets[3] = -100
    temperature = torch.rand(7, dtype=DOUBLE) + 0.5 if temperature == "of rows" else temperature
    options = {"temperature": temperature, "softcap": softcap, "return_entropy": return_entropy, "chunk": 3}
    bias = torch.randn(11, dtype=DOUBLE, requires_grad=True)
    fn = lambda h, w, b: linear_logprob(h, w, targets, bias=b, **options)  # noqa: E731
    assert torch.autograd.gradcheck(fn, (hidden, weight, bias))


@pytest.mark.parametrize(("rows", "vocab"), [(1, 2), (15, 31), (16, 32), (17, 33), (101, 127)])
@pytest.mark.parametrize("chunk", [1, 16, 17, 10_000, "auto"])
def test_any_chunk_gives_the_log_softmax_and_the_entropy(rows, vocab, chunk):
    hidden, weight, targets = inputs(rows, vocab)
    dlogp, dentropy = torch.randn(2, rows, dtype=DOUBLE)

    def fn(hidden, weight):
        return linear_logprob(hidden, weight, targets, temperature=1.3, return_entropy=True, chunk=chunk)

    ours = with_gradients(fn, hidden, weight, dlogp, dentropy)
    assert_same(ours, with_gradients(lambda h, w: naive(h, w, targets, 1.3), hidden, weight, dlogp, dentropy))


def test_one_of_the_two_results_may_go_unused():
    hidden, weight, targets = inputs(19, 11)
    for used in (0, 1):
        grads = [
            torch.autograd.grad(result[used].square().sum(), (hidden, weight))
            for result in (linear_logprob(hidden, weight, targets, return_entropy=True), naive(hidden, weight, targets))
        ]
        assert_same(*({"dhidden": h, "dweight": w} for h, w in grads))
    assert linear_logprob(hidden, weight, targets).shape == (19,)


@pytest.mark.parametrize("dtype", [DOUBLE, FLOAT])
def test_ignored_rows_read_zero_and_cost_nothing(dtype, monkeypatch):
    hidden, weight, targets = inputs(19, 11, dtype=dtype)
    targets[::2] = -100
    seen = []
    scores = head._scores
    monkeypatch.setattr(head, "_scores", lambda h, *rest: (seen.append(len(h)), scores(h, *rest))[1])
    logp, entropy = linear_logprob(hidden, weight, targets, return_entropy=True)
    assert seen == [9]
    kept, kept_entropy = naive(hidden[1::2], weight, targets[1::2])
    for ours, some in ((logp, kept), (entropy, kept_entropy)):
        assert ours[::2].eq(0).all()
        torch.testing.assert_close(ours[1::2], some)
    dhidden = torch.autograd.grad((logp + entropy).sum(), hidden)[0]
    assert dhidden[::2].eq(0).all()
    assert dhidden[1::2].ne(0).all()


def test_no_rows_give_zero_gradients():
    hidden, weight, targets = inputs(0, 11)
    logp, entropy = linear_logprob(hidden, weight, targets, return_entropy=True)
    dhidden, dweight = torch.autograd.grad(logp.sum() + entropy.sum(), (hidden, weight))
    assert logp.shape == entropy.shape == (0,)
    assert dhidden.shape == (0, 7)
    assert torch.equal(dweight, torch.zeros(11, 7, dtype=DOUBLE))


@pytest.mark.parametrize("rows", [1, 33, 150])
def test_a_weight_larger_than_the_cache_is_no_worse(rows):
    hidden, weight, targets = inputs(rows, 9001, width=600, dtype=FLOAT)
    with torch.no_grad():
        weight *= 0.1
    assert weight.nbytes > head.CACHE_BYTES
    dlogp, zero = torch.randn(rows), torch.zeros(rows)
    ours, plain = (
        with_gradients(fn, hidden, weight, dlogp, zero)
        for fn in (
            lambda h, w: linear_logprob(h, w, targets, return_entropy=True, chunk=48),
            lambda h, w: naive(h, w, targets),
        )
    )
    double = (x.detach().double().requires_grad_() for x in (hidden, weight))
    exact = with_gradients(lambda h, w: naive(h, w, targets), *double, dlogp.double(), zero.double())
    for name in ("dhidden", "dweight"):
        assert_no_worse(ours[name], exact[name], plain[name])
    assert (ours["logp"] - exact["logp"]).abs().max() < 2e-5


@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["flat", "peaked"])
def test_values_and_gradients_are_no_worse_than_log_softmax(dtype, scale, monkeypatch):
    monkeypatch.setattr(head, "SLAB", 50)
    hidden, weight, targets = inputs(211, 127, width=64, dtype=dtype)
    with torch.no_grad():
        weight *= scale / 8
    dlogp, dentropy = torch.randn(211), torch.randn(211)

    def wide(h, w):
        logits = (h @ w.T).float()  # what a careful user of log_softmax writes
        logp = logits.log_softmax(-1)
        return logp[torch.arange(211), targets], -(logp.exp() * logp).sum(-1)

    ours = with_gradients(
        lambda h, w: linear_logprob(h, w, targets, return_entropy=True, chunk=16), hidden, weight, dlogp, dentropy
    )
    plain = with_gradients(wide, hidden, weight, dlogp, dentropy)
    double = (x.detach().double().requires_grad_() for x in (hidden, weight))
    exact = with_gradients(lambda h, w: naive(h, w, targets), *double, dlogp, dentropy)
    for name, want in exact.items():
        assert ours[name].dtype == (FLOAT if name in ("logp", "entropy") else dtype)
        assert_no_worse(ours[name], want, plain[name])
    # statistics of half-precision inputs are fp32's, not half precision's
    assert (ours["logp"].double() - exact["logp"]).abs().max() < 1e-4


def test_autocast_does_not_round_the_logits():
    hidden, weight, targets = inputs(19, 11, dtype=FLOAT)
    want = linear_logprob(hidden, weight, targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_logprob(hidden, weight, targets), want)


@pytest.mark.parametrize("return_entropy", [False, True], ids=["logp", "entropy too"])
def test_scores_from_tiles_are_those_of_the_logits(return_entropy, monkeypatch):
    hidden, weight, targets = (x.detach() for x in inputs(19, 70, dtype=FLOAT))
    targets[::3] = -100
    options = {"temperature": 0.7, "softcap": 3.0, "return_entropy": return_entropy}
    want = linear_logprob(hidden, weight, targets, **options)
    with pytest.raises(ValueError, match=r'chunk="tiles" is a kernel for GPUs, got torch.float32 on cpu'):
        linear_logprob(hidden, weight, targets, chunk="tiles")
    monkeypatch.setattr(launch, "row_path", lambda x: "triton")  # which the interpreter runs here
    torch.testing.assert_close(linear_logprob(hidden, weight, targets, **options, chunk="tiles"), want)
    with pytest.raises(ValueError, match="has no gradient, and these inputs require one"):
        linear_logprob(hidden.requires_grad_(), weight, targets, chunk="tiles")


# fused_linear_dr_grpo


OPTIONS = {"denom": 6.0, "is_cap": 1.3, "beta": 0.2, "clip_low": 0.1, "clip_high": 0.3, "dual_clip": 2.0}


@pytest.mark.parametrize("chunk", [1, 5, 6, "auto"])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.3])
@pytest.mark.parametrize("absent", [set(), {"old_logp"}, {"sampler_logp", "mask"}, {"ref_logp"}], ids=str)
def test_one_pass_is_log_prob_then_loss(absent, entropy_coef, chunk):
    hidden, weight, targets = inputs(17, 23)
    bias = torch.randn(23, dtype=DOUBLE, requires_grad=True)
    targets[5] = -100
    adv, given = streams(17)
    given = {n: x for n, x in given.items() if n not in absent}
    options = OPTIONS | {"entropy_coef": entropy_coef}
    if "sampler_logp" in absent:
        options["is_cap"] = None
    if "ref_logp" in absent:
        options["beta"] = 0.0
    scores = {"temperature": 0.8, "bias": bias, "softcap": 3.0}
    fused = fused_linear_dr_grpo(
        hidden, weight, targets, adv, **given, **options, **scores, chunk=chunk, return_entropy=True
    )
    logp, entropy = naive(hidden, weight, targets.clamp(min=0), **scores)
    mask = given.pop("mask", torch.ones(17, dtype=DOUBLE)) * (targets >= 0)
    loss, metrics = dr_grpo_loss(logp, adv, **given, **options, mask=mask, entropy=entropy)
    both = [torch.autograd.grad(x, (hidden, weight, bias)) for x in (fused.loss, loss)]
    assert_same(
        *({**dict(zip("hwb", g, strict=True)), "loss": x} for g, x in zip(both, (fused.loss, loss), strict=True))
    )
    live = (mask != 0) & (adv != 0) if not (options["beta"] or entropy_coef) else mask != 0
    for ours, want in ((fused.logp, logp), (fused.entropy, entropy)):
        assert_same({"x": ours}, {"x": torch.where(live, want, 0).detach()})
    if live.equal(mask != 0):
        assert_same(fused.metrics._asdict(), metrics._asdict())


@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 20.0], ids=["flat", "peaked"])
def test_one_pass_is_no_worse_than_autograd_through_log_softmax(dtype, scale):
    hidden, weight, targets = inputs(211, 1031, width=64, dtype=dtype)
    with torch.no_grad():
        weight *= scale / 8
    adv, given = streams(211, FLOAT)
    options = {"denom": 50.0, "is_cap": 1.3, "entropy_coef": 0.1}

    def plain(h, w, wide):
        kept = {n: given[n].to(wide) for n in ("old_logp", "sampler_logp", "mask")}
        logp, entropy = naive(h, w, targets) if wide == DOUBLE else wide_naive(h, w)
        return dr_grpo_loss(logp, adv.to(wide), **kept, **options, entropy=entropy)[0]

    def wide_naive(h, w):
        logp = (h @ w.T).float().log_softmax(-1)
        return logp[torch.arange(211), targets], -(logp.exp() * logp).sum(-1)

    double = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    given["old_logp"] = naive(*double, targets)[0].detach().float() + 0.2 * torch.randn(211)
    given["sampler_logp"] = given["old_logp"] + 0.2 * torch.randn(211)
    kept = {n: given[n] for n in ("old_logp", "sampler_logp", "mask")}
    ours = fused_linear_dr_grpo(hidden, weight, targets, adv, **kept, **options, chunk=64).loss
    exact = torch.autograd.grad(plain(*double, DOUBLE), double)
    other = torch.autograd.grad(plain(hidden, weight, FLOAT), (hidden, weight))
    for mine, want, theirs in zip(torch.autograd.grad(ours, (hidden, weight)), exact, other, strict=True):
        assert mine.dtype == dtype
        assert_no_worse(mine, want, theirs)


def fused_gradients(hidden, weight, targets, adv, **options):
    loss = fused_linear_dr_grpo(hidden, weight, targets, adv, denom=7, **options).loss
    return torch.autograd.grad(loss, (hidden, weight))


def test_dead_rows_change_nothing_to_the_last_bit():
    """In or out, wherever they stand, masked, ignored or without advantage: the live rows' gradients stay."""
    hidden, weight, targets = inputs(24, 130, dtype=FLOAT)
    adv, _ = streams(24, FLOAT)
    live = adv != 0
    alone = fused_gradients(*(x[live] for x in (hidden,)), weight, targets[live], adv[live])
    dhidden, dweight = fused_gradients(hidden, weight, targets, adv)
    assert torch.equal(dweight, alone[1])
    assert torch.equal(dhidden[live], alone[0])
    assert dhidden[~live].eq(0).all()
    masked = fused_gradients(hidden, weight, targets, torch.where(live, adv, 5.0), mask=live)
    ignored = fused_gradients(hidden, weight, targets.where(live, -100), torch.where(live, adv, 5.0))
    for same in (masked, ignored):
        assert torch.equal(same[1], dweight)
        assert torch.equal(same[0], dhidden)
    kept = fused_gradients(hidden, weight, targets, adv, skip_zero_advantage=False)
    torch.testing.assert_close(kept[1], dweight)


def test_the_order_of_rows_and_tokens_outside_the_vocabulary_do_not_matter():
    hidden, weight, targets = inputs(24, 130, dtype=FLOAT)
    adv, _ = streams(24, FLOAT)
    dhidden, dweight = fused_gradients(hidden, weight, targets, adv)
    order = torch.randperm(24)
    moved = fused_gradients(hidden[order], weight, targets[order], adv[order])
    torch.testing.assert_close(moved[0], dhidden[order])
    torch.testing.assert_close(moved[1], dweight)
    padded, bias = F.pad(weight, (0, 0, 0, 14)), F.pad(torch.zeros(130), (0, 14), value=-math.inf)
    wider = fused_gradients(hidden, padded, targets, adv, bias=bias)
    torch.testing.assert_close(wider[0], dhidden)
    assert wider[1][130:].eq(0).all()


def test_the_first_update_has_a_ratio_of_exactly_one():
    hidden, weight, targets = inputs(33, 57, dtype=FLOAT)
    adv = torch.randn(33)
    loss, metrics, logp, entropy = fused_linear_dr_grpo(hidden, weight, targets, adv, denom=3)
    assert metrics.ratio == metrics.rows == 33
    assert loss.item() == pytest.approx(-(adv.double().sum() / 3).item())
    assert entropy is None
    assert not logp.requires_grad
    torch.testing.assert_close(logp, naive(hidden, weight, targets)[0].detach())


def test_nothing_live_is_a_loss_of_zero_that_still_reaches_the_weights():
    """So that every rank of FSDP2 or DDP takes part in the gradients' collectives."""
    for dtype in (FLOAT, DOUBLE, torch.bfloat16):
        hidden, weight, targets = inputs(9, 11, dtype=dtype)
        for adv, y in ((torch.zeros(9), targets), (torch.ones(9), targets.fill_(-100))):
            loss, metrics, logp, _ = fused_linear_dr_grpo(hidden, weight, y, adv, denom=3)
            grads = torch.autograd.grad(loss, (hidden, weight))
            assert (loss.item(), metrics.rows.item()) == (0, 0)
            assert all(g.eq(0).all() for g in (*grads, logp))


def test_the_gradient_of_a_weight_can_be_added_where_it_is_kept():
    hidden, weight, targets = inputs(33, 57, dtype=FLOAT)
    adv, main_grad = torch.randn(33), torch.randn(57, 7)
    before = main_grad.clone()
    dhidden, dweight = fused_gradients(hidden, weight, targets, adv, chunk=8)
    loss = fused_linear_dr_grpo(hidden, weight, targets, adv, denom=7, chunk=8, weight_grad_into=main_grad).loss
    loss.backward()
    assert torch.equal(hidden.grad, dhidden)
    assert weight.grad is None
    torch.testing.assert_close(main_grad - before, dweight, rtol=1e-4, atol=1e-6)
    scaled = fused_linear_dr_grpo(hidden, weight, targets, adv, denom=7, weight_grad_into=main_grad).loss * 2
    with pytest.raises(RuntimeError, match=r"now scales it by 2\.0"):
        scaled.backward()


def test_a_scaled_loss_scales_its_gradients_once():
    hidden, weight, targets = inputs(33, 57)
    adv = torch.randn(33, dtype=DOUBLE)
    once = fused_gradients(hidden, weight, targets, adv)
    loss = fused_linear_dr_grpo(hidden, weight, targets, adv, denom=7).loss
    thrice = torch.autograd.grad(loss * 3, (hidden, weight), retain_graph=True)
    assert_same(dict(zip("hw", thrice, strict=True)), dict(zip("hw", (3 * g for g in once), strict=True)))
    with pytest.raises(RuntimeError, match="backward ran twice"):
        torch.autograd.grad(loss, hidden)


class Waiting(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: numbers and sizes read from tensors."""

    def __init__(self):
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num += func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "aminmax")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss", ["policy", "text"])
def test_nothing_waits_for_the_device_where_the_caller_promises_and_the_numbers_are_the_same(loss):
    hidden, weight, targets = inputs(33, 57)
    adv, more = streams(33)

    def run(wait):
        with Waiting() as waiting:
            if loss == "policy":
                out = fused_linear_dr_grpo(hidden, weight, targets, adv, denom=7, is_cap=2, wait=wait, **policy).loss
            else:
                out = linear_cross_entropy(hidden, weight, targets, row_weights=more["mask"], denom=7, wait=wait)[0]
            grads = torch.autograd.grad(out, (hidden, weight))
        return waiting.num, dict(zip(("loss", "h", "w"), (out.detach(), *grads), strict=True))

    policy = {name: more[name] for name in ("mask", "old_logp", "sampler_logp")}
    (none, ours), (some, exact) = run(False), run(True)
    assert (none, some) == (0, 3)
    assert_same(ours, exact)
    with Waiting() as waiting:
        logp = linear_logprob(hidden, weight, targets, wait=False)
    assert waiting.num == 0
    assert torch.equal(logp, linear_logprob(hidden, weight, targets))


@pytest.mark.parametrize("loss", ["policy", "text"])
def test_rows_that_the_caller_knows_are_those_that_would_be_found_to_the_last_bit(loss):
    hidden, weight, targets = inputs(33, 57, dtype=FLOAT)
    adv, more = streams(33, FLOAT)
    mask = more["mask"]

    def run(**known):
        with Waiting() as waiting:
            if loss == "policy":
                options = {"mask": mask, "skip_zero_advantage": False, **known}
                out, _, logp, _ = fused_linear_dr_grpo(hidden, weight, targets, adv, denom=7, **options)
            else:
                out, logp = linear_cross_entropy(hidden, weight, targets, row_weights=mask, denom=7, **known)
            grads = torch.autograd.grad(out, (hidden, weight))
        return waiting.num, (out.detach(), logp, *grads)

    live = torch.tensor([i for i in range(33) if i % 4])
    none, ours = run(live=live, wait=False)
    _, exact = run()
    assert none == 0
    assert all(torch.equal(a, b) for a, b in zip(ours, exact, strict=True))
    assert exact[1][::4].eq(0).all()


def test_a_promise_not_to_scale_the_loss_is_kept_or_fails():
    hidden, weight, targets = inputs(33, 57)
    loss = fused_linear_dr_grpo(hidden, weight, targets, torch.randn(33, dtype=DOUBLE), denom=7, wait=False).loss
    with pytest.raises(RuntimeError, match="backward does not scale the loss"):
        (loss / 2).backward()


def test_gradients_become_those_of_the_parameters_without_a_copy():
    hidden, weight, targets = inputs(33, 57, dtype=FLOAT)
    loss = fused_linear_dr_grpo(hidden, weight, targets, torch.randn(33), denom=7).loss
    held = {g.data_ptr() for g in loss.grad_fn.grads if g is not None}
    loss.backward()
    assert {hidden.grad.data_ptr(), weight.grad.data_ptr()} == held


def test_without_gradients_the_products_of_the_backward_are_left_out(monkeypatch):
    hidden, weight, targets = inputs(33, 57, dtype=FLOAT)
    adv = torch.randn(33)
    want = fused_linear_dr_grpo(hidden, weight, targets, adv, denom=7)
    monkeypatch.setattr(head, "_add_product", None)
    frozen = fused_linear_dr_grpo(hidden, weight.detach(), targets, adv, denom=7)
    assert frozen.loss.requires_grad
    monkeypatch.setattr(head, "_times_weight", None)
    with torch.no_grad():
        loss, metrics, logp, _ = fused_linear_dr_grpo(hidden, weight, targets, adv, denom=7)
    torch.testing.assert_close((loss, *metrics, logp), (want.loss.detach(), *want.metrics, want.logp))


def test_logits_of_one_chunk_are_all_that_is_alive():
    hidden, weight, targets = inputs(512, 2000, width=8, dtype=FLOAT)
    adv = torch.randn(512)
    peaks = []
    for rows in (128, 512):
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            loss = fused_linear_dr_grpo(hidden[:rows], weight, targets[:rows], adv[:rows], denom=7, chunk=16).loss
        allocated = [e.self_cpu_memory_usage for e in profile.events() if e.name == "aten::empty"]
        peaks.append(max(allocated))
        assert loss.requires_grad
    assert max(peaks) <= 16 * 2000 * 4 + 1024
    call = lambda: [fused_linear_dr_grpo(hidden, weight, targets, adv, denom=7, chunk=16).loss]  # noqa: E731
    chunk, gradients = 16 * 2000 * 4, weight.nbytes + hidden.nbytes
    # all 32 chunks' logits, had they stayed, would be 4 MB
    assert with_peak(call, hidden.device)[1] <= gradients + 1.5 * chunk


# linear_cross_entropy


@pytest.mark.parametrize("chunk", [5, "auto"])
def test_cross_entropy_is_that_of_the_logits(chunk):
    hidden, weight, targets = inputs(19, 23)
    targets[::5] = -100
    loss, logp = linear_cross_entropy(hidden, weight, targets, chunk=chunk, temperature=0.7)
    want = F.cross_entropy(hidden @ weight.T / 0.7, targets)
    both = [dict(zip("hw", torch.autograd.grad(x, (hidden, weight)), strict=True)) | {"x": x} for x in (loss, want)]
    assert_same(*both)
    valid = targets >= 0
    torch.testing.assert_close(-logp.sum() / valid.sum(), want.detach())


def test_cross_entropy_with_weights_of_rows_and_a_denominator():
    hidden, weight, targets = inputs(19, 23)
    weights = torch.rand(19, dtype=DOUBLE)
    weights[::4] = 0
    loss, _ = linear_cross_entropy(hidden, weight, targets, row_weights=weights, denom=5)
    want = (F.cross_entropy(hidden @ weight.T, targets, reduction="none") * weights).sum() / 5
    assert_same(
        *(dict(zip("hw", torch.autograd.grad(x, (hidden, weight)), strict=True)) | {"x": x} for x in (loss, want))
    )


# whoever calls


OPS = [
    lambda h, w, y: linear_logprob(h, w, y).sum(),
    lambda h, w, y: fused_linear_dr_grpo(h, w, y, y - 5.0, denom=3).loss,
    lambda h, w, y: linear_cross_entropy(h, w, y)[0],
]


@pytest.mark.parametrize("op", OPS, ids=["logprob", "fused", "cross entropy"])
def test_transposed_and_sliced_inputs_are_read_as_they_are(op):
    hidden, weight, targets = (x.detach() for x in inputs(9, 11, dtype=FLOAT))
    odd = [hidden.T.contiguous().T, F.pad(weight, (3, 2))[:, 3:-2], targets.repeat_interleave(2)[::2]]
    for x in (*odd[:2], hidden, weight):
        x.requires_grad_()
    assert not any(x.is_contiguous() for x in odd)
    found = [torch.autograd.grad(op(h, w, y), (h, w)) for h, w, y in (odd, (hidden, weight, targets))]
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore:Dynamo")  # csrc: the graph breaks there
@pytest.mark.parametrize("op", OPS, ids=["logprob", "fused", "cross entropy"])
def test_torch_compile_changes_no_numbers(op):
    hidden, weight, targets = inputs(9, 11, dtype=FLOAT)
    layer = torch.nn.Linear(7, 7)
    plain, compiled = (f(lambda: op(layer(hidden).tanh(), weight, targets)) for f in (copy.copy, compile_it))
    found = [torch.autograd.grad(f(), (hidden, weight, layer.weight)) for f in (plain, compiled)]
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)


def compile_it(fn):
    torch._dynamo.reset()
    return torch.compile(fn, backend="eager")


H, W, Y = torch.ones(3, 4), torch.ones(5, 4), torch.tensor([0, 1, 4])
WRONG = [
    ({"hidden": torch.ones(3, 5)}, "hidden must be (R, D) and weight (V, D), got (3, 5) and (5, 4)"),
    ({"hidden": torch.ones(1, 3, 4)}, "hidden must be (R, D) and weight (V, D), got (1, 3, 4) and (5, 4)"),
    ({"weight": W.bfloat16()}, "hidden is torch.float32, weight torch.bfloat16; both must be one floating dtype"),
    ({"weight": W.to("meta")}, "hidden is on cpu, weight on meta"),
    ({"targets": Y[:2]}, "targets must be (3,) torch.int64 cpu, got (2,) torch.int64 cpu"),
    ({"targets": Y.int()}, "targets must be (3,) torch.int64 cpu, got (3,) torch.int32 cpu"),
    ({"targets": Y + 1}, "targets must lie in [0, 5) or be ignore_index -100, got 5"),
    ({"targets": Y - 1}, "targets must lie in [0, 5) or be ignore_index -100, got -1"),
    ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
    ({"temperature": torch.ones(2)}, "temperature must be (3,) torch.float32 cpu, got (2,) torch.float32 cpu"),
    ({"bias": torch.ones(4)}, "bias must be (5,) torch.float32 cpu, got (4,) torch.float32 cpu"),
    ({"softcap": -1.0}, "softcap must be positive, got -1.0"),
    ({"chunk": 0}, 'chunk must be "auto" or a positive number of rows, got 0'),
]


@pytest.mark.parametrize(("change", "line"), WRONG, ids=[line[:40] for _, line in WRONG])
def test_impossible_arguments_are_refused_with_both_values(change, line):
    given = {"hidden": H, "weight": W, "targets": Y} | change
    for call in (
        lambda: linear_logprob(**given),
        lambda: linear_cross_entropy(**given),
        lambda: fused_linear_dr_grpo(**given, advantages=torch.ones(3), denom=1),
    ):
        with pytest.raises(ValueError, match=re.escape(line)):
            call()


def test_the_fused_loss_refuses_what_the_loss_refuses():
    with pytest.raises(TypeError, match="denom"):
        fused_linear_dr_grpo(H, W, Y, torch.ones(3))
    with pytest.raises(ValueError, match="denom must be a positive number, got 0"):
        fused_linear_dr_grpo(H, W, Y, torch.ones(3), denom=0)
    with pytest.raises(ValueError, match=r"advantages has shape \(2,\), logp \(3,\)"):
        fused_linear_dr_grpo(H, W, Y, torch.ones(2), denom=1)
    with pytest.raises(
        ValueError, match=r"weight_grad_into must be \(5, 4\) torch.float32 cpu, got \(5, 4\) torch.float64"
    ):
        fused_linear_dr_grpo(H, W, Y, torch.ones(3), denom=1, weight_grad_into=torch.zeros(5, 4, dtype=DOUBLE))
