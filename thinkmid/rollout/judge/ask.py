"""Yes/no questions to a model: the policy itself, another model's weights in the same engine, a small one beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from thinkmid.errors import UserError
from thinkmid.model import weight_files, weights
from thinkmid.model.hf_config import read_config
from thinkmid.model.transformer import ModelConfig
from thinkmid.rollout.engine.build import make_engine
from thinkmid.rollout.engine.protocol import Answer, Engine, EngineConfig, Sampling
from thinkmid.rollout.judge.config import JudgeConfig, longest_question
from thinkmid.rollout.judge.model import Ask, JudgeError
from thinkmid.rollout.judge.templates import ANSWERS
from thinkmid.rollout.verdict import Future
from thinkmid.tokenizer import Tokenizer

JUDGE = -2  # version of an engine that holds a judge's weights


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The policy and its engine, in or beside which a judge's model runs."""

    engine: Engine
    engine_cfg: EngineConfig
    tokenizer: Tokenizer
    sampling: Sampling
    max_len: int  # tokens of the engine's longest sequence
    device: torch.device


@dataclass(frozen=True)
class JudgeModel:
    """A model in a folder that judges."""

    cfg: ModelConfig
    tokenizer: Tokenizer


def read_judge(
    judge: JudgeConfig, engine: EngineConfig, policy: str | Path, model_cfg: ModelConfig
) -> JudgeModel | None:
    """The model in judge.folder, None for other kinds. UserError if it cannot judge beside the policy with model_cfg.

    policy: the policy's folder, for the message.
    """
    if judge.kind not in ("swap", "resident"):
        return None
    if judge.kind == "resident" and judge.engine == "vllm" and engine.tensor_parallel > 1:
        raise UserError("judge.engine 'vllm' beside engine.tensor_parallel: a process has one layout of ranks")
    folder = Path(judge.folder)
    model = JudgeModel(read_config(folder), Tokenizer.load(folder))
    if judge.kind == "swap" and replace(model.cfg, eos_ids=model_cfg.eos_ids, bos_id=model_cfg.bos_id) != model_cfg:
        raise UserError(f"{folder}: judge.kind 'swap' needs the shape of {policy}; 'resident' does not")
    return model


def resident_engine(
    judge: JudgeConfig, policys: EngineConfig, sampling: Sampling, model_cfg: ModelConfig
) -> tuple[EngineConfig, int]:
    """A resident judge's engine, and the tokens of its longest question and answer. model_cfg: the judge's."""
    longest = min(model_cfg.max_positions, longest_question(sampling.max_suffix))
    return replace(policys, kind=judge.engine, kv_gb=judge.kv_gb, sleep=False, max_len=0, tensor_parallel=1), longest


def make_ask(judge: JudgeConfig, policy: Policy, model: JudgeModel | None, note: Callable[[str], None]) -> Ask:
    """Puts a judge's questions to the model that the configuration names. ValueError for a judge by rule.

    model: from read_judge. note(line): receives what happens to an endpoint.
    """
    if judge.kind == "remote":
        from thinkmid.rollout.judge.endpoint import RemoteAsk

        return RemoteAsk(judge, note)
    if judge.kind == "policy":
        return EngineAsk(policy.engine, policy.tokenizer, policy.max_len)
    if model is None:
        raise ValueError(f"judge.kind {judge.kind!r} asks no model, or it was not read")
    if judge.kind == "swap":
        swap = Swap(policy.engine, JudgeWeights(judge.folder, policy.engine_cfg.dtype))
        return EngineAsk(swap, model.tokenizer, policy.max_len)
    beside, longest = resident_engine(judge, policy.engine_cfg, policy.sampling, model.cfg)
    rows = policy.sampling.max_batch
    engine = make_engine(
        beside, judge.folder, model.cfg, model.tokenizer, device=policy.device, max_len=longest, rows=rows
    )
    engine.load_weights(JudgeWeights(judge.folder, beside.dtype).stream(), 0)
    return EngineAsk(engine, model.tokenizer, longest)


def choices(tokenizer: Tokenizer) -> tuple[list[int], tuple[int, int]]:
    """The common token prefix of " yes" and " no", for the end of a prompt, and the first tokens that differ."""
    yes, no = (tokenizer.encode(answer) for answer in ANSWERS)
    first = next((i for i, (a, b) in enumerate(zip(yes, no, strict=False)) if a != b), None)
    if first is None:
        raise UserError(f"the judge's tokenizer cannot tell {ANSWERS[0]!r} from {ANSWERS[1]!r}: {yes} and {no}")
    return yes[:first], (yes[first], no[first])


class EngineAsk:
    """P(yes) by the weights that the engine holds. Questions join the running batch, one token each."""

    def __init__(self, engine: Engine | Swap, tokenizer: Tokenizer, max_len: int):
        """max_len: tokens of the longest question."""
        self._engine, self._tokenizer, self._max_len = engine, tokenizer, max_len
        self._begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self._shared, self._choices = choices(tokenizer)

    def __call__(self, prompt: str) -> Future[float]:
        tokens = [*self._begin, *self._tokenizer.encode(prompt), *self._shared]
        if len(tokens) < self._max_len:
            return self._engine.ask(tokens, self._choices)
        failed: futures.Future[float] = futures.Future()
        failed.set_exception(JudgeError(f"a question of {len(tokens)} tokens exceeds the engine's {self._max_len}"))
        return failed

    def close(self) -> None:
        """Nothing: the engine is drained when an answer is read."""


class Swap:
    """The engine with other weights: questions wait until the first answer is read, then the weights are replaced once
    for all of them. The next sync brings the policy's back; until then the version is JUDGE.
    """

    def __init__(self, engine: Engine, judge: JudgeWeights):
        self._engine, self._judge = engine, judge
        self._waiting: list[tuple[list[int], tuple[int, int], Answer]] = []

    def ask(self, tokens: list[int], choices: tuple[int, int]) -> Answer:
        """As Engine.ask; answered by drain() alone."""
        self._waiting.append((tokens, choices, answer := Answer(self.drain)))
        return answer

    def drain(self) -> None:
        """Puts the waiting questions to the judge's weights."""
        if self._engine.version != JUDGE:
            self._engine.load_weights(self._judge.stream(), JUDGE)
        asked = [(answer, self._engine.ask(tokens, choices)) for tokens, choices, answer in self._waiting]
        self._waiting = []
        for answer, found in asked:
            answer.p = found.result()


class JudgeWeights:
    """A judge's weights, read anew each time: hashed when this is made, finite at the first read, unchanged after."""

    def __init__(self, folder: str, dtype: str):
        self._folder, self._dtype = folder, dtype
        self._known, self._are_finite = weight_files.stamps(folder), False

    def stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, tensor). UserError as of weights.stream_folder."""
        yield from weights.stream_folder(self._folder, self._dtype, self._known, are_finite=self._are_finite)
        self._are_finite = True
