"""RMSNorm, alone or with the residual sum before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thinkmid.kernels import launch, ref


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean(x**2) + eps) * weight over the last axis, rounded once. x (..., D), weight (D,) of one dtype.

    With a residual like x: h = x + residual, rounded to x's dtype; returns (the norm of h, h). Statistics are fp32
    (fp64 for fp64), the weight's gradient is summed in fp32 in a fixed order. Same as F.rms_norm(x, (D,), weight, eps).
    Source: Zhang and Sennrich 2019.
    """
    _check(x, weight, residual)
    path = launch.op_path(x)
    if path == "torch":
        return ref.rms_norm(x, weight, eps, residual)
    inputs = (x, weight) if residual is None else (x, weight, residual)
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        y, h = _RMSNorm.apply(x, weight, eps, residual, path)  # type: ignore[no-untyped-call]
    else:
        y, h, _ = _forward(path, x, weight, eps, residual, want_rstd=False)
    return y if residual is None else (y, h)


def _check(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    if weight.ndim != 1 or x.ndim == 0 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"x (..., D) and weight (D,), got {tuple(x.shape)} and {tuple(weight.shape)}")
    if x.dtype != weight.dtype or x.device != weight.device:
        raise ValueError(
            f"x and weight of one dtype and device, got {x.dtype} on {x.device} and {weight.dtype} on {weight.device}"
        )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device):
        raise ValueError(
            f"residual like x, got {tuple(residual.shape)} {residual.dtype} on {residual.device} "
            f"and {tuple(x.shape)} {x.dtype} on {x.device}"
        )


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, path: str
    ) -> tuple[Tensor, Tensor | None]:
        y, h, rstd = _forward(path, x, weight, eps, residual, want_rstd=True)
        ctx.save_for_backward(h if residual is not None else x, weight, rstd)
        ctx.path = path
        ctx.set_materialize_grads(False)
        return y, h if residual is not None else None

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError("rms_norm has no second derivative; thinkmid.kernels.ref.rms_norm has one")
        if dy is None:  # the norm was not used, only the sum
            return dh, None, None, dh, None
        dx, dweight = _backward(ctx.path, ctx.saved_tensors, dy, dh, want_dweight=ctx.needs_input_grad[1])
        return dx, dweight, None, dx if ctx.needs_input_grad[3] else None, None


def _forward(
    path: str, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, *, want_rstd: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y like x, h = x + residual (x itself without one), 1 / sqrt(mean(h**2) + eps) (R,) fp32 if wanted."""
    x, weight = x.contiguous(), weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    y = torch.empty_like(x)
    h = x if residual is None else torch.empty_like(x)
    width = weight.shape[0]
    num_rows = x.numel() // width if width else 0
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device) if want_rstd else None
    if num_rows and path == "triton":
        launch.triton("rmsnorm").rms_norm_forward(x, residual, weight, eps, h, y, rstd)
    elif num_rows:
        tensors = (x, residual, weight, None if residual is None else h, y, rstd)
        launch.cpp().rms_norm(num_rows, width, eps, *map(launch.address, tensors))
    return y, h, rstd


def _backward(
    path: str, saved: tuple[Tensor, Tensor, Tensor], dy: Tensor, dh: Tensor | None, *, want_dweight: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x (and of the residual, which is the same) and of the weight, None if it is not wanted.

    saved: h like x, weight (D,), rstd (R,).
    """
    h, weight, rstd = (t.contiguous() for t in saved)
    dy, dh = dy.contiguous(), None if dh is None else dh.contiguous()
    dx = torch.empty_like(h)
    num_rows, width = len(rstd), len(weight)
    if num_rows == 0:
        return dx, torch.zeros_like(weight) if want_dweight else None
    if path == "triton":
        return dx, launch.triton("rmsnorm").rms_norm_backward(h, weight, rstd, dy, dh, dx, want_dweight=want_dweight)
    dweight = torch.empty_like(weight) if want_dweight else None
    launch.cpp().rms_norm_backward(num_rows, width, *map(launch.address, (h, weight, rstd, dy, dh, dx, dweight)))
    return dx, dweight
