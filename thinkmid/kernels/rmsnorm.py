"""RMSNorm, alone or with the residual sum before it."""

from __future__ import annotations

import torch
from torch import Tensor

from thinkmid.kernels import launch, ref
from thinkmid.kernels.launch import address


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None):
    """x / sqrt(mean(x**2) + eps) * weight over the last axis, rounded once. x (..., D), weight (D,) of one dtype.

    With a residual like x: h = x + residual, rounded to x's dtype; returns (the norm of h, h). Statistics are fp32
    (fp64 for fp64), the weight's gradient is summed in fp32 in a fixed order. Same as F.rms_norm(x, (D,), weight, eps).
    Source: Zhang and Sennrich 2019.
    """
    _check(x, weight, residual)
    # a compiler fuses the formula itself
    if torch.compiler.is_compiling() or x.dtype == torch.float64 or (path := launch.row_path(x)) == "torch":
        return ref.rms_norm(x, weight, eps, residual)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (residual is not None and residual.requires_grad)
    ):
        y, h = _RMSNorm.apply(x, weight, eps, residual, path)
    else:
        y, h, _ = _forward(path, x, weight, eps, residual, want_rstd=False)
    return y if residual is None else (y, h)


def _check(x, weight, residual):
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
    def forward(ctx, x, weight, eps, residual, path):
        y, h, rstd = _forward(path, x, weight, eps, residual, want_rstd=True)
        ctx.save_for_backward(h if residual is not None else x, weight, rstd)
        ctx.path = path
        ctx.set_materialize_grads(False)
        return y, h if residual is not None else None

    @staticmethod
    def backward(ctx, dy, dh):
        if torch.is_grad_enabled():
            raise NotImplementedError("rms_norm has no second derivative; thinkmid.kernels.ref.rms_norm has one")
        if dy is None:  # the norm was not used, only the sum
            return dh, None, None, dh, None
        h, weight, rstd = ctx.saved_tensors
        dx, dweight = _backward(ctx.path, h, weight, rstd, dy, dh, want_dweight=ctx.needs_input_grad[1])
        return dx, dweight, None, dx if ctx.needs_input_grad[3] else None, None


def _forward(path, x, weight, eps, residual, *, want_rstd):
    """y like x, h = x + residual (x itself without one), 1 / sqrt(mean(h**2) + eps) (R,) fp32 if wanted."""
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    y = torch.empty_like(x)
    h = x if residual is None else torch.empty_like(x)
    width = weight.shape[0]
    num_rows = x.numel() // width if width else 0
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device) if want_rstd else None
    if num_rows == 0:
        return y, h, rstd
    if path == "triton":
        from thinkmid.kernels.gpu import rmsnorm as gpu

        gpu.rms_norm_forward(x, residual, weight.contiguous(), eps, h, y, rstd)
    else:
        from thinkmid import _csrc

        weight = weight.contiguous()
        added = 0 if residual is None else h.data_ptr()
        _csrc.rms_norm(
            num_rows, width, eps, x.data_ptr(), address(residual), weight.data_ptr(), added, y.data_ptr(), address(rstd)
        )
    return y, h, rstd


def _backward(path, h, weight, rstd, dy, dh, *, want_dweight):
    """Gradients of x (and of the residual, which is the same) and of the weight, None if it is not wanted."""
    h, weight, dy = h.contiguous(), weight.contiguous(), dy.contiguous()
    dh = None if dh is None else dh.contiguous()
    dx = torch.empty_like(h)
    num_rows, width = len(rstd), len(weight)
    if num_rows == 0:
        return dx, torch.zeros_like(weight) if want_dweight else None
    if path == "triton":
        from thinkmid.kernels.gpu import rmsnorm as gpu

        return dx, gpu.rms_norm_backward(h, weight, rstd, dy, dh, dx, want_dweight=want_dweight)
    from thinkmid import _csrc

    dweight = torch.empty_like(weight) if want_dweight else None
    _csrc.rms_norm_backward(
        num_rows, width, h.data_ptr(), weight.data_ptr(), rstd.data_ptr(), dy.data_ptr(), address(dh), dx.data_ptr(),
        address(dweight),
    )  # fmt: skip
    return dx, dweight
