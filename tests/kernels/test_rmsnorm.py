from functools import partial

import pytest
import torch
from conftest import assert_no_worse
from twins import assert_rounded_once, assert_twin, isa, run  # noqa: F401

from thinkmid.kernels import ref, rms_norm

EPS = 1e-5
WIDTHS = [1, 7, 15, 16, 17, 33, 64, 1023, 1024, 1025, 2056]


def with_residual(op):
    return lambda x, weight, residual: op(x, weight, EPS, residual)


def inputs(rows, width, dtype=torch.float32):
    return [(x * 3).to(dtype) for x in (torch.randn(rows, width), torch.randn(width), torch.randn(rows, width))]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, 41, 131])
def test_every_instruction_set_is_no_worse_than_the_reference(isa, rows, width):  # noqa: F811
    def draw():
        x, weight, residual = inputs(rows, width)
        x = x + 10 * x.sign()  # away from 0, where a narrow row's gradient is a small difference of large numbers
        return [x, weight, residual], [torch.randn(rows, width), torch.randn(rows, width)]

    def draw_plain():
        tensors, douts = draw()
        return tensors[:2], douts[:1]

    times = max(4, 128 // min(rows, width))
    assert_twin(with_residual(rms_norm), with_residual(ref.rms_norm), draw, times)
    assert_twin(partial(rms_norm, eps=EPS), partial(ref.rms_norm, eps=EPS), draw_plain, times)


def test_the_residual_form_is_the_plain_form_of_the_sum(isa):  # noqa: F811
    x, weight, residual = inputs(19, 37)
    y, h = rms_norm(x, weight, EPS, residual)
    assert torch.equal(h, x + residual)
    assert torch.equal(y, rms_norm(h, weight, EPS))


def test_gradients_of_an_output_that_was_not_used(isa):  # noqa: F811
    tensors, dout = inputs(19, 37), torch.randn(19, 37)
    both = run(with_residual(rms_norm), tensors, [dout, torch.zeros(19, 37)])
    assert all(map(torch.equal, run(with_residual(rms_norm), tensors, [dout, None]), both))
    x, _, residual = (t.requires_grad_() for t in tensors)
    _, h = rms_norm(x, tensors[1], EPS, residual)
    assert all(torch.equal(g, dout) for g in torch.autograd.grad(h, (x, residual), dout))


def test_many_rows_and_few_threads_give_the_same_gradient(isa):  # noqa: F811
    """The weight's gradient is summed in an order that does not know of threads."""
    tensors, dout, threads = inputs(300, 257)[:2], torch.randn(300, 257), torch.get_num_threads()
    found = []
    try:
        for num in (1, 2, 3):
            torch.set_num_threads(num)
            found.append(run(partial(rms_norm, eps=EPS), tensors, [dout]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_views_give_what_their_copies_give():
    x, weight = torch.randn(33, 4, 20).transpose(0, 2), torch.randn(2 * 33)[::2]
    dout = torch.randn(20, 33, 4).mT
    view = run(partial(rms_norm, eps=EPS), [x, weight], [dout])
    copy = run(partial(rms_norm, eps=EPS), [x.contiguous(), weight.contiguous()], [dout.contiguous()])
    assert all(map(torch.equal, view, copy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_rows_give_no_rows_and_a_gradient_of_zero(dtype):
    x, weight, residual = inputs(0, 16, dtype)
    y, h, dx, dweight, dresidual = run(with_residual(rms_norm), [x, weight, residual], [x, x])
    assert y.shape == h.shape == dx.shape == dresidual.shape == (0, 16)
    assert torch.equal(dweight, torch.zeros(16, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_formula_with_statistics_in_fp32(dtype):
    x, weight = (torch.randn(37, 65) * 300).to(dtype), torch.randn(65).to(dtype)

    def formula(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    ours = rms_norm(x, weight, 1e-5)
    assert ours.dtype == dtype
    assert_no_worse(ours, formula(x.double(), weight.double()), formula(x.float(), weight.float()).to(dtype))


def test_bf16_is_rounded_once():
    x, weight = (torch.randn(37, 192) * 4).bfloat16(), torch.randn(192).bfloat16()
    wide = x.double()
    assert_rounded_once(rms_norm(x, weight, 0.0), wide / wide.square().mean(-1, keepdim=True).sqrt() * weight.double())


def test_zeros_stay_zero_and_eps_counts(isa):  # noqa: F811
    assert rms_norm(torch.zeros(2, 3), torch.ones(3), 1e-6).eq(0).all()
    assert torch.equal(rms_norm(torch.full((1, 2), 3.0), torch.ones(2), 16.0), torch.full((1, 2), 0.6))


def test_nan_and_inf_spoil_their_row_only(isa):  # noqa: F811
    x = torch.randn(4, 40)
    clean = rms_norm(x, torch.ones(40), EPS)
    x[1, 39], x[2, 0] = torch.nan, torch.inf
    y = rms_norm(x, torch.ones(40), EPS)
    assert y[1].isnan().all()
    assert y[2, 0].isnan()
    assert torch.equal(y[[0, 3]], clean[[0, 3]])


def test_gradients_pass_gradcheck():
    x, weight, residual = (t.requires_grad_() for t in inputs(3, 5, torch.float64))
    assert torch.autograd.gradcheck(partial(rms_norm, eps=EPS), (x, weight))
    assert torch.autograd.gradcheck(with_residual(rms_norm), (x, weight, residual))


def test_mistakes_are_named():
    x, weight = torch.zeros(3, 4), torch.zeros(4)
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(5,\)"):
        rms_norm(x, torch.zeros(5), EPS)
    with pytest.raises(ValueError, match=r"torch.float32 on cpu and torch.bfloat16 on cpu"):
        rms_norm(x, weight.bfloat16(), EPS)
    with pytest.raises(ValueError, match=r"torch.float32 on cpu and torch.float32 on meta"):
        rms_norm(x, weight.to("meta"), EPS)
    with pytest.raises(ValueError, match=r"residual like x, got \(4,\) .* and \(3, 4\)"):
        rms_norm(x, weight, EPS, weight)


def test_a_second_derivative_is_refused_not_wrong():
    x, weight = torch.randn(3, 4, requires_grad=True), torch.ones(4)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(rms_norm(x, weight, EPS).sum(), x, create_graph=True)
