"""Rotary position embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thinkmid.kernels import launch, ref


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pair (j, j + C/2) of each head by angle j of its row. x (T, H, C), any strides; returns its like.

    cos, sin (T, C/2) fp32 (fp64 goes with an x of fp64): constants, which get no gradient. Computed in fp32, rounded
    once. Same as (x1 cos - x2 sin, x2 cos + x1 sin) for the halves x1, x2. Source: Su et al. 2021 (RoFormer).
    """
    _check(x, cos, sin)
    path = launch.op_path(x)
    # angles with a gradient are autograd's business
    if path == "torch" or cos.requires_grad or sin.requires_grad:
        return ref.apply_rope(x, cos, sin)
    if torch.is_grad_enabled() and x.requires_grad:
        rotated: Tensor = _Rope.apply(x, cos, sin, path)  # type: ignore[no-untyped-call]
        return rotated
    return _rotate(path, x, cos, sin, 1.0)


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if x.ndim != 3 or x.shape[2] % 2 or cos.shape != (x.shape[0], x.shape[2] // 2) or sin.shape != cos.shape:
        raise ValueError(
            f"x (T, H, C) with C even, cos and sin (T, C/2), got {tuple(x.shape)}, {tuple(cos.shape)} and "
            f"{tuple(sin.shape)}"
        )
    if cos.dtype != sin.dtype or cos.dtype not in (torch.float32, x.dtype):
        raise ValueError(f"cos and sin must be fp32, or like an x of fp64, got {cos.dtype}, {sin.dtype} and {x.dtype}")
    if cos.device != x.device or sin.device != x.device:
        raise ValueError(f"x, cos and sin on one device, got {x.device}, {cos.device} and {sin.device}")


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, path: str) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.path = path
        return _rotate(path, x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None, None]:
        if torch.is_grad_enabled():
            raise NotImplementedError("apply_rope has no second derivative; thinkmid.kernels.ref.apply_rope has one")
        cos, sin = ctx.saved_tensors
        return _rotate(ctx.path, dout, cos, sin, -1.0), None, None, None


def _rotate(path: str, x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """By sign times the angles, (T, H, C) contiguous: a rotation's gradient is the rotation back."""
    x = x if x.stride(2) == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() and path == "triton":
        launch.triton("rope").rotate(x, cos, sin, sign, out)
    elif out.numel():
        pointers = map(launch.address, (x, cos, sin, out))
        launch.cpp().rope(*x.shape, x.stride(0), x.stride(1), sign, *pointers)
    return out
