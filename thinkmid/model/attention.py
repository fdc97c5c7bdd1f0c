"""The attention of one pack, as the model calls it in every layer."""

from __future__ import annotations

from thinkmid.kernels.attention import SegmentAttention, SharedKeys
from thinkmid.types import Pack


def attend_pack(pack: Pack, *, impl: str = "auto", deterministic: bool = True) -> SegmentAttention:
    """The attention that Transformer.forward takes for a pack: kernels.varlen_attention of its segments.

    impl and deterministic as there. Nothing waits for the device, but for sdpa on a GPU.
    """
    shared = None
    if pack.kv_rows is not None and pack.kv_order is not None and pack.kv_readers is not None:
        shared = SharedKeys(pack.kv_rows, pack.kv_order, pack.kv_readers)
    longest = (pack.max_q, pack.max_k)
    return SegmentAttention(pack.cu_q, pack.cu_k, pack.kv_rows, impl, deterministic, longest, shared)
