"""What a model went through: the chain of runs behind it, its mid-training tokens and its compute."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from thinkmid.model.weight_files import is_export
from thinkmid.report.runs import Training, numbers, read


class Unknown(Exception):
    """Why a figure cannot be computed, in words for the page."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What the runs after the base model cost: a model from elsewhere, or what a fresh model's first run made."""

    tokens: float  # of mid-training: SFT tokens + tokens generated in RLMT; RLPT not counted, as in the paper
    flop: float  # 2 N per token forward, 6 N per token trained on, N all weights; judge and prefill not counted


def chain(model: str) -> list[Training]:
    """Runs that made a model folder, the newest first; none for a model from elsewhere.

    Unknown: a folder is gone, or was moved away from the run that made it.
    """
    runs: list[Training] = []
    while model:
        folder = Path(model).parent
        if not os.path.isdir(model):  # unlike Path.is_dir, for a path of any length
            raise Unknown(f"model folder {model} is not here")
        is_beside_run = (folder / "metrics.jsonl").exists()
        if is_export(Path(model)) and not is_beside_run:
            raise Unknown(f"{model} was written by thinkmid, and the run that wrote it is not beside it")
        if Path(model).name != "export" or not is_beside_run:
            return runs
        if any(folder == run.folder for run in runs):
            raise Unknown(f"{folder} began from itself")
        run = read(folder)
        if not isinstance(run, Training) or not run.config:
            raise Unknown(f"{folder} has no config.toml")
        runs.append(run)
        model = run.start
    # a fresh model's first run made the base model: pre-training, not mid-training
    return runs[:-1] if runs else runs


def cost(model: str, runs: Sequence[Training]) -> Cost:
    """Cost of a model, given the chain of runs behind it. Unknown: a run did not log its tokens."""
    weights = num_weights(Path(model)) if runs else 0
    tokens = sum(
        total(run, "tokens" if run.kind == "sft" else "generated_tokens") for run in runs if run.kind != "rlpt"
    )
    return Cost(tokens=tokens, flop=2 * weights * sum(map(passes, runs)))


def passes(run: Training) -> float:
    """Tokens forward; training on one counts as three."""
    if run.kind == "sft":
        return 3 * total(run, "tokens")
    return 3 * total(run, "trunk_tokens") + total(run, "generated_tokens")


def total(run: Training, column: str) -> float:
    """Sum of a column over all steps."""
    values = numbers(row.get(column) for row in run.rows)
    if not run.rows:
        raise Unknown(f"{run.folder}: no steps")
    if len(values) < len(run.rows):
        raise Unknown(f"{run.folder}/metrics.jsonl has steps without {column}")
    return math.fsum(values)


def num_weights(folder: Path) -> int:
    """Number of weights, from the headers of the folder's safetensors files."""
    count = 0
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="np") as file:
                count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise Unknown(f"{folder}: {error}") from None
    if not count:
        raise Unknown(f"{folder} holds no safetensors")
    return count
