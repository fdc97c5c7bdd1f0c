"""Which model a run starts from: one in a folder, or a fresh one. No torch in here, for --help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from thinkmid.errors import at_least, positive

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The model to start from."""

    folder: str = ""  # Hugging Face folder, or ORG/NAME[@REVISION] on the Hub
    dtype: Literal["float32", "bfloat16"] = "float32"  # of forward and backward; master weights are fp32
    checkpointing: bool = False  # recompute each block in the backward: less memory, a third more compute
    deterministic: bool = True  # fixed order of sums in a GPU's attention backward; off: faster, not measured how much
    # LoRA: rank of the adapters, which alone are trained, in fp32, beside frozen weights in dtype; 0: every weight is
    lora_rank: int = 0
    lora_alpha: float = 16.0  # adapters are scaled by lora_alpha / lora_rank
    lora_targets: tuple[Projection, ...] = get_args(Projection)  # LoRA: projections of each block that have an adapter

    def __post_init__(self) -> None:
        at_least(self, lora_rank=0)
        positive(self, "lora_alpha")
        if not self.lora_targets or len(set(self.lora_targets)) < len(self.lora_targets):
            raise ValueError(f"lora_targets must name each projection once, at least one, got {self.lora_targets}")


@dataclass(frozen=True, kw_only=True)
class FreshConfig:
    """Sizes of a model with drawn weights. Used when model.folder is empty."""

    vocab: int = 1024  # byte-level BPE tokens, trained on tokenizer_data; fewer if the text has fewer
    tokenizer_data: tuple[str, ...] = ()  # texts for the tokenizer; none: the training data
    tags: Literal["added", "plain"] = "added"  # think tags as tokens of their own, or spelled with ordinary ones
    layers: int = 2
    width: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    ffn: int = 352
    rope_theta: float = 1000.0
    max_positions: int = 1024  # context length in tokens
    tied: bool = False  # head shares the embedding
