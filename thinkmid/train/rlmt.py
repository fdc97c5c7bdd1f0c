"""RL mid-training: from a prefix the policy thinks, then continues the text; a judge compares with the real one.

torchrun --nproc-per-node 2 -m thinkmid.train.rlmt configs/mini-rlmt.toml
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from thinkmid import config
from thinkmid.errors import UserError, at_least
from thinkmid.rollout.engine.protocol import check_vllm
from thinkmid.rollout.judge.config import JudgeConfig, question_tokens
from thinkmid.train.config import RewardConfig, RLConfig
from thinkmid.types import Prompt

if TYPE_CHECKING:
    from thinkmid.data.prompts import StoredPrompts
    from thinkmid.rollout.verdict import Reward
    from thinkmid.run.interrupt import Interrupt
    from thinkmid.run.ranks import Ranks
    from thinkmid.tokenizer import Tokenizer
    from thinkmid.train.corpus import MakePrompts
    from thinkmid.train.job import Job
    from thinkmid.train.likelihood import Scores


@dataclass(frozen=True, kw_only=True)
class RLMTData:
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
        at_least(self, max_prefix=0, val_prompts=1, val_every=0)
        if (self.length > 0) != (self.prefix == "fixed"):
            raise ValueError(f"length {self.length} with prefix {self.prefix!r}: 'fixed' needs one, others take none")


@dataclass(frozen=True, kw_only=True)
class RLMTConfig(RLConfig):
    """RL mid-training."""

    data: RLMTData
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


def main(argv: list[str]) -> int:
    cfg, dry_run = config.load(RLMTConfig, argv, prog="torchrun -m thinkmid.train.rlmt", description=__doc__)

    from thinkmid.plan import memory
    from thinkmid.rollout.judge import ask, rule
    from thinkmid.rollout.judge import reward as rewards
    from thinkmid.run.interrupt import Stopped
    from thinkmid.train import rl
    from thinkmid.train.job import Inputs, Source, fingerprint_of
    from thinkmid.train.sampler import Sampler

    source = Source.read(cfg.model.folder)
    max_prefix = rl.longest_prompt(cfg, source.model_cfg, cfg.data.max_prefix, len(source.tokenizer.close_ids))
    if dry_run:
        return memory.dry_run_rl(cfg, source.model_cfg, max_prefix, judge_phase(cfg))
    is_judged = bool(cfg.reward.judge)
    judge = ask.read_judge(cfg.judge, cfg.engine, cfg.model.folder, source.model_cfg) if is_judged else None
    if judge and cfg.judge.kind == "resident" and cfg.judge.engine == "vllm":
        check_vllm()

    ranks, interrupt = rl.start(cfg, source)
    prompts, digest, held_out = read_data(cfg, source.tokenizer, max_prefix, ranks, interrupt)
    longest = max([prompts.longest, *(len(p.tokens) for p in held_out)])
    rl.check_room(cfg, longest)

    frozen = {"judge's weights": Path(cfg.judge.folder)} if judge else {}
    inputs = Inputs(data=digest, held_out=fingerprint_of(held_out), num_steps=cfg.run.steps, frozen=frozen)
    job = rl.begin(cfg, source, inputs, ranks, interrupt)
    job.log.say(f"{len(prompts)} prompts, at most {prompts.longest} tokens; starts at step {job.start}")
    for note in notes(cfg):
        job.log.say(f"note: {note}")
    with ExitStack() as stack:
        stack.callback(job.watch.rest)
        policy = rl.open_policy(job, cfg, longest, question_tokens(cfg.judge, cfg.sampling.max_suffix) * is_judged)
        reward: Reward = rule.Unjudged()
        if is_judged:
            reward = rewards.make_reward(cfg.judge, policy, judge, prompts, seed=cfg.run.seed, note=job.log.note)
        stack.callback(reward.close)
        sampler = Sampler(job, cfg, policy.engine, reward)
        try:
            rl.train(job, cfg, sampler, prompts, scores_of(job, cfg), rl.Validation.of(held_out, cfg.data.val_every))
        except Stopped:
            return job.stop()
    return rl.finish(job)


def judge_phase(cfg: RLMTConfig) -> dict[str, float]:
    """Bytes per rank of a resident judge, by owner; {} for others."""
    from thinkmid.model.hf_config import read_config
    from thinkmid.plan import memory
    from thinkmid.rollout.judge.ask import resident_engine

    if not cfg.reward.judge or cfg.judge.kind != "resident":
        return {}
    model_cfg = read_config(cfg.judge.folder)
    engine, longest = resident_engine(cfg.judge, cfg.engine, cfg.sampling, model_cfg)
    rows, room = cfg.sampling.max_batch, longest - cfg.sampling.max_new
    owners = memory.rollout_phase(model_cfg, cfg.sampling, engine, room, rows)
    return {f"judge's {owner}": size for owner, size in owners.items()}


def notes(cfg: RLMTConfig) -> list[str]:
    if cfg.reward.judge or cfg.reward.prefix or cfg.loss.scope == "thought":
        return []
    return ["no reward looks at continuations, yet they are trained: loss.scope = 'thought' leaves that noise out"]


def read_data(
    cfg: RLMTConfig, tokenizer: Tokenizer, max_prefix: int, ranks: Ranks, interrupt: Interrupt
) -> tuple[StoredPrompts, str, list[Prompt]]:
    """The prompts, their digest, and the held-out prompts. Collective."""
    from thinkmid.data.prompts import at_thoughts, in_raw_text
    from thinkmid.train import corpus

    data, seed = cfg.data, cfg.run.seed
    corpus.name_left_out([*data.paths, *data.val_paths], ranks)
    decides: dict[str, Any] = {"prompts": tokenizer.digest, "max_prefix": max_prefix, "prefix": data.prefix}
    if data.prefix == "thought":
        make: corpus.MakePrompts = partial(at_thoughts, tokenizer=tokenizer, max_prefix=max_prefix)
    else:
        decides |= {"length": data.length, "seed": seed}
        cut = partial(in_raw_text, where=data.prefix, length=data.length, seed=seed)
        make = partial(cut, tokenizer=tokenizer, max_prefix=max_prefix)
    held_out = ranks.run_on_all(read_held_out, data, make) if data.val_paths else []
    prompts, digest = corpus.stored_prompts(data.paths, make, decides, cfg.run, ranks, interrupt)
    return prompts, digest, held_out


def read_held_out(data: RLMTData, make: MakePrompts) -> list[Prompt]:
    """val_prompts prefixes spread evenly over the held-out text."""
    from thinkmid.data.source import read_documents
    from thinkmid.data.store import blocks

    prompts = [prompt for block in blocks(read_documents(data.val_paths)) for prompt in make(block)]
    if not prompts:
        raise UserError(f"{', '.join(data.val_paths)}: no prefix (data.prefix = {data.prefix!r})")
    return prompts[:: max(1, len(prompts) // data.val_prompts)][: data.val_prompts]


def scores_of(job: Job, cfg: RLMTConfig) -> Scores | None:
    """The terms of the reward beside the judge's verdict; None where the verdict is all."""
    from thinkmid.train.likelihood import Scores

    if cfg.reward.is_verdict:
        return None
    models = {"policy": job.model, "frozen": job.frozen, "ema": job.ema}
    max_suffix, pack_tokens = cfg.sampling.max_suffix, cfg.batch.pack_tokens
    return Scores(cfg.reward, models, job.tokenizer, job.ranks, max_suffix=max_suffix, pack_tokens=pack_tokens)


if __name__ == "__main__":
    config.run(main)
