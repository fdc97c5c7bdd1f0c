"""The attention of one pack, as the model calls it in every layer."""

from __future__ import annotations

from thinkmid.kernels.attention import Attend, SharedKeys, attend_segments
from thinkmid.types import Pack


def attend_pack(pack: Pack, *, impl: str = "auto", deterministic: bool = True) -> Attend:
    """The attention of one pack as the model wants it. Nothing waits for the device, but for sdpa on a GPU."""
    shared = None if pack.kv_rows is None else SharedKeys(pack.kv_rows, pack.kv_order, pack.kv_readers)
    known = {"longest": (pack.max_q, pack.max_k), "shared": shared}
    return attend_segments(pack.cu_q, pack.cu_k, pack.kv_rows, impl=impl, deterministic=deterministic, **known)
