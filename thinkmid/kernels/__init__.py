"""The ops of the model and the losses."""

from thinkmid.kernels.ref import apply_rope, rms_norm, swiglu

__all__ = ["apply_rope", "rms_norm", "swiglu"]
