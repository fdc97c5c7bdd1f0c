"""The model's ops, the policy's loss and attention on a GPU, against the reference in fp64."""

from itertools import pairwise

import pytest
import torch
from conftest import assert_no_worse

from thinkmid import kernels
from thinkmid.kernels import ref

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DTYPES = [torch.float32, torch.bfloat16]


def results(fn, inputs, learn):
    """Outputs and gradients, each output weighted by fixed numbers."""
    leaves = [x.detach().requires_grad_() if flag else x for x, flag in zip(inputs, learn, strict=True)]
    outs = fn(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    given = [torch.linspace(-1, 1, o.numel(), device=o.device).view_as(o).to(o.dtype) for o in outs]
    wanted = [x for x, flag in zip(leaves, learn, strict=True) if flag]
    return [*(o.detach() for o in outs), *torch.autograd.grad(outs, wanted, given)]


def compare(ours, plain, inputs, learn):
    double = [x.double() if x.is_floating_point() else x for x in inputs]
    got, want, other = results(ours, inputs, learn), results(plain, double, learn), results(plain, inputs, learn)
    for mine, exact, naive in zip(got, want, other, strict=True):
        assert_no_worse(mine, exact, naive)
    for first, second in zip(got, results(ours, inputs, learn), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num", "width"), [(1, 1), (3, 127), (65, 1024), (257, 4096), (7, 8195)])
@pytest.mark.parametrize("residual", [False, True])
def test_ragged_rms_norm_is_that_of_fp64_and_repeats(num, width, dtype, residual):
    inputs = [torch.randn(num, width, device="cuda").to(dtype), torch.randn(width, device="cuda").to(dtype)]
    inputs += [torch.randn(num, width, device="cuda").to(dtype)] * residual

    def of(op):
        return lambda x, w, r=None: op(x, w, 1e-6, r)

    compare(of(kernels.rms_norm), of(ref.rms_norm), inputs, [True] * len(inputs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num", "heads", "size"), [(1, 1, 2), (37, 3, 64), (129, 32, 128), (5, 7, 96)])
def test_ragged_rope_is_that_of_fp64_and_repeats(num, heads, size, dtype):
    angle = 6 * torch.rand(num, size // 2, device="cuda")
    x = torch.randn(num, heads, size, device="cuda").to(dtype)
    compare(kernels.apply_rope, ref.apply_rope, [x, angle.cos(), angle.sin()], [True, False, False])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1023), (129, 4096), (7, 14336)])
def test_ragged_swiglu_is_that_of_fp64_and_repeats(shape, dtype):
    gate, up = (torch.randn(*shape, device="cuda").to(dtype) for _ in range(2))
    compare(kernels.swiglu, ref.swiglu, [gate, up], [True, True])


@pytest.mark.parametrize("num", [1, 1023, 4097, 100_003])
def test_ragged_policy_loss_is_that_of_the_cpu_in_fp64_and_repeats(num):
    logp, old, sampler, against = (-2 + torch.randn(num) for _ in range(4))
    adv, entropy = torch.randn(num), torch.rand(num)
    options = {"denom": 31.0, "is_cap": 1.5, "beta": 0.1, "dual_clip": 3.0, "entropy_coef": 0.01}

    def run(cast):
        leaf = cast(logp).requires_grad_()
        named = {"old_logp": old, "sampler_logp": sampler, "ref_logp": against, "entropy": entropy}
        loss, metrics = kernels.dr_grpo_loss(
            leaf, cast(adv), mask=cast(torch.ones(num)), **{k: cast(v) for k, v in named.items()}, **options
        )
        return [*torch.autograd.grad(loss, leaf), torch.stack([loss.detach(), *metrics])]

    ours, again = run(lambda x: x.cuda()), run(lambda x: x.cuda())
    exact = run(lambda x: x.double())
    torch.testing.assert_close(ours[0].double().cpu(), exact[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[1].double().cpu(), exact[1], rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_ragged_attention_with_a_shared_prefix_is_that_of_fp64(kv_heads, dtype):
    """A prefix of 33 tokens and replies of 1, 70 and 129, each attending to the prefix and itself; bf16 repeats."""
    prefix, replies, heads, size = 33, (1, 70, 129), 8, 64
    starts = torch.tensor([prefix, *replies]).cumsum(0)
    own = [torch.arange(a, b) for a, b in pairwise(starts.tolist())]
    rows = [torch.arange(prefix), *(torch.cat([torch.arange(prefix), x]) for x in own)]
    cu_q = torch.cat([torch.zeros(1, dtype=torch.long), starts]).int()
    cu_k = torch.tensor([0, *(len(r) for r in rows)]).cumsum(0).int()
    kv_rows = torch.cat(rows).cuda()
    total = int(starts[-1])
    q = torch.randn(total, heads, size, device="cuda").to(dtype)
    k, v = (torch.randn(total, kv_heads, size, device="cuda").to(dtype) for _ in range(2))

    def plain(q, k, v):
        outs, k, v = [], k[kv_rows], v[kv_rows]
        for q0, q1, k0, k1 in zip(*(c.tolist() for c in (cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:])), strict=True):
            q_s = q[q0:q1].transpose(0, 1)
            k_s, v_s = (x[k0:k1].transpose(0, 1).repeat_interleave(heads // kv_heads, 0) for x in (k, v))
            future = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool, device="cuda").triu(k1 - k0 - q1 + q0 + 1)
            scores = (q_s @ k_s.transpose(1, 2)).to(torch.promote_types(q.dtype, torch.float32)) / size**0.5
            outs.append((scores.masked_fill(future, -torch.inf).softmax(-1).to(v.dtype) @ v_s).transpose(0, 1))
        return torch.cat(outs)

    inputs, learn = [q, k, v], [True] * 3
    cu_q, cu_k = cu_q.cuda(), cu_k.cuda()
    got, again = (
        results(lambda q, k, v: kernels.varlen_attention(q, k, v, cu_q, cu_k, kv_rows), inputs, learn) for _ in range(2)
    )
    assert dtype == torch.float32 or all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    want, other = results(plain, [x.double() for x in inputs], learn), results(plain, inputs, learn)
    for mine, exact, naive in zip(got, want, other, strict=True):
        # by norm: the keys of a prefix sum over all replies and heads, and the largest error is one such sum's luck
        assert (mine.double() - exact).norm() <= 2 * (naive.double() - exact).norm()
