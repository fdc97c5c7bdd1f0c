"""Shapes of published models, small ones of the same kind for rehearsals, and the FLOPs that a step of one needs."""

from __future__ import annotations

from dataclasses import replace

from thinkmid.data.pack import Unit
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


def needed_flops(cfg: ModelConfig, units: list[Unit]) -> int:
    """By lengths alone, each prefix once: 6 a weight of the blocks and row, 6 a weight of the head and row with loss;
    attention two products a pair forward, four backward."""
    q, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    block = 2 * cfg.width * (q + kv) + 3 * cfg.width * cfg.ffn
    total = 0
    for unit in units:
        p, lengths = len(unit.prefix), [len(r.tokens) for r in unit.replies]
        rows = p + sum(n - 1 for n in lengths)  # the last token of a reply predicts nothing
        pairs = p * (p + 1) // 2 + sum((n - 1) * p + (n - 1) * n // 2 for n in lengths)
        total += 6 * (cfg.layers * block * rows + cfg.vocab * cfg.width * sum(lengths)) + 12 * cfg.layers * q * pairs
    return total
