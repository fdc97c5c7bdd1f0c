"""The head on a GPU: truth in fp64, the same bits twice, more than 2^31 scores, shards, memory."""

import pytest
import torch
import torch.distributed as dist
from conftest import assert_no_worse

from thinkmid.kernels import dr_grpo_loss, fused_linear_dr_grpo, gather_weight, linear_cross_entropy, linear_logprob
from thinkmid.kernels.head import CHUNK_BYTES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def make_inputs(num, vocab, width, dtype=torch.bfloat16):
    hidden = torch.randn(num, width, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width, device="cuda") * 2 * width**-0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocab, (num,), device="cuda")


def needs(gigabytes):
    if torch.cuda.mem_get_info()[0] < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of GPU memory")


def naive(hidden, weight, targets, *, temperature=1.0, bias=None, softcap=None):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    z = (hidden @ weight.T).to(wide)
    z = z if bias is None else z + bias.to(wide)
    z = z if softcap is None else softcap * (z / softcap).tanh()
    logps = (z / temperature).log_softmax(-1)
    return logps.gather(1, targets[:, None])[:, 0], -(logps.exp() * logps).sum(-1)


def gradients(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", ["auto", 37])
@pytest.mark.parametrize(("num", "vocab", "width"), [(1, 129, 64), (101, 1003, 72), (300, 32003, 256)])
def test_ragged_heads_give_values_and_gradients_of_fp64(num, vocab, width, dtype, chunk):
    hidden, weight, targets = make_inputs(num, vocab, width, dtype)
    bias = torch.randn(vocab, device="cuda").to(dtype).requires_grad_()
    double = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    dlogp, dentropy = torch.randn(2, num, device="cuda")

    def run(fn, h, w, b, **more):
        logp, entropy = fn(h, w, targets, temperature=0.7, bias=b, softcap=25.0, **more)
        total = (logp * dlogp.to(logp.dtype)).sum() + (entropy * dentropy.to(logp.dtype)).sum()
        return logp.detach(), entropy.detach(), *gradients(total, h, w, b)

    ours = run(linear_logprob, hidden, weight, bias, return_entropy=True, chunk=chunk)
    exact, plain = run(naive, *double), run(naive, hidden, weight, bias)
    for got, want, other in zip(ours, exact, plain, strict=True):
        assert_no_worse(got, want, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ragged_one_pass_loss_gives_the_gradients_of_fp64(dtype):
    hidden, weight, targets = make_inputs(301, 32003, 256, dtype)
    adv = torch.randn(301, device="cuda") * (torch.arange(301, device="cuda") % 3 != 0)
    with torch.no_grad():
        now = naive(hidden.double(), weight.double(), targets)[0]
    old = (now + torch.where(torch.rand_like(now) < 0.5, 0.06, 0.6) * torch.randn_like(now).sign()).float()

    def plain(h, w):
        logp = naive(h, w, targets)[0]
        a, o = adv.to(logp.dtype), old.to(logp.dtype)
        ratio = (logp - o).exp()
        return -torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a).sum() / 77

    ours = fused_linear_dr_grpo(hidden, weight, targets, adv, denom=77.0, old_logp=old, chunk=64).loss
    double = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact, other = gradients(plain(*double), *double), gradients(plain(hidden, weight), hidden, weight)
    for got, want, naive_grad in zip(gradients(ours, hidden, weight), exact, other, strict=True):
        assert_no_worse(got, want, naive_grad)


def test_one_pass_and_log_prob_then_loss_agree_with_everything_on():
    hidden, weight, targets = make_inputs(515, 32003, 256)
    adv, sampler = torch.randn(515, device="cuda"), -3 - torch.rand(515, device="cuda")
    mask = torch.rand(515, device="cuda") < 0.8
    policy = {"denom": 64.0, "old_logp": sampler, "sampler_logp": sampler + 0.1, "is_cap": 1.05, "ref_logp": sampler,
              "beta": 0.1, "dual_clip": 3.0, "entropy_coef": 0.01, "mask": mask}  # fmt: skip
    fused = fused_linear_dr_grpo(hidden, weight, targets, adv, temperature=0.9, **policy)
    logp, entropy = linear_logprob(hidden, weight, targets, temperature=0.9, return_entropy=True)
    loss, metrics = dr_grpo_loss(logp, adv, entropy=entropy, **policy)
    torch.testing.assert_close(fused.loss, loss, rtol=1e-5, atol=1e-6)
    for mine, other in zip(fused.metrics, metrics, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    for mine, other in zip(gradients(fused.loss, hidden, weight), gradients(loss, hidden, weight), strict=True):
        # both are rounded to bf16 once
        assert (mine - other).float().norm() <= 2**-7 * other.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_give_the_same_bits(dtype):
    hidden, weight, targets = make_inputs(1037, 32003, 512, dtype)
    adv, old = torch.randn(1037, device="cuda"), -5 - torch.rand(1037, device="cuda")

    def run():
        done = fused_linear_dr_grpo(hidden, weight, targets, adv, denom=64.0, old_logp=old, entropy_coef=0.01)
        logp, entropy = linear_logprob(hidden, weight, targets, return_entropy=True)
        grads = gradients((logp * adv).sum() + entropy.sum(), hidden, weight)
        return [done.loss, *done.metrics, *gradients(done.loss, hidden, weight), logp, entropy, *grads]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_rows_past_two_to_the_31_scores_are_those_of_a_small_call():
    """17,000 rows of 128,256 scores in one chunk: 32-bit offsets would wrap at row 16,744."""
    needs(24)
    hidden, weight, targets = make_inputs(17_000, 128_256, 64)
    adv = torch.randn(17_000, device="cuda")
    last = slice(16_900, None)
    whole = fused_linear_dr_grpo(hidden, weight, targets, adv, denom=1.0, chunk=17_000)
    (dhidden,) = gradients(whole.loss, hidden)
    small = fused_linear_dr_grpo(hidden[last], weight, targets[last], adv[last], denom=1.0)
    (dsmall,) = gradients(small.loss, hidden)
    torch.testing.assert_close(whole.logp[last], small.logp, rtol=1e-5, atol=1e-5)
    assert (dhidden[last] - dsmall[last]).float().norm() <= 2**-7 * dsmall.float().norm()


def test_a_sharded_weight_is_gathered_and_its_gradient_is_a_shard(tmp_path):
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    mesh = init_device_mesh("cuda", (1,))
    hidden, weight, targets = make_inputs(65, 1003, 64)
    sharded = distribute_tensor(weight.detach(), mesh, [Shard(0)]).requires_grad_()
    adv = torch.randn(65, device="cuda")
    plain = fused_linear_dr_grpo(hidden, weight, targets, adv, denom=9.0).loss
    ours = fused_linear_dr_grpo(hidden, gather_weight(sharded), targets, adv, denom=9.0).loss
    dh, dw = gradients(ours, hidden, sharded)
    want = gradients(plain, hidden, weight)
    assert isinstance(dw, DTensor)
    assert torch.equal(dh, want[0])
    assert torch.equal(dw.full_tensor(), want[1])


@pytest.mark.parametrize("what", ["one pass", "log-prob", "cross-entropy", "scoring"])
def test_memory_stays_within_a_chunk_and_the_fp32_gradient(what):
    """Scores of a chunk in fp32, their gradient in bf16, dweight in fp32 and its rounding, streams of the rows."""
    needs(16)
    num, vocab, width = 16_384, 128_256, 2048
    hidden, weight, targets = make_inputs(num, vocab, width)
    adv = torch.randn(num, device="cuda")

    def run():
        if what == "scoring":
            with torch.no_grad():
                return linear_logprob(hidden, weight, targets)
        if what == "one pass":
            loss = fused_linear_dr_grpo(hidden, weight, targets, adv, denom=1.0).loss
        elif what == "cross-entropy":
            loss = linear_cross_entropy(hidden, weight, targets)[0]
        else:
            loss = dr_grpo_loss(linear_logprob(hidden, weight, targets), adv, denom=1.0)[0]
        return gradients(loss, hidden, weight)

    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = run()
    extra = torch.cuda.max_memory_allocated() - before
    del out
    learned = 0 if what == "scoring" else 4 * vocab * width + weight.nbytes + 2 * hidden.nbytes
    scores = CHUNK_BYTES["cuda"] * (1 if what == "scoring" else 1.5)
    assert extra <= 1.05 * (scores + learned) + (128 << 20)
    assert extra < 4 * num * vocab  # naive holds the whole matrix of scores three times


@pytest.mark.parametrize("what", ["scoring", "policy", "text"])
def test_nothing_waits_for_the_device_where_the_caller_promises(what):
    hidden, weight, targets = make_inputs(301, 32003, 256)
    adv = torch.randn(301, device="cuda")

    def run():
        if what == "scoring":
            return linear_logprob(hidden, weight, targets, wait=False)
        if what == "policy":
            loss = fused_linear_dr_grpo(hidden, weight, targets, adv, denom=3.0, mask=adv.abs(), wait=False).loss
        else:
            loss = linear_cross_entropy(hidden, weight, targets, row_weights=adv, denom=3.0, wait=False)[0]
        return gradients(loss, hidden, weight)

    run()  # kernels are compiled, numbers of the policy kept on the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_gradient_buffer_of_the_caller_is_added_to():
    hidden, weight, targets = make_inputs(129, 1003, 64)
    adv = torch.randn(129, device="cuda")
    buffer = torch.ones(1003, 64, device="cuda")
    loss = fused_linear_dr_grpo(hidden, weight, targets, adv, denom=3.0, weight_grad_into=buffer).loss
    loss.backward()
    (want,) = gradients(fused_linear_dr_grpo(hidden.detach(), weight, targets, adv, denom=3.0).loss, weight)
    assert weight.grad is None
    assert ((buffer - 1) - want.float()).norm() <= 2**-7 * want.float().norm()
