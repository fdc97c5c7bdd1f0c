"""What is evaluated, on which questions, how: the configuration that the programs of this folder share."""

import os
from dataclasses import dataclass, field, replace

from thinkmid.data import questions, templates
from thinkmid.data.wording import WordingConfig
from thinkmid.errors import at_least
from thinkmid.rollout.engine.protocol import EngineConfig, Sampling
from thinkmid.rollout.grade.config import VerifyConfig


@dataclass(frozen=True, kw_only=True)
class EvalRun:
    """Where results are written and how much is sampled."""

    folder: str  # generations/*.jsonl, results.json, config.toml; samples that are there already are not drawn again
    seed: int = 0
    samples: int = 16  # n of each question; the paper's 16
    ks: tuple[int, ...] = ()  # of pass@k and maj@k, from 1 to samples; none named: 1 and samples
    regrade: bool = False  # grade the generations that are there, draw none

    def __post_init__(self) -> None:
        at_least(self, samples=1, seed=0)
        if odd := [k for k in self.ks if not 1 <= k <= self.samples]:
            raise ValueError(
                f"ks holds {odd[0]}, samples is {self.samples}: pass@k needs k from 1 to samples; set run.ks"
            )


@dataclass(frozen=True, kw_only=True)
class EvalModel:
    """What is evaluated."""

    folder: str  # Hugging Face folder, or ORG/NAME[@REVISION] on the Hub


@dataclass(frozen=True, kw_only=True)
class EvalData(WordingConfig):
    """The sets of questions and the words around them."""

    # layout=path, or name:layout=path, where path may be hf://datasets/ORG/NAME[@REVISION][/PATH]: gsm8k,
    # math500, amc23, olympiadbench, gpqa-diamond, questions, ...
    sets: tuple[str, ...]
    strict: bool = False  # a set that differs from its public copy is an error, not a note

    def __post_init__(self) -> None:
        super().__post_init__()
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

    temperature: float = 0.6  # 0 is greedy; the paper's 0.6
    top_k: int = 0  # 0 keeps all
    top_p: float = 0.95  # nucleus mass in (0, 1]; the paper's 0.95
    force_close: bool = False  # write the closing tag when the thought budget runs out

    @property
    def max_direct(self) -> int:
        return self.max_new


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation. The paper: 16 samples at temperature 0.6 and top-p 0.95, at most 4096 new tokens."""

    run: EvalRun
    model: EvalModel
    data: EvalData
    sampling: EvalSampling = field(default_factory=EvalSampling)
    engine: EngineConfig = field(default_factory=EngineConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)

    @property
    def drawn(self) -> EvalSampling:
        """How samples are drawn: the sampling with the template's stop texts beside its own."""
        stop = templates.stops(self.data.template, self.data.template_stop, self.sampling.stop)
        return replace(self.sampling, stop=stop)


def name_of(entry: str) -> str:
    return entry.partition("=")[0].partition(":")[0]


def load_sets(cfg: EvalData) -> dict[str, questions.QuestionSet]:
    """Sets by name, with a line on the console for each. UserError: a set cannot be used."""
    sets = {}
    for entry in cfg.sets:
        head, _, path = entry.partition("=")
        found = sets[name_of(entry)] = questions.load(head.rpartition(":")[2], path, strict=cfg.strict)
        if not int(os.environ.get("RANK", 0)):
            print("; ".join([f"{name_of(entry)}: {len(found.questions)} questions", *found.notes]))
    return sets
