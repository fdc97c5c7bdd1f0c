"""What is evaluated, on which questions, how: the configuration that the programs of this folder share."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from thinkmid.data import questions
from thinkmid.data.templates import find
from thinkmid.rollout.engine.protocol import EngineConfig, Sampling
from thinkmid.rollout.grade.config import VerifyConfig


@dataclass(frozen=True, kw_only=True)
class EvalRun:
    """Where results go and how much is asked."""

    folder: str  # generations/*.jsonl, results.json, config.toml; what is there already is not drawn again
    seed: int = 0
    samples: int = 16  # n of each question; the paper's 16
    ks: tuple[int, ...] = (1, 16)  # of pass@k and maj@k
    regrade: bool = False  # grade the generations that are there, draw none

    def __post_init__(self):
        if self.samples < 1 or not all(k >= 1 for k in self.ks):
            raise ValueError(f"samples {self.samples} and ks {self.ks} must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class EvalModel:
    """What is evaluated."""

    folder: str  # Hugging Face folder


@dataclass(frozen=True, kw_only=True)
class SetsConfig:
    """What is asked, and in which words."""

    # layout=path, or name:layout=path: gsm8k, math500, amc23, olympiadbench, gpqa-diamond, questions, ...
    sets: tuple[str, ...]
    template: str = "boxed-think"  # with "-think" the model starts inside its thought
    strict: bool = False  # a set that differs from its public copy is an error, not a note

    def __post_init__(self):
        for entry in self.sets:
            if not entry.partition("=")[2]:
                raise ValueError(f"sets: {entry!r} must be LAYOUT=PATH or NAME:LAYOUT=PATH")
            if not questions.NAME.fullmatch(name_of(entry)):
                raise ValueError(f"sets: {entry!r}: a name is 1 to 60 letters, digits, blanks, . + - _, no sign first")
        if len(names := [name_of(entry) for entry in self.sets]) != len(set(names)) or not names:
            raise ValueError(f"sets needs different names, got {', '.join(names) or 'none'}")


@dataclass(frozen=True, kw_only=True)
class EvalSampling(Sampling):
    """A sample that opens no thought has the whole budget, so that models that think and models that do not compare."""

    temperature: float = 0.6
    top_p: float = 0.95

    @property
    def max_direct(self) -> int:
        return self.max_new


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation. The paper: 16 samples at temperature 0.6 and top-p 0.95, at most 4096 new tokens."""

    run: EvalRun
    model: EvalModel
    data: SetsConfig
    sampling: EvalSampling = field(default_factory=EvalSampling)
    engine: EngineConfig = field(default_factory=EngineConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)


def name_of(entry: str) -> str:
    return entry.partition("=")[0].partition(":")[0]


def sets_of(cfg: EvalConfig) -> dict[str, questions.Loaded]:
    """Questions by the set's name, with a line for each set. UserError: the template or a set cannot be used."""
    find(cfg.data.template)
    sets = {}
    for entry in cfg.data.sets:
        head, _, path = entry.partition("=")
        found = sets[name_of(entry)] = questions.load(head.rpartition(":")[2], path, strict=cfg.data.strict)
        if not int(os.environ.get("RANK", 0)):
            print(f"{name_of(entry)}: {len(found.questions)} questions" + "".join(f"; {n}" for n in found.notes))
    return sets
