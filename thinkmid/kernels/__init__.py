"""The loss library and the model's ops: plain tensors in, no trainer types."""

from thinkmid.kernels.attention import varlen_attention
from thinkmid.kernels.head import linear_logprob
from thinkmid.kernels.policy import dr_grpo_loss
from thinkmid.kernels.ref import apply_rope, rms_norm, swiglu

__all__ = ["apply_rope", "dr_grpo_loss", "linear_logprob", "rms_norm", "swiglu", "varlen_attention"]
