"""RL mid-training: from a prefix the policy thinks, then continues the text; a judge compares with the real one.

torchrun --nproc-per-node 2 -m thinkmid.train.rlmt configs/mini-rlmt.toml
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from thinkmid import config
from thinkmid.errors import UserError
from thinkmid.rollout.engine.protocol import check_vllm
from thinkmid.rollout.judge.config import (
    JudgeConfig,
    make_ask,
    make_reward,
    question_tokens,
    read_judge,
    resident_engine,
)
from thinkmid.rollout.verdict import Pending, Verdict
from thinkmid.train.config import RewardConfig, RLConfig
from thinkmid.types import Prompt, Sample, Tally

if TYPE_CHECKING:
    from thinkmid.data.source import Document
    from thinkmid.model.transformer import ModelConfig
    from thinkmid.rollout.engine.protocol import Engine
    from thinkmid.run.log import Log
    from thinkmid.tokenizer import Tokenizer
    from thinkmid.train.draw import Reward
    from thinkmid.train.job import Job
    from thinkmid.train.likelihood import Scores


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where prefixes come from."""

    paths: tuple[str, ...]  # jsonl, parquet, txt files or folders
    # where a prefix ends: at an annotated thought; in raw text at a sentence end, after a fixed or a drawn length
    prefix: Literal["thought", "sentence", "fixed", "random"] = "thought"
    length: int = 0  # fixed: tokens of text in a prefix
    max_prefix: int = 0  # tokens of the longest prefix, opened tag included; 0: what the model's context leaves
    val_paths: tuple[str, ...] = ()  # held-out text, validated on before the first step: is there something to learn?
    val_prompts: int = 32  # number of its prefixes, each with batch.siblings samples
    val_every: int = 0  # steps between further validations; 0: none

    def __post_init__(self) -> None:
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

    def __post_init__(self) -> None:
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


class Unjudged:
    """The verdicts of a run whose rewards come from the text alone: 0 for every sample, and nobody is asked."""

    def __call__(self, prompt: Prompt, sample: Sample) -> Pending:
        return _not_asked

    def finish(self, step: int) -> Tally:
        return {}


def _not_asked() -> Verdict:
    return Verdict(0, "")


def main(argv: list[str]) -> int:
    cfg, dry_run = config.load(RLMTConfig, argv, prog="torchrun -m thinkmid.train.rlmt", description=__doc__)

    from thinkmid.plan import memory
    from thinkmid.run.interrupt import Stopped
    from thinkmid.train import corpus, rl
    from thinkmid.train.job import Inputs, Source, fingerprint_of
    from thinkmid.train.sampler import Sampler

    source = Source.read(cfg.model.folder)
    max_prefix = rl.longest_prompt(cfg, source.model_cfg, cfg.data.max_prefix, len(source.tokenizer.close_ids))
    if dry_run:
        return memory.dry_run_rl(cfg, source.model_cfg, max_prefix, judge_phase(cfg))
    judge = read_own_judge(cfg, source.model_cfg)

    ranks, interrupt = rl.start(cfg, source)
    corpus.name_left_out([*cfg.data.paths, *cfg.data.val_paths], ranks)
    make = prompt_maker(cfg.data, source.tokenizer, max_prefix, cfg.run.seed)
    held_out = ranks.run_on_all(read_held_out, cfg.data, make)
    decides = what_decides(cfg, source.tokenizer, max_prefix)
    prompts, digest = corpus.stored_prompts(cfg.data.paths, make, decides, cfg.run, ranks, interrupt)
    longest = max([prompts.longest, *(len(p.tokens) for p in held_out)])
    rl.check_room(cfg, longest)

    inputs = Inputs(
        data=digest,
        held_out=fingerprint_of(held_out),
        num_steps=cfg.run.steps,
        frozen={"judge's weights": Path(cfg.judge.folder)} if judge else {},
    )
    job = rl.begin(cfg, source, inputs, ranks, interrupt)
    job.log.say(f"{len(prompts)} prompts, at most {prompts.longest} tokens; starts at step {job.start}")
    note_untaught_suffix(cfg, job.log)
    questions = question_tokens(cfg.judge, cfg.sampling.max_suffix) if cfg.reward.judge else 0
    max_len = min(max(longest + cfg.sampling.max_new, questions), source.model_cfg.max_positions)
    with ExitStack() as stack:
        stack.callback(job.watch.rest)
        engine = rl.open_engine(job, cfg, max_len)
        reward = open_reward(stack, job, cfg, engine, judge, prompts, max_len)
        validation = rl.Validation(prompts=held_out, every=cfg.data.val_every) if held_out else None
        try:
            rl.train(job, cfg, Sampler(job, cfg, engine, reward), prompts, scores_of(job, cfg), validation)
        except Stopped:
            return job.stop()
    return rl.finish(job)


