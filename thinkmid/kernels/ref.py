"""The slow truth of the model's ops: plain PyTorch, statistics in fp32, any device. Autograd finds the gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean(x**2) + eps) * weight over the last axis, in fp32, rounded once. x (..., D), weight (D,).

    With a residual: of h = x + residual, and h is returned too.
    """
    h = x if residual is None else x + residual
    # F.rms_norm computes in fp32 inside: equal to the formula bit for bit in fp32, one rounding instead of two in bf16
    y = F.rms_norm(h, weight.shape, weight, eps)
    return y if residual is None else (y, h)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pair (j, j + C/2) of each head by angle j of its row. x (T, H, C); cos, sin (T, C/2) fp32; like x."""
    cos = torch.cat((cos, cos), -1)[:, None]  # (T, 1, C)
    sin = torch.cat((-sin, sin), -1)[:, None]
    # cos and sin are fp32, and so is every product
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up in fp32 (fp64 for fp64 inputs), rounded once to gate's dtype. Both (..., F)."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)
