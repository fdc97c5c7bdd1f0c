"""Shapes of published models, and small ones of the same kind for rehearsals on a CPU."""

from __future__ import annotations

from dataclasses import replace

from thinkmid.model.transformer import ModelConfig

LLAMA3_8B = ModelConfig(
    kind="llama", vocab=128256, width=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn=14336,
    rope_theta=500000.0, norm_eps=1e-5, tied=False, max_positions=8192, eos_ids=(128001,), bos_id=128000,
)  # fmt: skip
LLAMA32_1B = ModelConfig(
    kind="llama", vocab=128256, width=2048, layers=16, heads=32, kv_heads=8, head_dim=64, ffn=8192,
    rope_theta=500000.0, norm_eps=1e-5, tied=True, max_positions=131072, eos_ids=(128001,), bos_id=128000,
)  # fmt: skip
TOY_WIDE = replace(LLAMA3_8B, vocab=512, width=64, layers=4, heads=4, kv_heads=2, head_dim=16, ffn=96, eos_ids=(1,))
TOY_SMALL = replace(LLAMA32_1B, vocab=512, width=32, layers=2, heads=4, kv_heads=2, head_dim=16, ffn=64, eos_ids=(1,))
