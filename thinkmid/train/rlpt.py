"""RL post-training: questions, thoughts, answers; the reward is a rule's verdict on the answer.

torchrun --nproc-per-node 2 -m thinkmid.train.rlpt configs/mini-rlpt.toml
"""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from thinkmid import config
from thinkmid.errors import UserError, at_least
from thinkmid.rollout.grade.config import VerifyConfig
from thinkmid.train.config import RLConfig
from thinkmid.types import Prompt

if TYPE_CHECKING:
    from thinkmid.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class QuestionConfig:
    """Where questions come from and how they are put."""

    path: str  # jsonl or parquet, a file or a folder of shards
    task: str = "questions"  # its layout: questions ({"question", "answer"} rows), gsm8k-train, dapo, ...
    template: str = "boxed-think"  # words around a question; with "-think" the model starts inside its thought
    max_prompt: int = 0  # tokens of the longest prompt, longer ones are left out; 0: what the model's context leaves

    def __post_init__(self) -> None:
        at_least(self, max_prompt=0)


@dataclass(frozen=True, kw_only=True)
class RLPTConfig(RLConfig):
    """RL post-training. sampling.max_suffix is the room for the answer after the thought."""

    data: QuestionConfig
    verify: VerifyConfig = field(default_factory=VerifyConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss.next_token:
            raise ValueError(f"loss.next_token {self.loss.next_token} is for RLMT: an answer has no true suffix")


def main(argv: list[str]) -> int:
    cfg, dry_run = config.load(RLPTConfig, argv, prog="torchrun -m thinkmid.train.rlpt", description=__doc__)

    from thinkmid.plan import memory
    from thinkmid.rollout.grade.grader import make_grader
    from thinkmid.rollout.grade.reward import AnswerReward
    from thinkmid.run.interrupt import Stopped
    from thinkmid.train import rl
    from thinkmid.train.job import Inputs, Source, fingerprint_of
    from thinkmid.train.sampler import Sampler

    source = Source.read(cfg.model.folder)
    max_prompt = rl.longest_prompt(cfg, source.model_cfg, cfg.data.max_prompt, len(source.tokenizer.close_ids))
    if dry_run:
        return memory.dry_run_rl(cfg, source.model_cfg, max_prompt)
    prompts, notes = read_prompts(cfg.data, source.tokenizer, max_prompt)
    longest = max(len(p.tokens) for p in prompts)
    grader = make_grader(cfg.verify)

    ranks, interrupt = rl.start(cfg, source)
    rl.check_room(cfg, longest)
    inputs = Inputs(data=fingerprint_of(prompts), num_steps=cfg.run.steps)
    job = rl.begin(cfg, source, inputs, ranks, interrupt)
    for note in notes:
        job.log.say(f"note: {note}")
    job.log.say(f"{len(prompts)} prompts, at most {longest} tokens; starts at step {job.start}")
    with ExitStack() as stack:
        stack.callback(job.watch.rest)
        engine = rl.open_policy(job, cfg, longest).engine
        thinks = cfg.data.template.endswith("-think")
        reward = stack.enter_context(closing(AnswerReward(source.tokenizer, grader, thinks=thinks)))
        try:
            rl.train(job, cfg, Sampler(job, cfg, engine, reward), prompts)
        except Stopped:
            return job.stop()
    return rl.finish(job)


def read_prompts(data: QuestionConfig, tokenizer: Tokenizer, max_prompt: int) -> tuple[list[Prompt], list[str]]:
    """One prompt per question that fits, and lines about the others. UserError if none does."""
    from thinkmid.data import questions, templates

    loaded = questions.load(data.task, data.path)
    prompts = []
    for q in loaded.questions:
        posed = questions.posed(q)
        tokens = templates.tokens(tokenizer, templates.render(data.template, posed.text, choice=q.kind == "choice"))
        if len(tokens) <= max_prompt:
            prompts.append(Prompt(id=q.id, tokens=tokens, meta={"gold": posed.gold, "question": posed.text}))
    if not prompts:
        raise UserError(f"{data.path}: no question fits into {max_prompt} tokens")
    notes = list(loaded.notes)
    if left := len(loaded.questions) - len(prompts):
        notes.append(f"{left} of {len(loaded.questions)} questions exceed {max_prompt} tokens and are left out")
    return prompts, notes


if __name__ == "__main__":
    config.run(main)
