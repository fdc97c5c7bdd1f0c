"""The grader of answers that a configuration names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from thinkmid.errors import at_least


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """How answers are graded."""

    # math: the last box or answer line, by rule or by math-verify; first-sentence: the numbers of the first sentence
    kind: Literal["math", "first-sentence"] = "math"
    workers: int = 2  # math: processes for what is not decided at once
    cpu_s: float = 1.0  # math: most work for one verdict; what takes longer has none
    memory_mib: int = 1024  # math: of such a process

    def __post_init__(self) -> None:
        at_least(self, workers=1, memory_mib=256, cpu_s=0.01)
