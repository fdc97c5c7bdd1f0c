"""The gated activation of the feed-forward layer."""

from __future__ import annotations

import torch
from torch import Tensor

from thinkmid.kernels import launch, ref


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up in fp32 (fp64 for fp64), rounded once. Both (..., F) of one dtype; nothing is kept but them.

    Same as F.silu(gate) * up, but for the roundings of bf16. Source: Shazeer 2020 (GLU variants).
    """
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device:
        raise ValueError(
            f"gate and up alike, got {tuple(gate.shape)} {gate.dtype} on {gate.device} "
            f"and {tuple(up.shape)} {up.dtype} on {up.device}"
        )
    # a compiler fuses the formula itself
    if torch.compiler.is_compiling() or gate.dtype == torch.float64 or (path := launch.row_path(gate)) == "torch":
        return ref.swiglu(gate, up)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _Swiglu.apply(gate, up, path)
    return _forward(path, gate, up)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, path):
        ctx.save_for_backward(gate, up)
        ctx.path = path
        return _forward(path, gate, up)

    @staticmethod
    def backward(ctx, dout):
        if torch.is_grad_enabled():
            raise NotImplementedError("swiglu has no second derivative; thinkmid.kernels.ref.swiglu has one")
        return *_backward(ctx.path, *ctx.saved_tensors, dout), None


def _forward(path, gate, up):
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if out.numel() == 0:
        return out
    if path == "triton":
        from thinkmid.kernels.gpu import swiglu as gpu

        gpu.swiglu_forward(gate, up, out)
    else:
        from thinkmid import _csrc

        _csrc.swiglu(gate.numel(), gate.data_ptr(), up.data_ptr(), out.data_ptr())
    return out


def _backward(path, gate, up, dout):
    gate, up, dout = gate.contiguous(), up.contiguous(), dout.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    if dout.numel() == 0:
        return dgate, dup
    if path == "triton":
        from thinkmid.kernels.gpu import swiglu as gpu

        gpu.swiglu_backward(gate, up, dout, dgate, dup)
    else:
        from thinkmid import _csrc

        _csrc.swiglu_backward(
            gate.numel(), gate.data_ptr(), up.data_ptr(), dout.data_ptr(), dgate.data_ptr(), dup.data_ptr()
        )
    return dgate, dup
