"""The paper's tables, with our evaluations on its benchmarks beside them."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from thinkmid.eval.stats import Estimate
from thinkmid.report.chain import Unknown, chain
from thinkmid.report.runs import Evaluation, Scores, average

PAPER: dict[str, Any] = tomllib.loads((Path(__file__).parent / "paper.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True, kw_only=True)
class Ours:
    """An evaluation on some of the paper's benchmarks."""

    run: Evaluation
    stage: str  # "before" or "after" RLPT
    scores: list[Scores]  # in the order of the paper's benchmarks

    @property
    def mean(self) -> Estimate | None:
        """Mean of all five benchmarks; None if one is missing."""
        return average(self.scores)


def beside_paper(evaluations: Sequence[Evaluation]) -> list[Ours]:
    """The evaluations that have at least one set named like one of the paper's benchmarks."""
    found = []
    for run in evaluations:
        own = {plain_name(name): scores for name, scores in run.sets.items()}
        names = [plain_name(name) for name in PAPER["benchmarks"]]
        if any(name in own for name in names):
            found.append(Ours(run=run, stage=stage(run), scores=[own.get(name, Scores()) for name in names]))
    return found


def five_column_means() -> dict[str, tuple[float | None, float]]:
    """Llama-3-8B's rows: mean of the five benchmarks before RLPT, None where the paper has none, and after it."""
    before, after = ({row["name"]: fmean(row["scores"]) for row in table["rows"]} for table in PAPER["table"][:2])
    return {name: (before.get(name), after[name]) for name in after}


def plain_name(name: str) -> str:
    """Small letters and digits alone: "MATH500" and "math-500" are one."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def stage(run: Evaluation) -> str:
    """ "after" if the last run behind the model was RLPT; "before" for any other, a model of unknown past too."""
    try:
        runs = chain(run.model)
    except Unknown:
        return "before"
    return "after" if runs and runs[0].kind == "rlpt" else "before"
