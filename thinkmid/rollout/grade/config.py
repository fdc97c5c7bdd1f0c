"""The checker of answers that a configuration names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from thinkmid.rollout.grade.answers import after_thought
from thinkmid.rollout.judge.rule import match, numbers_of


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """How answers are checked."""

    # math: the last box or answer line, by rule or by math-verify; first-sentence: its numbers, for the miniature
    kind: Literal["math", "first-sentence"] = "math"
    workers: int = 2  # math: processes for what is not decided at once
    cpu_s: float = 1.0  # math: most work for one verdict; what takes longer has none
    memory_mib: int = 1024  # math: of such a process

    def __post_init__(self):
        for name, low in (("workers", 1), ("memory_mib", 256), ("cpu_s", 0.01)):
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")


class FirstSentence:
    """Agrees in the numbers of the first sentence after the last thought. An open thought has no answer."""

    def __call__(self, text: str, gold: str, question: str = ""):
        return match(after_thought(text) or "", gold)

    def answer(self, text: str) -> str | None:
        """What may vote: the numbers, None if there are none."""
        return " ".join(map(str, numbers_of(after_thought(text) or ""))) or None

    def row(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


def make_grader(cfg: VerifyConfig):
    """grader(text, gold, question) -> Pending, grader.answer(text), row(), close(). Start it before the run."""
    if cfg.kind == "first-sentence":
        return FirstSentence()
    from thinkmid.rollout.grade.grader import Grader

    return Grader(workers=cfg.workers, cpu_s=cfg.cpu_s, memory_mib=cfg.memory_mib)
