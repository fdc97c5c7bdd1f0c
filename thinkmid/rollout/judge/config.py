"""The judge that a configuration names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from thinkmid.errors import at_least, positive, unknown
from thinkmid.rollout.judge.templates import TEMPLATES

QUESTION_TOKENS = 640  # of a judge's instructions, for tokenizers that need two characters a token


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Who decides whether a continuation matches."""

    # match: by rule; policy: the engine's current weights; swap: another model of the same shape, whose weights take
    # their place after the rollouts; resident: a small model in an engine of its own; remote: OpenAI-compatible
    kind: Literal["match", "policy", "swap", "resident", "remote"] = "match"
    overlap: float = 0.6  # match: word F1 from which sentences without numbers agree
    folder: str = ""  # swap, resident: Hugging Face folder of the judge, or its name on the Hub
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

    def __post_init__(self) -> None:
        if not 0 < self.overlap <= 1:
            raise ValueError(f"overlap must lie in (0, 1], got {self.overlap}")
        if not 0 <= self.canary_min <= 1:
            raise ValueError(f"canary_min must lie in [0, 1], got {self.canary_min}")
        at_least(self, votes=1, retries=0, canary_every=0, workers=1)
        positive(self, "timeout_s", "kv_gb")
        needs = {"swap": ("folder",), "resident": ("folder",), "remote": ("url", "model")}
        for name in needs.get(self.kind, ()):
            if not getattr(self, name):
                raise ValueError(f"kind {self.kind!r} needs {name}")
        if self.template not in TEMPLATES:
            raise ValueError(unknown("template", self.template, TEMPLATES))


def longest_question(max_suffix: int) -> int:
    """Tokens of a question about two texts of max_suffix tokens, its answer included."""
    return QUESTION_TOKENS + 4 * max_suffix


def question_tokens(judge: JudgeConfig, max_suffix: int) -> int:
    """Room that questions need in the policy's engine: longest_question() tokens, or 0 if none is asked there."""
    return longest_question(max_suffix) if judge.kind in ("policy", "swap") else 0
