"""The loss library and the model's ops: plain tensors in, no trainer types."""

from thinkmid.kernels.attention import varlen_attention
from thinkmid.kernels.head import FusedLoss, fused_linear_dr_grpo, gather_weight, linear_cross_entropy, linear_logprob
from thinkmid.kernels.policy import LiveRows, Metrics, dr_grpo_loss, plan_rows
from thinkmid.kernels.rmsnorm import rms_norm
from thinkmid.kernels.rope import apply_rope
from thinkmid.kernels.swiglu import swiglu

__all__ = [
    "FusedLoss",
    "LiveRows",
    "Metrics",
    "apply_rope",
    "dr_grpo_loss",
    "fused_linear_dr_grpo",
    "gather_weight",
    "linear_cross_entropy",
    "linear_logprob",
    "plan_rows",
    "rms_norm",
    "swiglu",
    "varlen_attention",
]
