"""A start from nothing: a tokenizer trained on the corpus and a small model with drawn weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from thinkmid.data.source import read_documents
from thinkmid.model import weights
from thinkmid.model.init import FreshConfig
from thinkmid.model.transformer import fresh_model_cfg, init_weights
from thinkmid.run.config import RunConfig
from thinkmid.run.folder import begun, hold
from thinkmid.run.ranks import Ranks
from thinkmid.tokenizer import Tokenizer, train_tokenizer
from thinkmid.train.config import SFTData


def make(cfg: FreshConfig, data: SFTData, run: RunConfig, ranks: Ranks) -> Path:
    """An HF folder with a new tokenizer and drawn weights (Qwen3's form); decided by seed and texts. Collective.

    A resumed run keeps what it began with: its text may have changed, which is for the caller to notice.
    """
    folder = Path(run.folder)
    made = folder / "init"
    if ranks.any(begun(run) and made.exists()):
        return made
    fresh_model_cfg(cfg, cfg.vocab, ())  # sizes that make no model are refused before the tokenizer takes its minutes
    ranks.run_on_first(_train_tokenizer, cfg, data, folder / "tokenizer")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    model_cfg = fresh_model_cfg(cfg, tokenizer.vocab_size, tokenizer.eos_ids)
    model = weights.build(model_cfg)
    init_weights(model, run.seed)
    weights.save(made, model_cfg, weights.stream(model), dtype=torch.float32, extra_files=folder / "tokenizer")
    return made


def _train_tokenizer(cfg: FreshConfig, data: SFTData, folder: Path) -> None:
    train_tokenizer(_texts(cfg.tokenizer_data or data.paths, data.column, folder.parent), cfg.vocab, folder, cfg.tags)


def _texts(paths: tuple[str, ...], column: str, run_folder: Path) -> Iterator[str]:
    for doc in read_documents(paths, column):
        yield doc.text
    hold(run_folder)  # nothing is wrong with them, and what is written comes now
