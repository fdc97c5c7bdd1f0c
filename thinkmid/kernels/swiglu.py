"""The gated activation of the feed-forward layer."""

from __future__ import annotations

from typing import Any

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
    path = launch.op_path(gate)
    if path == "torch":
        return ref.swiglu(gate, up)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        gated: Tensor = _Swiglu.apply(gate, up, path)  # type: ignore[no-untyped-call]
        return gated
    return _forward(path, gate, up)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, path: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.path = path
        return _forward(path, gate, up)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None]:
        if torch.is_grad_enabled():
            raise NotImplementedError("swiglu has no second derivative; thinkmid.kernels.ref.swiglu has one")
        gate, up = ctx.saved_tensors
        return *_backward(ctx.path, gate, up, dout), None


def _forward(path: str, gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if out.numel() and path == "triton":
        launch.triton("swiglu").swiglu_forward(gate, up, out)
    elif out.numel():
        launch.cpp().swiglu(out.numel(), *map(launch.address, (gate, up, out)))
    return out


def _backward(path: str, gate: Tensor, up: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    gate, up, dout = gate.contiguous(), up.contiguous(), dout.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    if dout.numel() and path == "triton":
        launch.triton("swiglu").swiglu_backward(gate, up, dout, dgate, dup)
    elif dout.numel():
        launch.cpp().swiglu_backward(dout.numel(), *map(launch.address, (gate, up, dout, dgate, dup)))
    return dgate, dup
