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
from thinkmid.rollout.engine.protocol import check_vllm
from thinkmid.rollout.judge.config import JudgeConfig, question_tokens
from thinkmid.train.config import RewardConfig, RLConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where prefixes come from."""

    paths: tuple[str, ...]  # jsonl, parquet, txt files or folders
    # where a prefix ends: at an annotated thought; in raw text at a sentence end, after a fixed or a drawn length
    prefix: Literal["thought", "sentence", "fixed", "random"] = "thought"
    length: int = 0  # fixed: tokens of text in a prefix
    max_prefix: int = 0  # tokens of the longest prefix, opened tag included; 0: what the model's context leaves
    val_paths: tuple[str, ...] = ()  # held-out text, looked at before the first step: is there something to learn?
    val_prompts: int = 32  # its prefixes that are looked at, each with batch.siblings samples
    val_every: int = 0  # steps between further looks; 0: none

    def __post_init__(self):
        if not self.paths:
            raise ValueError("paths is empty; --data.paths FILE or FOLDER")
        for name, low in (("max_prefix", 0), ("val_prompts", 1), ("val_every", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if (self.length > 0) != (self.prefix == "fixed"):
            raise ValueError(f"length {self.length} with prefix {self.prefix!r}: 'fixed' needs one, others take none")


@dataclass(frozen=True, kw_only=True)
class RLMTConfig(RLConfig):
    """RL mid-training."""

    data: DataConfig
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)

    def __post_init__(self):
        super().__post_init__()
        needs = {"reward.likelihood": self.reward.likelihood, "reward.gain": self.reward.gain}
        needs |= {"reward.prefix": self.reward.prefix, "loss.next_token": self.loss.next_token}
        if (asked := [name for name, weight in needs.items() if weight]) and not self.sampling.max_suffix:
            raise ValueError(f"{asked[0]} needs sampling.max_suffix above 0: so much of the true suffix counts")
        if self.reward.prefix and self.reward.prefix_tokens > self.sampling.max_suffix:
            sizes = f"{self.reward.prefix_tokens} exceed sampling.max_suffix {self.sampling.max_suffix}"
            raise ValueError(f"reward.prefix_tokens {sizes}")

    @property
    def keeps_frozen(self) -> bool:
        return super().keeps_frozen or "frozen" in self.reward.weights

    @property
    def ema_decay(self) -> float:
        return self.reward.decay if "ema" in self.reward.weights else 0.0


def main(argv: list[str]) -> int:
    cfg, dry_run = config.load(RLMTConfig, argv, prog="torchrun -m thinkmid.train.rlmt", description=__doc__)

    from thinkmid.model import weights
    from thinkmid.plan import memory
    from thinkmid.rollout.judge.ask import Policy, read_judge
    from thinkmid.rollout.judge.reward import make_reward
    from thinkmid.rollout.judge.rule import Unjudged
    from thinkmid.tokenizer import Tokenizer
    from thinkmid.train import corpus, rl
    from thinkmid.train.likelihood import Scores

    source = Path(cfg.model.folder)
    model_cfg, tokenizer = weights.read_config(source), Tokenizer.load(source)
    max_prefix = rl.longest_prompt(cfg, model_cfg, cfg.data.max_prefix, len(tokenizer.close_ids))
    if dry_run:
        return memory.dry_run_rl(cfg, model_cfg, max_prefix, judge_phase(cfg))
    asks = bool(cfg.reward.judge)
    theirs = read_judge(cfg.judge, cfg.engine, cfg.model.folder, model_cfg) if asks else None
    if asks and cfg.judge.kind == "resident" and cfg.judge.engine == "vllm":
        check_vllm()
    make = prompt_maker(cfg.data, tokenizer, max_prefix, cfg.run.seed)

    def read(ranks, interrupt):
        corpus.name_left_out([*cfg.data.paths, *cfg.data.val_paths], ranks)
        held_out = ranks.agree(lambda: read_held_out(cfg.data, make))
        decides = {"prompts": tokenizer.digest, "max_prefix": max_prefix, "prefix": cfg.data.prefix}
        if cfg.data.prefix != "thought":
            decides |= {"length": cfg.data.length, "seed": cfg.run.seed}
        prompts, digest = corpus.stored_prompts(cfg.data.paths, make, decides, cfg.run, ranks, interrupt)
        more = {"held_out": held_out, "notes": notes(cfg)}
        return rl.PromptSet(prompts=prompts, longest=prompts.longest, digest=digest, **more)

    def reward(prompts, engine, max_len, device, note):
        if not asks:
            return Unjudged()
        policy = Policy(
            engine=engine,
            engine_cfg=cfg.engine,
            tokenizer=tokenizer,
            sampling=cfg.sampling,
            max_len=max_len,
            device=device,
        )
        return make_reward(cfg.judge, policy, theirs, prompts, seed=cfg.run.seed, note=note)

    def scores(run, frozen):
        if cfg.reward.is_verdict:
            return None
        models = {"policy": run.model, "frozen": frozen, "ema": run.ema}
        sizes = {"max_suffix": cfg.sampling.max_suffix, "pack_tokens": cfg.batch.pack_tokens}
        return Scores(cfg.reward, models, tokenizer, run.ranks, **sizes)

    at_least = question_tokens(cfg.judge, cfg.sampling.max_suffix) if asks else 0
    more = {"at_least": at_least, "make_scores": scores, "look_every": cfg.data.val_every}
    more["judge_folder"] = cfg.judge.folder if theirs else ""
    return rl.run(cfg, source, model_cfg, tokenizer, read, reward, **more)


def judge_phase(cfg: RLMTConfig) -> dict[str, float]:
    """Bytes per rank of a resident judge, by owner; {} for others."""
    from thinkmid.model import weights
    from thinkmid.plan import memory
    from thinkmid.rollout.judge.ask import resident_engine

    if not cfg.reward.judge or cfg.judge.kind != "resident":
        return {}
    model_cfg = weights.read_config(cfg.judge.folder)
    engine, longest = resident_engine(cfg.judge, cfg.engine, cfg.sampling, model_cfg)
    rows, room = cfg.sampling.max_batch, longest - cfg.sampling.max_new
    owners = memory.rollout_phase(model_cfg, cfg.sampling, engine, room, rows)
    return {f"judge's {owner}": size for owner, size in owners.items()}


def notes(cfg: RLMTConfig) -> list[str]:
    if cfg.reward.judge or cfg.reward.prefix or cfg.loss.scope == "thought":
        return []
    return ["no reward looks at continuations, yet they are trained: loss.scope = 'thought' leaves that noise out"]


def prompt_maker(data: DataConfig, tokenizer, max_prefix: int, seed: int):
    """documents -> their prompts."""
    from thinkmid.data.prompts import at_thoughts, in_raw_text

    if data.prefix == "thought":
        return partial(at_thoughts, tokenizer=tokenizer, max_prefix=max_prefix)
    return partial(
        in_raw_text, tokenizer=tokenizer, where=data.prefix, length=data.length, max_prefix=max_prefix, seed=seed
    )


def read_held_out(data: DataConfig, make) -> list:
    """val_prompts prefixes spread evenly over the held-out text; [] without any."""
    from thinkmid.data.source import read_documents
    from thinkmid.data.store import blocks

    if not data.val_paths:
        return []
    found = [prompt for block in blocks(read_documents(data.val_paths)) for prompt in make(block)]
    if not found:
        raise UserError(f"{', '.join(data.val_paths)}: no prefix (data.prefix = {data.prefix!r})")
    return found[:: max(1, len(found) // data.val_prompts)][: data.val_prompts]


if __name__ == "__main__":
    config.run(main)
