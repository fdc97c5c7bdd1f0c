"""What the tests of the model's ops share: an op and its reference on the same inputs, both against fp64."""

import pytest
import torch
from conftest import assert_no_worse

from thinkmid import _csrc


@pytest.fixture(params=_csrc.isas())
def isa(request):
    """Every instruction set of this CPU in turn."""
    widest = _csrc.isa()
    _csrc.use_isa(request.param)
    yield request.param
    _csrc.use_isa(widest)


def run(op, inputs, douts):
    """Outputs of op and gradients of the inputs, for these gradients of the outputs (None: that output is not used)."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outs = op(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    used, given = zip(*((out, dout) for out, dout in zip(outs, douts, strict=True) if dout is not None), strict=True)
    return [*outs, *torch.autograd.grad(used, inputs, given)]


def assert_twin(op, reference, draw, times=16):
    """Outputs and gradients of op, for inputs, douts = draw(), are no worse than the reference's in the same dtype.

    Of several draws together: where a draw has few numbers either may be exact by luck.
    """
    found = []
    for _ in range(times):
        inputs, douts = draw()
        wide = [None if d is None else d.double() for d in douts]
        exact = run(reference, [x.double() for x in inputs], wide)
        found.append(list(zip(run(op, inputs, douts), exact, run(reference, inputs, douts), strict=True)))
        assert all(ours.shape == want.shape and ours.dtype == inputs[0].dtype for ours, want, _ in found[-1])
    for of_draws in zip(*found, strict=True):
        assert_no_worse(*(torch.cat([x.flatten() for x in xs]) for xs in zip(*of_draws, strict=True)))


def assert_rounded_once(ours, exact):
    """bf16 values are those of fp64 rounded; fp32 on the way may tip the rare value that lies half-way."""
    assert ours.dtype == torch.bfloat16
    assert (ours == exact.bfloat16()).double().mean() > 0.995
