"""The engine that a configuration names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from thinkmid.rollout.engine.protocol import Engine, EngineConfig

if TYPE_CHECKING:
    import torch

    from thinkmid.model.transformer import ModelConfig
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
    # torch and vllm only where an engine is made
    if config.kind == "native":
        from thinkmid.rollout.engine.native import NativeEngine

        return NativeEngine(model_cfg, tokenizer, dtype=config.dtype, device=device)
    from thinkmid.rollout.engine.vllm import VllmEngine

    return VllmEngine(folder, model_cfg, tokenizer, config, max_len=config.max_len or max_len, rows=rows)
