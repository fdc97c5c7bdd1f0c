"""The [run] section, which all training programs share."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from thinkmid.errors import at_least
from thinkmid.model.init import ModelSection

# what the Hub takes as a name
REPOSITORY = re.compile(r"(?!.*(--|\.\.))\b[\w.-]{1,96}\b/\b[\w.-]{1,96}\b(?<!\.git)", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives and how long it is."""

    folder: str  # everything the run writes; the same command resumes what is there
    steps: int  # optimiser steps for SFT, rollout batches for RL
    seed: int = 0
    save_every: int = 0  # steps between checkpoints; 0: save_minutes decides
    save_minutes: float = 15.0  # minutes between checkpoints where save_every is 0; 0: only on SIGTERM or SIGINT
    keep: int = 2  # checkpoints kept
    fresh: bool = False  # start over: forget what the folder holds
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()  # other sinks of the metrics
    rollouts_every: int = 1  # RL: steps between files of rollouts; 0: none
    max_failed: float = 0.5  # RL: share of a step's samples without a verdict above which the run stops
    timeout_s: float = 1800.0  # a rank without progress for so long leaves its stack in watch/ and ends; 0: never

    def __post_init__(self) -> None:
        if not self.folder:
            raise ValueError("folder is empty; --run.folder FOLDER")
        at_least(self, steps=0, seed=0, save_every=0, save_minutes=0, keep=1, rollouts_every=0, max_failed=0)
        at_least(self, timeout_s=0)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The model that a run leaves, in run.folder/export."""

    # of its weights, rounded to nearest from the fp32 masters; "source": the dtype that the run began with, float32 for
    # a fresh model
    dtype: Literal["source", "float32", "bfloat16", "float16"] = "source"
    push: str = ""  # ORG/NAME on the Hugging Face Hub, which gets the export once it is whole; empty: none does
    private: bool = True  # whether a repository that export.push has to make is private
    # LoRA: whole weights with the adapters merged in, or the adapters alone as a PEFT folder
    lora: Literal["merged", "adapter"] = "merged"

    def __post_init__(self) -> None:
        if self.push and not REPOSITORY.fullmatch(self.push):
            raise ValueError(f"push must be ORG/NAME, letters, digits, '-', '_' and '.', got {self.push!r}")


class ProgramConfig(Protocol):
    """The config of a training program, as far as its folder is concerned; a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def run(self) -> RunConfig: ...

    @property
    def model(self) -> ModelSection: ...

    @property
    def export(self) -> ExportConfig: ...
