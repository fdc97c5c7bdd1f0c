"""The engine that a configuration names."""

from __future__ import annotations

from pathlib import Path

import torch

from thinkmid.model.transformer import ModelConfig
from thinkmid.rollout.engine.native import NativeEngine
from thinkmid.rollout.engine.protocol import Engine, EngineConfig
from thinkmid.rollout.engine.vllm import VllmEngine
from thinkmid.tokenizer import Tokenizer


def make_engine(
    config: EngineConfig,
    folder: str | Path,
    model_cfg: ModelConfig,
    tokenizer: Tokenizer,
    *,
    device: torch.device,
    max_len: int,
    rows: int,
) -> Engine:
    """An engine, awake and without weights. Collective for vllm.

    folder: Hugging Face folder of the model, for its config.json. max_len: tokens of the longest sequence, unless
    config.max_len says otherwise. rows: sequences decoded at a time.
    """
    if config.kind == "native":
        return NativeEngine(model_cfg, tokenizer, dtype=config.dtype, device=device)
    return VllmEngine(folder, model_cfg, tokenizer, config, max_len=config.max_len or max_len, rows=rows)
