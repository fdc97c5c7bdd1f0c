"""RL mid-training: from a prefix the policy thinks, then continues the text; a judge compares with the real one.

torchrun --nproc-per-node 2 -m thinkmid.train.rlmt configs/mini-rlmt.toml
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from thinkmid import config
from thinkmid.errors import UserError
from thinkmid.rollout.engine import check_vllm
from thinkmid.rollout.judging import JudgeConfig, make_ask, make_reward, question_tokens, read_judge
from thinkmid.train.config import RLConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where prefixes come from."""

    paths: tuple[str, ...]  # jsonl, parquet, txt files or folders
    # where a prefix ends: at an annotated thought; in raw text at a sentence end, after a fixed or a drawn length
    prefix: Literal["thought", "sentence", "fixed", "random"] = "thought"
    length: int = 0  # fixed: tokens of text in a prefix
    max_prefix: int = 0  # tokens of the longest prefix, opened tag included; 0: what the model's context leaves

    def __post_init__(self):
        if not self.paths:
            raise ValueError("paths is empty; --data.paths FILE or FOLDER")
        if self.max_prefix < 0:
            raise ValueError(f"max_prefix must be 0 or more, got {self.max_prefix}")
        if (self.length > 0) != (self.prefix == "fixed"):
            raise ValueError(f"length {self.length} with prefix {self.prefix!r}: 'fixed' needs one, others take none")


@dataclass(frozen=True, kw_only=True)
class RLMTConfig(RLConfig):
    """RL mid-training."""

    data: DataConfig
    judge: JudgeConfig = field(default_factory=JudgeConfig)


def main(argv: list[str]) -> int:
    cfg, dry_run = config.load(RLMTConfig, argv, prog="torchrun -m thinkmid.train.rlmt", description=__doc__)

    from thinkmid.model import weights
    from thinkmid.text import Text
    from thinkmid.train import memory, rl

    source = Path(cfg.model.folder)
    shape, text = weights.read_config(source), Text.load(source)
    max_prefix = rl.longest_prompt(cfg, shape, cfg.data.max_prefix, len(text.close_ids))
    if dry_run:
        return memory.dry_run_rl(cfg, shape, max_prefix)
    theirs = read_judge(cfg.judge, cfg.engine, cfg.model.folder, shape)
    if cfg.judge.kind == "resident" and cfg.judge.engine == "vllm":
        check_vllm()
    prompts = read_prompts(cfg.data, text, max_prefix, cfg.run.seed)
    longest = max(len(p.tokens) for p in prompts) + cfg.sampling.max_new
    longest = min(max(longest, question_tokens(cfg.judge, cfg.sampling.max_suffix)), shape.max_positions)

    def reward(engine, device):
        max_len = cfg.engine.max_len or longest
        ask, close = make_ask(cfg.judge, cfg.engine, cfg.sampling, engine, text, theirs, device, max_len)
        references = [p.meta["reference"] for p in prompts]
        return make_reward(cfg.judge, cfg.sampling, text, ask, references, cfg.run.seed), close

    return rl.run(cfg, source, shape, text, prompts, reward, longest)


def read_prompts(data: DataConfig, text, max_prefix: int, seed: int) -> list:
    from thinkmid.data.prompts import at_thoughts, in_raw_text
    from thinkmid.data.source import read_documents

    documents = read_documents(data.paths)
    if data.prefix == "thought":
        prompts = list(at_thoughts(documents, text, max_prefix=max_prefix))
    else:
        where = {"where": data.prefix, "length": data.length}
        prompts = list(in_raw_text(documents, text, **where, max_prefix=max_prefix, seed=seed))
    if not prompts:
        raise UserError(f"{', '.join(data.paths)}: no prefix (data.prefix = {data.prefix!r})")
    return prompts


if __name__ == "__main__":
    config.run(main)
