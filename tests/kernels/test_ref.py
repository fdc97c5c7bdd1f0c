import pytest
import torch
from conftest import assert_no_worse

from thinkmid.kernels import apply_rope, rms_norm, swiglu


def assert_rounded_once(ours, exact):
    """bf16 values are those of fp64 rounded; fp32 on the way may tip the rare value that lies half-way."""
    assert ours.dtype == torch.bfloat16
    assert (ours == exact.bfloat16()).double().mean() > 0.995


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_the_formula_with_statistics_in_fp32(dtype):
    x, weight = (torch.randn(37, 65) * 300).to(dtype), torch.randn(65).to(dtype)

    def formula(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    ours = rms_norm(x, weight, 1e-5)
    assert ours.dtype == dtype
    assert_no_worse(ours, formula(x.double(), weight.double()), formula(x.float(), weight.float()).to(dtype))


def test_rms_norm_of_zeros_is_zero_and_eps_counts():
    assert rms_norm(torch.zeros(2, 3), torch.ones(3), 1e-6).eq(0).all()
    assert torch.equal(rms_norm(torch.full((1, 2), 3.0), torch.ones(2), 16.0), torch.full((1, 2), 0.6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [2, 10, 64])
def test_rope_is_a_rotation_of_complex_numbers(dtype, head_dim):
    x = torch.randn(23, 3, head_dim).to(dtype)
    angles = torch.rand(23, head_dim // 2) * 50

    def rotate(x, angles):
        a, b = x.chunk(2, -1)
        turned = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.cat((turned.real, turned.imag), -1)

    ours = apply_rope(x, angles.cos(), angles.sin())
    assert ours.dtype == dtype
    assert_no_worse(ours, rotate(x.double(), angles.double()), rotate(x.float(), angles).to(dtype))


def test_swiglu_is_the_gated_product():
    gate, up = torch.randn(37, 65) * 4, torch.randn(37, 65)
    exact = gate.double() * gate.double().sigmoid() * up.double()
    assert_no_worse(swiglu(gate, up), exact, gate * gate.sigmoid() * up)


def test_bf16_is_rounded_once():
    x, y = (torch.randn(37, 3, 64) * 4).bfloat16(), torch.randn(37, 3, 64).bfloat16()
    weight, angles = torch.randn(64).bfloat16(), torch.rand(37, 32) * 50
    cos, sin, wide = angles.cos(), angles.sin(), x.double()
    assert_rounded_once(swiglu(x, y), wide * wide.sigmoid() * y.double())
    assert_rounded_once(rms_norm(x, weight, 0.0), wide / wide.square().mean(-1, keepdim=True).sqrt() * weight.double())
    assert_rounded_once(apply_rope(x, cos, sin), apply_rope(wide, cos.double(), sin.double()))
