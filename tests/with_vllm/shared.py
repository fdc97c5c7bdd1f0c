"""Two ranks share an engine, for one family after the other, and read their slices back: shared.py FOLDER.

Under torchrun. One line of JSON from each rank for each family: what sync finds wrong, and which names it compared.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from thinkmid.model import weights
from thinkmid.model.transformer import ModelConfig
from thinkmid.rollout.engine import weight_sync
from thinkmid.rollout.engine.protocol import EngineConfig
from thinkmid.rollout.engine.vllm import VllmEngine
from thinkmid.run.ranks import start_ranks
from thinkmid.tokenizer import Tokenizer

BASE = ModelConfig(
    kind="llama", vocab=641, width=32, layers=2, heads=4, kv_heads=1, head_dim=32, ffn=48, rope_theta=1000.0,
    norm_eps=1e-6, tied=False, max_positions=512, eos_ids=(0,), attention_bias=True,
)  # fmt: skip
# biases, q/k norms, one key/value head for two ranks, both kinds of head, vocabularies that split evenly and do not
FAMILIES = [
    BASE,
    # the second rank holds padding alone; vLLM takes the width for heads * head_dim
    replace(BASE, kind="qwen2", kv_heads=2, vocab=37, width=128, tied=True, attention_bias=False),
    replace(BASE, kind="qwen3", kv_heads=4, vocab=640, attention_bias=False),
    replace(BASE, kind="mistral", kv_heads=2, attention_bias=False, window=9, windowed_layers=(0, 1)),
    replace(BASE, kind="smollm3", tied=True, no_rope_layers=(1,)),
    replace(BASE, kind="olmo2", kv_heads=2),
    replace(BASE, kind="olmo3", kv_heads=4, rope_theta=5e5, window=9, windowed_layers=(0,)),
]


def main():
    ranks, folder = start_ranks(), Path(sys.argv[1])
    for cfg in FAMILIES:
        model = weights.build(cfg)
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.normal_(generator=torch.Generator().manual_seed(i))
        weights.save(folder / cfg.kind, cfg, weights.stream(model), dtype=torch.float32)
        text = Tokenizer(
            tokenizer=None, pieces=[b"."] * cfg.vocab, eos_ids=(0,), bos_id=None, open_ids=[1], close_ids=[2]
        )
        config = EngineConfig(kind="vllm", compile=False, kv_gb=0.02, tensor_parallel=ranks.world)
        engine = VllmEngine(folder / cfg.kind, cfg, text, config, max_len=64, rows=2)
        wrong = weight_sync.difference(engine, weight_sync.push(model, engine, 0, torch.float32), {})
        row = {"rank": ranks.rank, "family": cfg.kind, "wrong": wrong, "names": sorted(dict(engine.named_weights()))}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
