"""A start from nothing: a tokenizer trained on the corpus and a small model with drawn weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from thinkmid.errors import UserError

if TYPE_CHECKING:
    from thinkmid.model.transformer import ModelConfig
    from thinkmid.run.config import RunConfig
    from thinkmid.run.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class FreshConfig:
    """Shape of a model that does not exist yet. Used when model.folder is empty."""

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


def make(cfg: FreshConfig, data: tuple[str, ...], run: RunConfig, ranks: Ranks) -> Path:
    """An HF folder with a new tokenizer and drawn weights (Qwen3's form); decided by seed and texts. Collective.

    A run that goes on keeps what it began with: its text may have changed, which is for the caller to notice.
    """
    import torch

    from thinkmid.model import weights
    from thinkmid.model.transformer import init_weights
    from thinkmid.run.folder import begun
    from thinkmid.tokenizer import Tokenizer

    folder = Path(run.folder)
    if ranks.any(begun(run) and (folder / "init").exists()):
        return folder / "init"
    shape_of(cfg, cfg.vocab, ())  # numbers that make no model are refused before the tokenizer takes its minutes
    ranks.agree(lambda: _train_tokenizer(cfg, data, folder / "tokenizer") if ranks.rank == 0 else None)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    model_cfg = shape_of(cfg, tokenizer.vocab_size, tokenizer.eos_ids)
    model = weights.build(model_cfg)
    init_weights(model, run.seed)
    weights.save(
        folder / "init", model_cfg, weights.stream(model), dtype=torch.float32, extra_files=folder / "tokenizer"
    )
    return folder / "init"


def _train_tokenizer(cfg: FreshConfig, data: tuple[str, ...], folder: Path) -> None:
    from thinkmid.data.source import read_documents
    from thinkmid.run.folder import hold
    from thinkmid.tokenizer import train_tokenizer

    def texts():
        for doc in read_documents(cfg.tokenizer_data or data):
            yield doc.text
        hold(folder.parent)  # nothing is wrong with them, and what is written comes now

    train_tokenizer(texts(), cfg.vocab, folder, cfg.tags)


def shape_of(cfg: FreshConfig, vocab: int, eos_ids: tuple[int, ...]) -> ModelConfig:
    """UserError where the numbers make no model."""
    from thinkmid.model.transformer import ModelConfig

    same = ("width", "layers", "heads", "kv_heads", "head_dim", "ffn", "rope_theta", "tied", "max_positions")
    try:
        numbers = {name: getattr(cfg, name) for name in same}
        return ModelConfig(kind="qwen3", vocab=vocab, norm_eps=1e-6, eos_ids=eos_ids, **numbers)
    except ValueError as error:
        raise UserError(f"fresh: {error}") from None
