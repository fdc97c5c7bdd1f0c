"""RL post-training: questions, thoughts, answers; the reward is a rule's verdict on the answer.

torchrun --nproc-per-node 2 -m thinkmid.train.rlpt configs/mini-rlpt.toml
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from thinkmid import config
from thinkmid.errors import UserError
from thinkmid.rollout.grade.config import VerifyConfig
from thinkmid.train.config import RLConfig


@dataclass(frozen=True, kw_only=True)
class QuestionConfig:
    """Where questions come from and how they are put."""

    path: str  # jsonl or parquet, a file or a folder of shards
    task: str = "questions"  # its layout: questions ({"question", "answer"} rows), gsm8k-train, dapo, ...
    template: str = "boxed-think"  # words around a question; with "-think" the model starts inside its thought
    max_prompt: int = 0  # tokens of the longest prompt, longer ones are left out; 0: what the model's context leaves

    def __post_init__(self):
        if self.max_prompt < 0:
            raise ValueError(f"max_prompt must be 0 or more, got {self.max_prompt}")


@dataclass(frozen=True, kw_only=True)
class RLPTConfig(RLConfig):
    """RL post-training. sampling.max_suffix is the room for the answer after the thought."""

    data: QuestionConfig
    verify: VerifyConfig = field(default_factory=VerifyConfig)

    def __post_init__(self):
        super().__post_init__()
        if self.loss.next_token:
            raise ValueError(f"loss.next_token {self.loss.next_token} is for RLMT: an answer has no true suffix")


def main(argv: list[str]) -> int:
    cfg, dry_run = config.load(RLPTConfig, argv, prog="torchrun -m thinkmid.train.rlpt", description=__doc__)

    from thinkmid.model import weights
    from thinkmid.plan import memory
    from thinkmid.rollout.grade.grader import make_grader
    from thinkmid.rollout.grade.reward import AnswerReward
    from thinkmid.tokenizer import Tokenizer
    from thinkmid.train import job, rl

    source = Path(cfg.model.folder)
    model_cfg, tokenizer = weights.read_config(source), Tokenizer.load(source)
    max_prompt = rl.longest_prompt(cfg, model_cfg, cfg.data.max_prompt, len(tokenizer.close_ids))
    if dry_run:
        return memory.dry_run_rl(cfg, model_cfg, max_prompt)
    prompts, notes = read_prompts(cfg.data, tokenizer, max_prompt)
    longest, digest = max(len(p.tokens) for p in prompts), job.fingerprint_of(prompts)
    questions = rl.PromptSet(prompts=prompts, longest=longest, digest=digest, notes=notes)
    grader = make_grader(cfg.verify)

    def reward(prompts, engine, max_len, device, note):
        return AnswerReward(tokenizer, grader, thinks=cfg.data.template.endswith("-think"))

    return rl.run(cfg, source, model_cfg, tokenizer, lambda *_: questions, reward)


def read_prompts(data: QuestionConfig, tokenizer, max_prompt: int) -> tuple[list, list[str]]:
    """One prompt per question that fits, and what to say about the others. UserError if none does."""
    from thinkmid.data import questions, templates
    from thinkmid.types import Prompt

    loaded = questions.load(data.task, data.path)
    found = []
    for q in loaded.questions:
        posed = questions.posed(q)
        tokens = templates.tokens(tokenizer, templates.render(data.template, posed.text, choice=q.kind == "choice"))
        if len(tokens) <= max_prompt:
            found.append(Prompt(id=q.id, tokens=tokens, meta={"gold": posed.gold, "question": posed.text}))
    if not found:
        raise UserError(f"{data.path}: no question fits into {max_prompt} tokens")
    notes = list(loaded.notes)
    if left := len(loaded.questions) - len(found):
        notes.append(f"{left} of {len(loaded.questions)} questions exceed {max_prompt} tokens and are left out")
    return found, notes


if __name__ == "__main__":
    config.run(main)