def read_own_judge(cfg: RLMTConfig, model_cfg: ModelConfig) -> tuple[ModelConfig, Tokenizer] | None:
    """(config, tokenizer) of a judge that has weights of its own; None for others. UserError if it cannot judge."""
    if not cfg.reward.judge:
        return None
    if cfg.judge.kind == "resident" and cfg.judge.engine == "vllm":
        check_vllm()
    return read_judge(cfg.judge, cfg.engine, cfg.model.folder, model_cfg)


def judge_phase(cfg: RLMTConfig) -> dict[str, float]:
    """Bytes per rank of a resident judge, by owner; {} for others."""
    from thinkmid.model.hf_config import read_config
    from thinkmid.plan import memory

    if not cfg.reward.judge or cfg.judge.kind != "resident":
        return {}
    model_cfg = read_config(cfg.judge.folder)
    engine, longest = resident_engine(cfg.judge, cfg.engine, cfg.sampling, model_cfg)
    rows, room = cfg.sampling.max_batch, longest - cfg.sampling.max_new
    owners = memory.rollout_phase(model_cfg, cfg.sampling, engine, room, rows)
    return {f"judge's {owner}": size for owner, size in owners.items()}


def open_reward(
    stack: ExitStack,
    job: Job,
    cfg: RLMTConfig,
    engine: Engine,
    judge: tuple[ModelConfig, Tokenizer] | None,
    prompts: Sequence[Prompt],
    max_len: int,
) -> Reward:
    """The judge that the configuration names, closed with the stack. max_len: tokens of the policy's engine."""
    if not cfg.reward.judge:
        return Unjudged()
    ask, close = make_ask(
        cfg.judge,
        cfg.engine,
        cfg.sampling,
        engine,
        job.tokenizer,
        judge,
        job.ranks.device,
        cfg.engine.max_len or max_len,
        job.log.note,
    )
    stack.callback(close)
    return make_reward(cfg.judge, cfg.sampling, job.tokenizer, ask, prompts, cfg.run.seed)


def scores_of(job: Job, cfg: RLMTConfig) -> Scores | None:
    """The terms of the reward beside the judge's verdict; None where that is all."""
    from thinkmid.train.likelihood import Scores

    if cfg.reward.is_verdict:
        return None
    models = {"policy": job.model, "frozen": job.frozen, "ema": job.ema}
    return Scores(
        cfg.reward,
        {name: model for name, model in models.items() if model is not None},
        job.tokenizer,
        job.ranks,
        max_suffix=cfg.sampling.max_suffix,
        pack_tokens=cfg.batch.pack_tokens,
    )


def note_untaught_suffix(cfg: RLMTConfig, log: Log) -> None:
    if not (cfg.reward.judge or cfg.reward.prefix or cfg.loss.scope == "thought"):
        log.say(
            "note: no reward looks at continuations, yet they are trained: loss.scope = 'thought' leaves that noise out"
        )


def what_decides(cfg: RLMTConfig, tokenizer: Tokenizer, max_prefix: int) -> dict[str, Any]:
    """What decides the prompts, beside the documents."""
    decides = {"prompts": tokenizer.digest, "max_prefix": max_prefix, "prefix": cfg.data.prefix}
    if cfg.data.prefix != "thought":
        decides |= {"length": cfg.data.length, "seed": cfg.run.seed}
    return decides


def prompt_maker(
    data: DataConfig, tokenizer: Tokenizer, max_prefix: int, seed: int
) -> Callable[[Iterable[Document]], Iterable[Prompt]]:
    """documents -> their prompts."""
    from thinkmid.data.prompts import at_thoughts, in_raw_text

    if data.prefix == "thought":
        return partial(at_thoughts, tokenizer=tokenizer, max_prefix=max_prefix)
    return partial(
        in_raw_text, tokenizer=tokenizer, where=data.prefix, length=data.length, max_prefix=max_prefix, seed=seed
    )


def read_held_out(data: DataConfig, make: Callable[[Iterable[Document]], Iterable[Prompt]]) -> list[Prompt]:
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
