"""RL mid-training: from a prefix the policy thinks, then continues the text; a judge compares with the real one.

torchrun --nproc-per-node 2 -m thinkmid.train.rlmt configs/mini-rlmt.toml
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from thinkmid import config
from thinkmid.errors import UserError
from thinkmid.train.config import RLConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where prefixes come from."""

    paths: tuple[str, ...]  # jsonl, parquet, txt files or folders
    prefix: Literal["thought", "sentence"] = "thought"  # ends at an annotated thought, or at a sentence end of raw text
    max_prefix: int = 0  # tokens of the longest prefix, opened tag included; 0: what the model's context leaves

    def __post_init__(self):
        if not self.paths:
            raise ValueError("paths is empty; --data.paths FILE or FOLDER")
        if self.max_prefix < 0:
            raise ValueError(f"max_prefix must be 0 or more, got {self.max_prefix}")


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Who says whether a continuation matches."""

    kind: Literal["match"] = "match"  # by rule: numbers of the first sentence, else word overlap
    overlap: float = 0.6  # match: word F1 from which sentences without numbers agree

    def __post_init__(self):
        if not 0 < self.overlap <= 1:
            raise ValueError(f"overlap must lie in (0, 1], got {self.overlap}")


@dataclass(frozen=True, kw_only=True)
class RLMTConfig(RLConfig):
    """RL mid-training."""

    data: DataConfig
    judge: JudgeConfig = field(default_factory=JudgeConfig)


def main(argv: list[str]) -> int:
    cfg, dry_run = config.load(RLMTConfig, argv, prog="torchrun -m thinkmid.train.rlmt", description=__doc__)

    from thinkmid.model import weights
    from thinkmid.rollout.judge import judge_groups, match
    from thinkmid.rollout.native import NativeEngine
    from thinkmid.text import Text
    from thinkmid.train import job, memory, rl, shard
    from thinkmid.train.interrupt import Interrupt

    source = Path(cfg.model.folder)
    shape, text = weights.read_config(source), Text.load(source)
    max_prefix = longest_prefix(cfg, shape, len(text.close_ids))
    if dry_run:
        return memory.dry_run_rl(cfg, shape, max_prefix)
    interrupt, ranks = Interrupt(), shard.start()
    prompts = read_prompts(cfg.data, text, max_prefix, cfg.run.seed)
    data = job.fingerprint(p.tokens for p in prompts)
    job.claim_folder(cfg, ranks)
    run, step, state = job.open_job(cfg, source, shape, text, data=data, ranks=ranks, interrupt=interrupt)
    run.log.say(f"{len(prompts)} prefixes, at most {max(len(p.tokens) for p in prompts)} tokens; starts at step {step}")
    reference = job.sharded_model(source, shape, cfg.model, ranks) if cfg.loss.kl else None
    engine = NativeEngine(shape, text, device=ranks.device)
    reward = partial(
        judge_groups, text=text, judge=partial(match, overlap=cfg.judge.overlap), max_suffix=cfg.sampling.max_suffix
    )
    code = rl.train(run, cfg, engine, prompts, reward, step=step, state=state, reference=reference)
    if code == 0:
        folder = run.export()
        if ranks.rank == 0:
            run.log.say(rl.summary(run.folder))
        run.log.say(f"{folder} holds the model")
        job.draw_curves(run)
    run.log.close()
    return code


def longest_prefix(cfg: RLMTConfig, shape, num_close: int) -> int:
    """Tokens a prefix may have. UserError if the context or a pack does not hold it and the new tokens."""
    s, asked = cfg.sampling, max(cfg.data.max_prefix, 2)
    if s.force_close and s.max_think < num_close:
        raise UserError(f"sampling.force_close: max_think {s.max_think} cannot hold the {num_close} tokens of </think>")
    rooms = {f"the context of {cfg.model.folder}": shape.max_positions, "batch.pack_tokens": cfg.batch.pack_tokens}
    for name, room in rooms.items():
        if asked + s.max_new > room:
            new = f"sampling.max_think {s.max_think} + sampling.max_suffix {s.max_suffix}"
            raise UserError(f"a prefix of {asked} tokens + {new} exceed {name}: {room}")
    return cfg.data.max_prefix or min(rooms.values()) - s.max_new


def read_prompts(data: DataConfig, text, max_prefix: int, seed: int) -> list:
    from thinkmid.data.prompts import at_sentences, at_thoughts
    from thinkmid.data.source import read_documents

    documents = read_documents(data.paths)
    if data.prefix == "thought":
        prompts = list(at_thoughts(documents, text, max_prefix=max_prefix))
    else:
        prompts = list(at_sentences(documents, text, max_prefix=max_prefix, seed=seed))
    if not prompts:
        raise UserError(f"{', '.join(data.paths)}: no prefix (data.prefix = {data.prefix!r})")
    return prompts


if __name__ == "__main__":
    config.run(main)
