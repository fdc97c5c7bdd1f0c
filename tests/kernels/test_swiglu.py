import pytest
import torch
import torch.nn.functional as F
from conftest import assert_no_worse
from twins import assert_rounded_once, assert_twin, isa, run  # noqa: F401

from thinkmid.kernels import apply_rope, ref, rms_norm, swiglu


@pytest.mark.parametrize("shape", [(1,), (7,), (31,), (3, 16), (5, 17), (37, 65), (300, 129)], ids=str)
def test_every_instruction_set_is_no_worse_than_the_reference(isa, shape):  # noqa: F811
    assert_twin(swiglu, ref.swiglu, lambda: ([torch.randn(shape) * 4, torch.randn(shape)], [torch.randn(shape)]))


def test_the_exponential_holds_from_end_to_end(isa):  # noqa: F811
    """Relative errors over the whole range in which silu is a normal number, not only where it is large."""
    gate = torch.linspace(-86, 100, 200_000)
    exact = gate.double() * gate.double().sigmoid()
    ours, naive = (((f(gate, torch.ones_like(gate)).double() - exact) / exact).abs() for f in (swiglu, ref.swiglu))
    assert ours.max() <= 2 * naive.max()


def test_extreme_gates_do_what_silu_does(isa):  # noqa: F811
    gate = torch.tensor([88.7, 89.0, 200.0, 3e38, torch.inf, -87.3, -88.8, -89.0, -200.0, -3e38, torch.nan, 0.0, -0.0])
    ones = torch.ones_like(gate)
    out, dgate, dup = run(swiglu, [gate, ones], [ones])
    # gradients of silu at inf are 0 * inf: whatever torch says, NaN included
    want = run(lambda g, u: F.silu(g) * u, [gate, ones], [ones])
    finite = gate.isfinite()
    for ours, theirs in zip((out, dgate, dup), want, strict=True):
        torch.testing.assert_close(ours[finite], theirs[finite], rtol=1e-6, atol=1e-36)
    assert torch.equal(out.isnan(), want[0].isnan())
    assert out[4] == torch.inf


def test_it_is_the_gated_product():
    gate, up = torch.randn(37, 65) * 4, torch.randn(37, 65)
    exact = gate.double() * gate.double().sigmoid() * up.double()
    assert_no_worse(swiglu(gate, up), exact, gate * gate.sigmoid() * up)


def test_bf16_is_rounded_once():
    gate, up = (torch.randn(37, 192) * 4).bfloat16(), torch.randn(37, 192).bfloat16()
    assert_rounded_once(swiglu(gate, up), gate.double() * gate.double().sigmoid() * up.double())


def test_views_give_what_their_copies_give():
    gate, up = torch.randn(20, 2 * 33).chunk(2, 1)
    dout = torch.randn(33, 20).T
    view = run(swiglu, [gate, up], [dout])
    copy = run(swiglu, [gate.contiguous(), up.contiguous()], [dout.contiguous()])
    assert all(map(torch.equal, view, copy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rows_give_no_rows(dtype):
    none = torch.zeros(0, 16, dtype=dtype)
    assert [x.shape for x in run(swiglu, [none, none], [none])] == [(0, 16)] * 3


def test_gradients_pass_gradcheck():
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(swiglu, (gate, up))


def test_mistakes_are_named():
    gate = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"\(3, 4\) torch.float32 on cpu and \(3, 5\) torch.float32 on cpu"):
        swiglu(gate, torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"torch.float32 on cpu and \(3, 4\) torch.bfloat16 on cpu"):
        swiglu(gate, gate.bfloat16())


def test_a_second_derivative_is_refused_not_wrong():
    gate = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(swiglu(gate, gate).sum(), gate, create_graph=True)


def test_a_compiler_sees_through_the_ops():
    """No graph break: fullgraph refuses what it cannot trace, and a call into csrc is such a thing."""

    def block(x, weight, cos, sin):
        y, h = rms_norm(x, weight, 1e-6, x)
        return swiglu(apply_rope(y[:, None], cos, sin)[:, 0], h)

    inputs = torch.randn(9, 16), torch.ones(16), torch.rand(9, 8), torch.rand(9, 8)
    torch.testing.assert_close(torch.compile(block, backend="eager", fullgraph=True)(*inputs), block(*inputs))


def test_an_unknown_instruction_set_is_refused():
    from thinkmid import _csrc

    with pytest.raises(ValueError, match="does not run 'avx9'"):
        _csrc.use_isa("avx9")
    assert _csrc.isa() == _csrc.isas()[-1]
