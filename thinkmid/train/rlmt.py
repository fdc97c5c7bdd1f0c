"""RL mid-training: from a prefix the policy thinks, then continues the text; a judge compares with the real one.

torchrun --nproc-per-node 2 -m thinkmid.train.rlmt configs/mini-rlmt.toml
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from thinkmid import config
from thinkmid.errors import UserError
from thinkmid.rollout import templates
from thinkmid.train.config import RLConfig

CANARIES = 9  # references in a look at the judge
QUESTION_TOKENS = 640  # of a judge's instructions, for tokenizers that need two characters a token


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

    # match: by rule; policy: the engine's current weights; swap: another model of the same shape, whose weights take
    # their place after the rollouts; resident: a small model in an engine of its own; remote: OpenAI-compatible
    kind: Literal["match", "policy", "swap", "resident", "remote"] = "match"
    overlap: float = 0.6  # match: word F1 from which sentences without numbers agree
    folder: str = ""  # swap, resident: Hugging Face folder of the judge
    engine: Literal["native", "vllm"] = "native"  # resident: what runs it
    template: str = "same-meaning"  # of the question: same-meaning, very-similar, semantic-prefix, short
    votes: int = 1  # questions per continuation, each with another nonce
    combine: Literal["mean", "majority"] = "mean"  # of the votes' P(yes)
    retries: int = 1  # of a vote that failed
    canary_every: int = 10  # steps between questions whose answer is known; 0: never
    canary_min: float = 0.7  # share of them, in the worst of their kinds, that must be right
    url: str = ""  # remote: where /chat/completions lies, up to /v1
    model: str = ""  # remote: its name there
    key_env: str = "OPENAI_API_KEY"  # remote: environment variable that holds the key; may be unset
    timeout_s: float = 30.0  # remote: for one answer
    workers: int = 16  # remote: questions on their way at a time

    def __post_init__(self):
        if not 0 < self.overlap <= 1:
            raise ValueError(f"overlap must lie in (0, 1], got {self.overlap}")
        if not 0 <= self.canary_min <= 1:
            raise ValueError(f"canary_min must lie in [0, 1], got {self.canary_min}")
        for name, low in (("votes", 1), ("retries", 0), ("canary_every", 0), ("workers", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, got {self.timeout_s}")
        needs = {"swap": ("folder",), "resident": ("folder",), "remote": ("url", "model")}
        for name in needs.get(self.kind, ()):
            if not getattr(self, name):
                raise ValueError(f"kind {self.kind!r} needs {name}")
        templates.find(self.template)


@dataclass(frozen=True, kw_only=True)
class RLMTConfig(RLConfig):
    """RL mid-training."""

    data: DataConfig
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def __post_init__(self):
        super().__post_init__()
        if self.judge.kind == "resident" and self.judge.engine == "vllm" and self.engine.tensor_parallel > 1:
            raise ValueError(
                "judge.engine 'vllm' beside an engine with tensor_parallel: one process, one layout of ranks"
            )


def main(argv: list[str]) -> int:
    cfg, dry_run = config.load(RLMTConfig, argv, prog="torchrun -m thinkmid.train.rlmt", description=__doc__)

    from thinkmid.model import weights
    from thinkmid.text import Text
    from thinkmid.train import job, memory, rl, shard
    from thinkmid.train.interrupt import Interrupt

    source = Path(cfg.model.folder)
    shape, text = weights.read_config(source), Text.load(source)
    max_prefix = longest_prefix(cfg, shape, len(text.close_ids))
    if dry_run:
        return memory.dry_run_rl(cfg, shape, max_prefix)
    theirs = read_judge(cfg, shape)
    if "vllm" in (cfg.engine.kind, cfg.judge.kind == "resident" and cfg.judge.engine):
        from thinkmid.rollout.vllm import check_version

        check_version()
    interrupt, ranks = Interrupt(), shard.start()
    if ranks.world % cfg.engine.tensor_parallel:
        raise UserError(f"engine.tensor_parallel {cfg.engine.tensor_parallel} does not divide {ranks.world} ranks")
    prompts = read_prompts(cfg.data, text, max_prefix, cfg.run.seed)
    data = job.fingerprint(p.tokens for p in prompts)
    job.claim_folder(cfg, ranks)
    run, step, state = job.open_job(cfg, source, shape, text, data=data, ranks=ranks, interrupt=interrupt)
    run.log.say(f"{len(prompts)} prefixes, at most {max(len(p.tokens) for p in prompts)} tokens; starts at step {step}")
    reference = job.sharded_model(source, shape, cfg.model, ranks) if cfg.loss.kl else None
    max_len = cfg.engine.max_len or longest_sequence(cfg, shape, prompts)
    engine = make_engine(cfg.engine, source, shape, text, ranks, max_len, cfg.sampling.max_batch)
    engine.sleep()
    reward, close = make_reward(cfg, engine, prompts, text, theirs, ranks, max_len)
    try:
        code = rl.train(run, cfg, engine, prompts, reward, step=step, state=state, reference=reference)
    finally:
        run.watch.rest()
        close()
    if code == 0:
        folder = run.export()
        if ranks.rank == 0:
            run.log.say(rl.summary(run.folder))
        run.log.say(f"{folder} holds the model")
        job.draw_curves(run)
    run.log.close()
    return code


def longest_sequence(cfg: RLMTConfig, shape, prompts) -> int:
    """Tokens that an engine must have room for: prefix and new ones, or a question with two texts of N tokens."""
    longest = max(len(p.tokens) for p in prompts) + cfg.sampling.max_new
    if cfg.judge.kind in ("policy", "swap"):
        longest = max(longest, QUESTION_TOKENS + 4 * cfg.sampling.max_suffix)
    return min(longest, shape.max_positions)


def read_judge(cfg: RLMTConfig, shape):
    """(shape, text) of a judge in a folder, None for others. UserError if it cannot judge here."""
    from dataclasses import replace

    from thinkmid.model import weights
    from thinkmid.text import Text

    if cfg.judge.kind not in ("swap", "resident"):
        return None
    folder = Path(cfg.judge.folder)
    judges, text = weights.read_config(folder), Text.load(folder)
    if cfg.judge.kind == "swap" and replace(judges, eos_ids=shape.eos_ids, bos_id=shape.bos_id) != shape:
        raise UserError(f"{folder}: judge.kind 'swap' needs the shape of {cfg.model.folder}; 'resident' does not")
    return judges, text


def make_engine(engine, folder, shape, text, ranks, max_len, rows):
    if engine.kind == "native":
        from thinkmid.rollout.native import NativeEngine

        return NativeEngine(shape, text, dtype=engine.dtype, device=ranks.device)
    from thinkmid.rollout.vllm import VllmEngine

    return VllmEngine(folder, shape, text, engine, max_len=max_len, rows=rows)


def make_reward(cfg: RLMTConfig, engine, prompts, text, theirs, ranks, max_len):
    """The reward, and what to call when no more verdicts are needed."""
    from functools import partial

    from thinkmid.rollout.judge import ContinuationReward, ModelJudge
    from thinkmid.rollout.match import match

    judge, max_suffix = cfg.judge, cfg.sampling.max_suffix
    if judge.kind == "match":
        return ContinuationReward(text, partial(match, overlap=judge.overlap), max_suffix=max_suffix), lambda: None
    ask, close = make_ask(cfg, engine, text, theirs, ranks, max_len)
    model = ModelJudge(
        ask,
        template=judge.template,
        seed=cfg.run.seed,
        votes=judge.votes,
        combine=judge.combine,
        retries=judge.retries,
        # weights that change give other verdicts, and a resumed run has no cache
        cache_size=0 if judge.kind == "policy" else 100_000,
    )
    look = partial(check_judge, judge, ask, cfg.run.seed, prompts, lambda s: text.decode(text.encode(s)[:max_suffix]))
    return ContinuationReward(text, model, max_suffix=max_suffix, look=look), close


def check_judge(judge: JudgeConfig, ask, seed: int, prompts, cut, step: int) -> dict[str, float]:
    """Every canary_every steps: questions whose answers are known. UserError names what the judge gets wrong."""
    from thinkmid.rollout import canary

    if not judge.canary_every or step % judge.canary_every:
        return {}
    drawn = random.Random(f"{seed}/{step}").sample(prompts, min(CANARIES, len(prompts)))
    texts = dict.fromkeys(cut(p.meta["reference"]) for p in drawn)
    references = [t for t in texts if t.strip()]
    if len(references) < 2:
        return {}
    report = canary.run(ask, judge.template, seed + step, list(zip(references[1:], references, strict=False)))
    if report.share < judge.canary_min:
        raise UserError(f"step {step}: the judge fails on known answers: {report.line()} (judge.canary_min)")
    return {"judge_canary": report.share}


def make_ask(cfg: RLMTConfig, engine, text, theirs, ranks, max_len):
    """Who answers the judge's questions."""
    import os
    from dataclasses import replace

    from thinkmid.model import weights
    from thinkmid.rollout.ask import EngineAsk, SwapAsk
    from thinkmid.rollout.remote import RemoteAsk

    judge, nothing = cfg.judge, lambda: None
    if judge.kind == "remote":
        key, options = os.environ.get(judge.key_env, ""), {"workers": judge.workers, "retries": judge.retries}
        remote = RemoteAsk(judge.url, judge.model, key=key, timeout_s=judge.timeout_s, **options)
        return remote, remote.close
    if judge.kind == "policy":
        return EngineAsk(engine, text, max_len), nothing
    folder, (shape, text) = Path(judge.folder), theirs
    if judge.kind == "swap":
        ask = EngineAsk(engine, text, max_len)
        return SwapAsk(ask, engine, lambda: weights.stream_folder(folder, cfg.engine.dtype)), nothing
    longest = min(shape.max_positions, QUESTION_TOKENS + 4 * cfg.sampling.max_suffix)
    beside = replace(cfg.engine, kind=judge.engine, sleep=False, max_len=0, tensor_parallel=1)
    resident = make_engine(beside, folder, shape, text, ranks, longest, cfg.sampling.max_batch)
    resident.load_weights(weights.stream_folder(folder, beside.dtype), 0)
    return EngineAsk(resident, text, longest), nothing


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
