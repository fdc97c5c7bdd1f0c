"""Annotation in the miniature world: as thinkmid.augment.annotate, with thoughts by the world's rules.

python -m thinkmid.mini.annotate configs/mini-annotate.toml
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator

from thinkmid import config
from thinkmid.augment import job
from thinkmid.augment.annotators import AnnotatorConfig, Outcome, unfit
from thinkmid.augment.check import Refused, accept
from thinkmid.augment.config import AnnotateConfig
from thinkmid.augment.shards import Piece
from thinkmid.errors import UserError
from thinkmid.mini.annotator import annotate
from thinkmid.run.interrupt import Interrupt


class RulesAnnotator:
    """Thoughts by the rules of the miniature world, no calls."""

    def __init__(self, cfg: AnnotatorConfig, interrupt: Interrupt):
        self._cfg, self._interrupt = cfg, interrupt
        self.model: dict[str, str] = {}
        self.failures = Counter[str]()
        self.patience = 10  # rules always respond

    def outcomes(self, pieces: Iterator[Piece]) -> Generator[tuple[Piece, Outcome]]:
        """Pieces with what became of them; none once interrupted."""
        for piece in pieces:
            if self._interrupt.requested:
                return
            yield piece, by_rules(piece.chunk, self._cfg)


def by_rules(chunk: str, cfg: AnnotatorConfig) -> Outcome:
    if refused := unfit(chunk, cfg):
        return Outcome(refused=refused)
    try:
        woven = accept(chunk, annotate(chunk), min_thoughts=cfg.min_thoughts, max_thought=cfg.max_thought)
    except Refused as error:
        return Outcome(refused=str(error))
    return Outcome(text=woven)


def main(argv: list[str]) -> int:
    prog = "python -m thinkmid.mini.annotate"
    cfg, dry_run = config.load(AnnotateConfig, argv, prog=prog, description=__doc__ or "")
    if dry_run:
        print(config.to_toml(cfg), end="")
        return 0
    if cfg.annotator.kind != "rules":
        raise UserError(f"annotator.kind must be 'rules' here, got {cfg.annotator.kind!r}")
    interrupt = Interrupt()
    return job.run(cfg, RulesAnnotator(cfg.annotator, interrupt), interrupt)


if __name__ == "__main__":
    config.run(main)
