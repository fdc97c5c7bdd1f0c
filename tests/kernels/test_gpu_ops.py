"""The model's ops in Triton, interpreted where there is no GPU: outputs and gradients against fp64 autograd."""

from functools import partial

import pytest
import torch
from twins import assert_twin, run

from thinkmid.kernels import apply_rope, launch, ref, rms_norm, swiglu
from thinkmid.kernels.gpu import rmsnorm
from thinkmid.kernels.gpu import swiglu as gpu_swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16]  # the interpreter truncates where bf16 rounds


@pytest.fixture(autouse=True)
def _triton_runs(monkeypatch):
    monkeypatch.setattr(launch, "row_path", lambda x: "triton")


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape).to(DEVICE, dtype)


def with_residual(op):
    return lambda x, weight, residual: op(x, weight, 1e-5, residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 13, 64, 127, 128, 129])
def test_rms_norm_is_no_worse_than_the_reference(dtype, width, monkeypatch):
    monkeypatch.setattr(rmsnorm, "TILE", 512)  # several blocks of rows, several of them for a program

    def draw(rows=37):
        x = randn(rows, width, dtype=dtype)
        return [x + 2 * x.sign(), randn(width, dtype=dtype), randn(rows, width, dtype=dtype) / 4], [
            randn(rows, width, dtype=dtype) for _ in range(2)
        ]

    def draw_plain():
        tensors, douts = draw()
        return tensors[:2], douts[:1]

    assert_twin(with_residual(rms_norm), with_residual(ref.rms_norm), draw, 3)
    assert_twin(partial(rms_norm, eps=1e-5), partial(ref.rms_norm, eps=1e-5), draw_plain, 3)


def test_rms_norm_without_a_gradient_gives_the_same():
    x, weight, residual = randn(7, 33), randn(33), randn(7, 33)
    with torch.no_grad():
        plain = rms_norm(x, weight, 1e-5, residual)
    assert all(map(torch.equal, plain, rms_norm(x.requires_grad_(), weight, 1e-5, residual)))


def test_rms_norm_of_an_output_that_was_not_used():
    tensors, dout = [randn(7, 33), randn(33), randn(7, 33)], randn(7, 33)
    both = run(with_residual(rms_norm), tensors, [dout, torch.zeros_like(dout)])
    assert all(map(torch.equal, run(with_residual(rms_norm), tensors, [dout, None]), both))


def test_rms_norm_takes_the_sum_as_it_was_rounded():
    """The next layer reads the rounded sum; a norm of the exact one would be of other numbers."""
    x, weight, residual = randn(7, 33, dtype=torch.float16), randn(33, dtype=torch.float16), randn(7, 33).half() * 1000
    y, h = rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(h, x + residual)
    assert torch.equal(y, rms_norm(h, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (3, 10), (4, 32), (5, 64), (2, 66)])
def test_rope_is_no_worse_than_the_reference(dtype, heads, head_dim):
    angles = torch.rand(9, head_dim // 2).to(DEVICE) * 50

    def turned(op):
        return lambda x: op(
            x, *(t.to(torch.promote_types(x.dtype, torch.float32)) for t in (angles.cos(), angles.sin()))
        )

    shape = (9, heads, head_dim)
    assert_twin(turned(apply_rope), turned(ref.apply_rope), lambda: ([randn(*shape, dtype=dtype)],) * 2, 4)


def test_rope_of_views_is_that_of_their_copies():
    angles, qkv, dout = torch.rand(9, 5).to(DEVICE), randn(9, 5, 20), randn(3, 9, 10).transpose(0, 1)
    for view in (qkv[:, :3, :10], qkv[:, 2:, 7:17], qkv[:, :3, ::2], randn(3, 9, 10).transpose(0, 1)):
        found, want = (
            run(lambda x: apply_rope(x, angles.cos(), angles.sin()), [x], [dout]) for x in (view, view.contiguous())
        )
        assert all(map(torch.equal, found, want))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (7, 73), (8, 64), (19, 27)], ids=str)
def test_swiglu_is_no_worse_than_the_reference(dtype, shape, monkeypatch):
    monkeypatch.setattr(gpu_swiglu, "BLOCK", 512)  # one block less one, a block, a block and one

    def draw():
        return [randn(*shape, dtype=dtype) * 4, randn(*shape, dtype=dtype)], [randn(*shape, dtype=dtype)]

    assert_twin(swiglu, ref.swiglu, draw, 16 if shape == (1,) else 3)


def test_nothing_in_gives_nothing_out():
    none = randn(0, 4, 6)
    assert [x.shape for x in run(swiglu, [none, none], [none])] == [(0, 4, 6)] * 3
    assert [x.shape for x in run(lambda x: apply_rope(x, none[:, 0, :3], none[:, 0, :3]), [none], [none])] == [
        (0, 4, 6)
    ] * 2
    y, dx, dweight = run(partial(rms_norm, eps=1e-5), [none, randn(6)], [none])
    assert y.shape == dx.shape == (0, 4, 6)
    assert dweight.eq(0).all()


def test_fp64_never_reaches_triton():
    x = randn(3, 4, dtype=torch.float64)
    assert torch.equal(swiglu(x, x), ref.swiglu(x, x))
    assert torch.equal(rms_norm(x, x[0], 1e-5), ref.rms_norm(x, x[0], 1e-5))
