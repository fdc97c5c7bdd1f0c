"""The configuration that programs share. No torch in here: --help and a wrong key are answered at once."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from thinkmid.data import templates
from thinkmid.data.wording import WordingConfig
from thinkmid.errors import at_least, positive
from thinkmid.model.init import FreshConfig, ModelSection
from thinkmid.rollout.engine.protocol import EngineConfig, Sampling
from thinkmid.rollout.grade.config import VerifyConfig
from thinkmid.rollout.judge.config import JudgeConfig
from thinkmid.run.config import ExportConfig, RunConfig


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, fused; moments and master weights in fp32."""

    lr: float  # peak learning rate
    warmup: int = 0  # steps of linear warm-up
    schedule: Literal["constant", "cosine", "linear"] = "constant"  # after the warm-up, over the steps that remain
    floor: float = 0.1  # last learning rate as a share of the peak; not for "constant"
    betas: tuple[float, ...] = (0.9, 0.95)
    weight_decay: float = 0.0  # on matrices only
    clip: float = 1.0  # gradient norm
    offload: bool = False  # moments wait in host memory while the engine samples: room for KV cache, two copies a step
    max_skipped: int = 5  # non-finite updates in a row before the run stops

    def __post_init__(self) -> None:
        positive(self, "lr")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        at_least(self, warmup=0, floor=0, weight_decay=0, clip=0, max_skipped=0)

    def lr_at(self, step: int, num_steps: int) -> float:
        """Learning rate of update number `step`, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, num_steps - self.warmup))
        shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[self.schedule]
        return self.lr if self.schedule == "constant" else self.lr * (self.floor + (1 - self.floor) * shape)


def read_parts(texts: tuple[str, ...]) -> dict[str, re.Pattern[str]]:
    """Patterns by name, of "name=pattern". ValueError names a text that is none."""
    parts = {}
    for text in texts:
        name, _, pattern = text.partition("=")
        if not name or not pattern:
            raise ValueError(f"probe_parts: {text!r} is not name=pattern")
        try:
            parts[name] = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"probe_parts: {text!r}: {error}") from None
    return parts


@dataclass(frozen=True, kw_only=True)
class SFTData:
    """What is learnt."""

    # jsonl, parquet, arrow, txt files or folders, or hf://datasets/ORG/NAME[@REVISION][/PATH]; thoughts stand between
    # <think> and </think>
    paths: tuple[str, ...]
    column: str = "text"  # of rows, the field that holds the text
    val_paths: tuple[str, ...] = ()  # held-out documents
    val_every: int = 200  # steps between validations; there is one at the end too
    probe_paths: tuple[str, ...] = ()  # documents with full thoughts: is RLMT worth starting?
    # what of a thought is probed: name=pattern, whose last character's token is to be predicted; a name that ends in ?
    # is measured and not required
    probe_parts: tuple[str, ...] = ("thought=(?s).",)
    batch_tokens: int = 4096  # tokens of an optimiser step, over all ranks
    pack_tokens: int = 4096  # tokens of one forward on one rank
    max_len: int = 512  # longer documents are cut into sequences of this many tokens
    # rows: as-is, a "text" as it stands; chat, "messages" through the model's chat template
    template: Literal["as-is", "chat"] = "as-is"
    system: str = ""  # chat: system message of conversations without one; empty: the template's own, if it has one
    loss: Literal["all", "assistant"] = "all"  # chat: tokens that carry loss; assistant: its messages, end of turn too
    # with run.steps 0, how long the run is: passes over the data, or tokens
    epochs: float = 0.0
    tokens: int = 0

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError("paths is empty; --data.paths FILE or FOLDER")
        at_least(self, batch_tokens=2, pack_tokens=2, max_len=2, val_every=1, epochs=0, tokens=0)
        if self.max_len > min(self.batch_tokens, self.pack_tokens):
            rooms = f"batch_tokens {self.batch_tokens} or pack_tokens {self.pack_tokens}"
            raise ValueError(f"max_len {self.max_len} exceeds {rooms}")
        if self.template != "chat" and (self.system or self.loss != "all"):
            raise ValueError(f"system and loss {self.loss!r} need template 'chat', got {self.template!r}")
        if self.template == "chat" and self.column != "text":
            raise ValueError(f"column {self.column!r} is of texts; with template 'chat' conversations are \"messages\"")
        read_parts(self.probe_parts)
        if self.epochs > 1e4 or self.tokens > 1e15:
            raise ValueError(f"epochs {self.epochs:g} or tokens {self.tokens:g}: more than 1e4 or 1e15 have no end")


def _check_adapters(export: ExportConfig, model: ModelSection) -> None:
    if export.lora == "adapter" and not model.lora_rank:
        raise ValueError("export.lora 'adapter' needs model.lora_rank above 0: no adapter is trained without")


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """SFT mid-training."""

    run: RunConfig
    model: ModelSection = field(default_factory=ModelSection)
    fresh: FreshConfig = field(default_factory=FreshConfig)
    data: SFTData
    optim: OptimConfig
    export: ExportConfig = field(default_factory=ExportConfig)
    keeps_frozen: ClassVar[bool] = False
    ema_decay: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        _check_adapters(self.export, self.model)
        if self.model.lora_rank and not self.model.folder:
            raise ValueError("model.lora_rank needs model.folder: adapters of weights that are drawn learn nothing")
        if self.data.template == "chat" and not self.model.folder:
            raise ValueError("data.template 'chat' needs model.folder: the folder with the chat template")
        given = {"run.steps": self.run.steps, "data.epochs": self.data.epochs, "data.tokens": self.data.tokens}
        if sum(map(bool, given.values())) > 1:
            both = ", ".join(f"{name} {value}" for name, value in given.items() if value)
            raise ValueError(f"the run's length is given more than once: {both}; set all but one to 0")


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """What one step rolls out and how it is trained on."""

    prompts: int = 16  # P, over all ranks
    siblings: int = 8  # G samples of each prompt
    updates: int = 1  # optimiser steps per rollout batch; above 1 the ratio is clipped to the sampler
    pack_tokens: int = 8192  # tokens of one forward on one rank
    share_prefix: bool = True  # a group's prefix goes through the network once; off only to measure what that saves

    def __post_init__(self) -> None:
        at_least(self, prompts=1, siblings=2, updates=1, pack_tokens=1)
        if self.updates > self.prompts:
            raise ValueError(f"updates {self.updates} exceed prompts {self.prompts}: each update needs a group")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The policy loss."""

    denom: float  # C of DrGRPO: token terms are divided by prompts * siblings * denom; usual: max_think + max_suffix
    estimator: Literal["dr_grpo", "grpo", "rloo", "token-mean"] = "dr_grpo"  # advantage and token weight
    scope: Literal["all", "thought"] = "all"  # what gets policy gradient: thought and suffix, or thoughts
    clip_low: float = 0.2  # ratio is clipped below 1 - clip_low; inert with one update per rollout
    clip_high: float = 0.2  # ratio is clipped above 1 + clip_high
    is_cap: float = 2.0  # detached trainer/sampler weight is truncated here; 0 switches it off
    is_level: Literal["token", "sequence"] = "token"  # of that weight; "sequence": product over it, one forward more
    kl: float = 0.0  # weight of the KL to the frozen starting point; above 0 a second model is kept
    entropy: float = 0.0  # weight of an entropy bonus
    next_token: float = 0.0  # RLMT: weight of the next-token loss on the true suffix, as raw text, in the same forward

    def __post_init__(self) -> None:
        positive(self, "denom")
        at_least(self, clip_low=0, clip_high=0, is_cap=0, kl=0, next_token=0)
        if self.is_level == "sequence" and not self.is_cap:
            raise ValueError("is_level 'sequence' needs is_cap above 0")
        if self.clip_low > 1:
            raise ValueError(f"clip_low must be at most 1, got {self.clip_low}")

    @property
    def keeps_dead(self) -> bool:
        """KL and entropy give groups of equal rewards a gradient too."""
        return bool(self.kl or self.entropy)


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """What a sample of RLMT is paid for: a sum with these weights. What has weight 0 is not computed."""

    judge: float = 1.0  # the judge's verdict on the continuation, 0 or 1
    likelihood: float = 0.0  # mean log-prob of the true suffix's tokens after the thought, nats
    gain: float = 0.0  # the same less that of the true suffix without a thought, nats
    prefix: float = 0.0  # 1 where the continuation begins with the true suffix, byte by byte, else 0
    prefix_tokens: int = 1  # prefix: true tokens that the continuation must begin with
    scorer: Literal["policy", "frozen", "ema"] = "policy"  # likelihood, gain: weights that score; ema: moving average
    baseline: Literal["policy", "frozen", "ema"] = "policy"  # gain: weights that score without a thought
    decay: float = 0.999  # of the moving average, a step
    unclosed: float = 0.5  # likelihood, gain: nats of a thought that never closed below the worst of its siblings'

    def __post_init__(self) -> None:
        at_least(self, judge=0, likelihood=0, gain=0, prefix=0, unclosed=0, prefix_tokens=1)
        if not (self.judge or self.likelihood or self.gain or self.prefix):
            raise ValueError("judge, likelihood, gain and prefix are all 0: nothing is rewarded")
        if not 0 < self.decay < 1:
            raise ValueError(f"decay must lie in (0, 1), got {self.decay}")

    @property
    def is_verdict(self) -> bool:
        """The judge's verdict as it is, and nothing else."""
        return (self.judge, self.likelihood, self.gain, self.prefix) == (1, 0, 0, 0)

    @property
    def weights(self) -> set[str]:
        """Whose weights score."""
        scorer = {self.scorer} if self.likelihood or self.gain else set()
        return scorer | ({self.baseline} if self.gain else set())


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    """Reinforcement learning."""

    run: RunConfig
    model: ModelSection
    sampling: Sampling = field(default_factory=Sampling)
    engine: EngineConfig = field(default_factory=EngineConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    loss: LossConfig
    optim: OptimConfig
    export: ExportConfig = field(default_factory=ExportConfig)

    def __post_init__(self) -> None:
        _check_adapters(self.export, self.model)
        if not self.model.folder:
            raise ValueError("missing key 'model.folder': the Hugging Face folder to start from")
        if not self.sampling.temperature:
            raise ValueError("sampling.temperature 0 draws the same sample each time; training needs it above 0")
        if self.engine.kind == "vllm" and (self.sampling.top_p < 1 or self.sampling.top_k):
            raise ValueError("sampling.top_p and top_k: vLLM's log-probs would be those of the cut distribution")
        if self.loss.is_level == "sequence" and self.batch.updates > 1:
            raise ValueError("loss.is_level 'sequence' is for one update per rollout, got batch.updates above 1")

    @property
    def drawn(self) -> Sampling:
        """How samples are drawn: the sampling with all stop texts, a template's too."""
        return self.sampling

    @property
    def keeps_frozen(self) -> bool:
        """The starting weights stay."""
        return bool(self.loss.kl)

    @property
    def ema_decay(self) -> float:
        """Decay of a moving average of the weights, per step; 0 without one."""
        return 0.0


@dataclass(frozen=True, kw_only=True)
class RLMTData:
    """Where prefixes come from."""

    # jsonl, parquet, arrow, txt files or folders, or hf://datasets/ORG/NAME[@REVISION][/PATH]
    paths: tuple[str, ...]
    column: str = "text"  # of rows, the field that holds the text
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
        if self.ema_decay and self.model.lora_rank:
            raise ValueError("model.lora_rank with reward.scorer or baseline 'ema': averages are kept of whole weights")

    @property
    def keeps_frozen(self) -> bool:
        return super().keeps_frozen or "frozen" in self.reward.weights

    @property
    def ema_decay(self) -> float:
        return self.reward.decay if "ema" in self.reward.weights else 0.0


@dataclass(frozen=True, kw_only=True)
class RLPTData(WordingConfig):
    """Where questions come from and how they are put."""

    path: str  # jsonl, parquet or arrow, a file or a folder of shards, or hf://datasets/ORG/NAME[@REVISION][/PATH]
    task: str = "questions"  # its layout: questions ({"question", "answer"} rows), gsm8k-train, dapo, ...
    max_prompt: int = 0  # tokens of the longest prompt, longer ones are left out; 0: what the model's context leaves

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, max_prompt=0)


@dataclass(frozen=True, kw_only=True)
class RLPTConfig(RLConfig):
    """RL post-training. sampling.max_suffix is the room for the answer after the thought."""

    data: RLPTData
    verify: VerifyConfig = field(default_factory=VerifyConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss.next_token:
            raise ValueError(f"loss.next_token {self.loss.next_token} is for RLMT: an answer has no true suffix")

    @property
    def drawn(self) -> Sampling:
        stop = templates.stops(self.data.template, self.data.template_stop, self.sampling.stop)
        return replace(self.sampling, stop=stop)


TrainConfig = SFTConfig | RLConfig
