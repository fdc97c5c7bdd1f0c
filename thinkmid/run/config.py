"""The [run] section, which all training programs share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from thinkmid.errors import at_least
from thinkmid.model.init import ModelSection


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


class ProgramConfig(Protocol):
    """The config of a training program, as far as its folder is concerned; a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def run(self) -> RunConfig: ...

    @property
    def model(self) -> ModelSection: ...
