"""The judge that a configuration names: who answers its questions, how its verdicts become a reward."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from thinkmid.errors import UserError
from thinkmid.rollout.engine.protocol import EngineConfig, Sampling, make_engine
from thinkmid.rollout.judge import templates
from thinkmid.types import Prompt, Tally

if TYPE_CHECKING:
    import torch

CANARIES = 9  # references in a look at the judge
QUESTION_TOKENS = 640  # of a judge's instructions, for tokenizers that need two characters a token


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Who says whether a continuation matches."""

    # match: by rule; policy: the engine's current weights; swap: another model of the same shape, whose weights take
    # their place after the rollouts; resident: a small model in an engine of its own; remote: OpenAI-compatible
    kind: Literal["match", "policy", "swap", "resident", "remote"] = "match"
    overlap: float = 0.6  # match: word F1 from which sentences without numbers agree
    folder: str = ""  # swap, resident: Hugging Face folder of the judge
    engine: Literal["native", "vllm"] = "native"  # resident: what runs it
    kv_gb: float = 4.0  # resident, vllm: GB of KV cache on each rank, beside engine.kv_gb
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
        for name in ("timeout_s", "kv_gb"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        needs = {"swap": ("folder",), "resident": ("folder",), "remote": ("url", "model")}
        for name in needs.get(self.kind, ()):
            if not getattr(self, name):
                raise ValueError(f"kind {self.kind!r} needs {name}")
        templates.find(self.template)


def question_tokens(judge: JudgeConfig, max_suffix: int) -> int:
    """Room that a question with two texts of max_suffix tokens needs in the policy's engine; 0 if none comes there."""
    return QUESTION_TOKENS + 4 * max_suffix if judge.kind in ("policy", "swap") else 0


def resident_engine(
    judge: JudgeConfig, policys: EngineConfig, sampling: Sampling, model_cfg
) -> tuple[EngineConfig, int]:
    """A resident judge's engine, and the tokens of its longest question and answer. shape: the judge's."""
    longest = min(model_cfg.max_positions, QUESTION_TOKENS + 4 * sampling.max_suffix)
    return replace(policys, kind=judge.engine, kv_gb=judge.kv_gb, sleep=False, max_len=0, tensor_parallel=1), longest


def read_judge(judge: JudgeConfig, engine: EngineConfig, policy: str, model_cfg):
    """(shape, text) of a judge in a folder, None for others. UserError if it cannot judge beside this policy."""
    from thinkmid.model import weights
    from thinkmid.tokenizer import Tokenizer

    if judge.kind not in ("swap", "resident"):
        return None
    if judge.kind == "resident" and judge.engine == "vllm" and engine.tensor_parallel > 1:
        raise UserError("judge.engine 'vllm' beside engine.tensor_parallel: a process has one layout of ranks")
    folder = Path(judge.folder)
    theirs, tokenizer = weights.read_config(folder), Tokenizer.load(folder)
    if judge.kind == "swap" and replace(theirs, eos_ids=model_cfg.eos_ids, bos_id=model_cfg.bos_id) != model_cfg:
        raise UserError(f"{folder}: judge.kind 'swap' needs the shape of {policy}; 'resident' does not")
    return theirs, tokenizer


def make_reward(judge: JudgeConfig, sampling: Sampling, tokenizer, ask, prompts: Sequence[Prompt], seed: int):
    """The reward of RLMT. ask: of make_ask, None for judges by rule. prompts: their references examine the judge."""
    from thinkmid.rollout.judge.model import ContinuationReward, ModelJudge
    from thinkmid.rollout.judge.rule import match

    if ask is None:
        return ContinuationReward(tokenizer, partial(match, overlap=judge.overlap), max_suffix=sampling.max_suffix)
    model = ModelJudge(
        ask,
        template=judge.template,
        seed=seed,
        votes=judge.votes,
        combine=judge.combine,
        retries=judge.retries,
        # weights that change give other verdicts, and a resumed run has no cache
        cache_size=0 if judge.kind == "policy" else 100_000,
    )
    cut = lambda whole: tokenizer.decode(tokenizer.encode(whole)[: sampling.max_suffix])  # noqa: E731
    look = partial(examine, judge, ask, seed, prompts, cut)
    return ContinuationReward(tokenizer, model, max_suffix=sampling.max_suffix, look=look)


def examine(judge: JudgeConfig, ask, seed: int, prompts: Sequence[Prompt], cut, step: int) -> Tally:
    """Every canary_every steps: questions whose answers are known, the same on every rank. UserError names what the
    judge gets wrong."""
    from thinkmid.rollout.judge import canary

    if not judge.canary_every or step % judge.canary_every:
        return {}
    drawn = random.Random(f"{seed}/{step}").sample(range(len(prompts)), min(CANARIES, len(prompts)))
    texts = [text for text in dict.fromkeys(cut(prompts[i].meta["reference"]) for i in drawn) if text.strip()]
    if len(texts) < 2:
        return {}
    report = canary.run(ask, judge.template, seed + step, list(zip(texts[1:], texts, strict=False)))
    if report.share < judge.canary_min:
        raise UserError(f"step {step}: the judge fails on known answers: {report.line()} (judge.canary_min)")
    return {"judge_canary": (report.share, 1)}


def make_ask(
    judge: JudgeConfig, config: EngineConfig, sampling: Sampling, engine, tokenizer, theirs, device, max_len: int, note
):
    """(who answers the judge's questions, what to call in the end); (None, ...) for judges by rule.

    theirs: of read_judge. config, engine, text, max_len: the policy's. note(line): is told what happens to an endpoint.
    """
    from thinkmid.rollout.judge.ask import EngineAsk, SwapAsk

    nothing = lambda: None  # noqa: E731
    if judge.kind == "match":
        return None, nothing
    if judge.kind == "remote":
        from thinkmid.rollout.judge.endpoint import RemoteAsk

        options = {"key_env": judge.key_env, "workers": judge.workers, "retries": judge.retries}
        remote = RemoteAsk(judge.url, judge.model, timeout_s=judge.timeout_s, note=note, **options)
        return remote, remote.close
    if judge.kind == "policy":
        return EngineAsk(engine, tokenizer, max_len), nothing
    model_cfg, tokenizer = theirs
    if judge.kind == "swap":
        return SwapAsk(EngineAsk(engine, tokenizer, max_len), engine, JudgeWeights(judge.folder, config.dtype)), nothing
    beside, longest = resident_engine(judge, config, sampling, model_cfg)
    resident = make_engine(
        beside, judge.folder, model_cfg, tokenizer, device=device, max_len=longest, rows=sampling.max_batch
    )
    resident.load_weights(JudgeWeights(judge.folder, beside.dtype)(), 0)
    return EngineAsk(resident, tokenizer, longest), nothing


class JudgeWeights:
    """A judge's weights, read anew by each call: hashed when it is made, finite at the first read, unchanged after."""

    def __init__(self, folder: str, dtype: str):
        from thinkmid.model import weights

        self._folder, self._dtype = folder, dtype
        self._known, self._are_finite = weights.stamps(folder), False

    def __call__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, tensor). UserError as of weights.stream_folder."""
        from thinkmid.model import weights

        yield from weights.stream_folder(self._folder, self._dtype, self._known, are_finite=self._are_finite)
        self._are_finite = True
