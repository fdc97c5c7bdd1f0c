"""The annotator's model in this process: each rank has an engine of its own, on its own accelerator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

from thinkmid.augment import writer
from thinkmid.augment.annotators import Outcome
from thinkmid.augment.config import AnnotateConfig
from thinkmid.augment.shards import Piece
from thinkmid.data.chat import Chat
from thinkmid.errors import UserError
from thinkmid.model import weights
from thinkmid.model.hf_config import read_config
from thinkmid.rollout.engine.build import make_engine
from thinkmid.rollout.engine.protocol import check_vllm
from thinkmid.run import identity
from thinkmid.run.interrupt import Interrupt
from thinkmid.run.ranks import start_ranks
from thinkmid.tokenizer import Tokenizer


class EngineAnnotator:
    """Thoughts by a model in this process. The engine is made when the first outcome is asked for."""

    def __init__(self, cfg: AnnotateConfig, interrupt: Interrupt):
        """Collective: each rank hashes its share of the model's files. UserError: a damaged or unsuitable model."""
        self._cfg, self._interrupt, self._folder = cfg, interrupt, Path(cfg.writer.folder)
        if cfg.engine.kind == "vllm":
            check_vllm()
        self._model_cfg, self._tokenizer = read_config(self._folder), Tokenizer.load(self._folder)
        self._chat = Chat(self._folder, self._tokenizer, thinking=cfg.writer.thinking)
        self._max_len = longest(cfg, self._model_cfg.max_positions)
        self._ranks = start_ranks()
        self._known = identity.verified(self._folder, self._ranks)
        self.model = identity.of_model(self._folder, self._tokenizer, self._known)
        self.model["chat template"] = self._chat.digest
        self.failures = Counter[str]()
        self.patience = 10  # an engine always responds

    def outcomes(self, pieces: Iterator[Piece]) -> Generator[tuple[Piece, Outcome]]:
        """Pieces with what became of them; once interrupted, what was unfinished is left out."""
        cfg = self._cfg
        engine = make_engine(
            cfg.engine, self._folder, self._model_cfg, writer.blind(self._tokenizer),
            device=self._ranks.device, max_len=self._max_len, rows=cfg.writer.max_batch,
        )  # fmt: skip
        engine.load_weights(weights.stream_folder(self._folder, cfg.engine.dtype, self._known), 0)
        write = writer.EngineWriter(
            engine=engine, tokenizer=self._tokenizer, chat=self._chat, max_len=self._max_len,
            annotator=cfg.annotator, config=cfg.writer,
        )  # fmt: skip
        yield from write(pieces, self._interrupt)


def longest(cfg: AnnotateConfig, max_positions: int) -> int:
    """Tokens of the longest prompt with its answer."""
    found = min(cfg.engine.max_len or writer.room(cfg.chunks.max_tokens, cfg.writer), max_positions)
    if found <= cfg.writer.max_tokens:
        raise UserError(f"writer.max_tokens {cfg.writer.max_tokens} leave no room for a prompt in {found} tokens")
    return found
