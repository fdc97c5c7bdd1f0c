import pytest
import torch
from conftest import assert_no_worse
from twins import assert_rounded_once, assert_twin, isa, run  # noqa: F401

from thinkmid.kernels import apply_rope, ref


def angles(rows, head_dim):
    turns = torch.rand(rows, head_dim // 2) * 50
    return turns.cos(), turns.sin()


@pytest.mark.parametrize("head_dim", [2, 6, 10, 16, 30, 32, 34, 64, 128])
def test_every_instruction_set_is_no_worse_than_the_reference(isa, head_dim):  # noqa: F811
    for rows, heads in ((1, 1), (23, 3), (300, 8)):
        cos, sin = angles(rows, head_dim)

        def turned(op, cos=cos, sin=sin):
            return lambda *xs: op(*xs, cos.to(xs[0].dtype), sin.to(xs[0].dtype))

        shape = (rows, heads, head_dim)
        assert_twin(
            turned(apply_rope), turned(ref.apply_rope),
            lambda shape=shape: ([torch.randn(shape)], [torch.randn(shape)]), times=32 if rows == 1 else 2,
        )  # fmt: skip


def test_queries_and_keys_inside_one_projection_give_what_their_copies_give(isa):  # noqa: F811
    cos, sin = angles(19, 20)
    qkv, dout = torch.randn(19, 5, 40), torch.randn(3, 19, 20).transpose(0, 1)
    for view in (qkv[:, :3, :20], qkv[:, 2:, 7:27], qkv[:, :3, ::2], torch.randn(3, 19, 20).transpose(0, 1)):
        found, want = (run(lambda x: apply_rope(x, cos, sin), [x], [dout]) for x in (view, view.contiguous()))
        assert found[0].is_contiguous()
        assert all(map(torch.equal, found, want))


def test_gradient_is_the_rotation_back(isa):  # noqa: F811
    """A rotation keeps lengths and its transpose undoes it."""
    cos, sin = angles(11, 24)
    x, dout = torch.randn(2, 11, 3, 24)
    y, dx = run(lambda x: apply_rope(x, cos, sin), [x], [dout])
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close((x * dx).sum((1, 2)), (y * dout).sum((1, 2)))
    torch.testing.assert_close(apply_rope(dx, cos, sin), dout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [2, 10, 64])
def test_it_is_a_rotation_of_complex_numbers(dtype, head_dim):
    x = torch.randn(23, 3, head_dim).to(dtype)
    angles = torch.rand(23, head_dim // 2) * 50

    def rotate(x, angles):
        a, b = x.chunk(2, -1)
        turned = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.cat((turned.real, turned.imag), -1)

    ours = apply_rope(x, angles.cos(), angles.sin())
    assert ours.dtype == dtype
    assert_no_worse(ours, rotate(x.double(), angles.double()), rotate(x.float(), angles).to(dtype))


def test_bf16_is_rounded_once():
    x, (cos, sin) = (torch.randn(37, 3, 64) * 4).bfloat16(), angles(37, 64)
    assert_rounded_once(apply_rope(x, cos, sin), apply_rope(x.double(), cos.double(), sin.double()))


def test_no_tokens_give_no_tokens():
    none = torch.zeros(0, 4, 8)
    y, dx = run(lambda x: apply_rope(x, none[:, 0, :4], none[:, 0, :4]), [none], [none])
    assert y.shape == dx.shape == (0, 4, 8)


def test_gradient_passes_gradcheck():
    cos, sin = (t.double() for t in angles(3, 6))
    assert torch.autograd.gradcheck(
        lambda x: apply_rope(x, cos, sin), torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    )


def test_angles_with_a_gradient_get_one():
    x, (cos, sin) = torch.randn(3, 2, 6), angles(3, 6)
    dcos, dsin = torch.autograd.grad(apply_rope(x, cos.requires_grad_(), sin.requires_grad_()).sum(), (cos, sin))
    a, b = x.chunk(2, -1)
    torch.testing.assert_close(dcos, (a + b).sum(1))
    torch.testing.assert_close(dsin, (a - b).sum(1))


def test_mistakes_are_named():
    x, (cos, sin) = torch.zeros(5, 2, 6), angles(5, 6)
    with pytest.raises(ValueError, match=r"\(5, 2, 6\), \(4, 3\) and \(5, 3\)"):
        apply_rope(x, cos[:4], sin)
    with pytest.raises(ValueError, match=r"C even.*\(5, 2, 5\)"):
        apply_rope(x[..., :5], cos, sin)
    with pytest.raises(ValueError, match=r"got torch.float64, torch.float32 and torch.float32"):
        apply_rope(x, cos.double(), sin)
    with pytest.raises(ValueError, match="got cpu, cpu and meta"):
        apply_rope(x, cos, sin.to("meta"))


def test_a_second_derivative_is_refused_not_wrong():
    x, (cos, sin) = torch.randn(3, 2, 6, requires_grad=True), angles(3, 6)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(apply_rope(x, cos, sin).sum(), x, create_graph=True)
