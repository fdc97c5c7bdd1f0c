"""The miniature's sweep: rows before and after RLPT, their differences, replaced thoughts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from thinkmid.errors import UserError
from thinkmid.eval import stats
from thinkmid.files import read_json
from thinkmid.report.runs import items, number, numbers, section


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A row before or after RLPT."""

    by_seed: dict[str, float]  # mean over the sets
    thinking: float | None  # tokens

    @property
    def mean(self) -> float | None:
        return fmean(self.by_seed.values()) if self.by_seed else None

    @property
    def interval(self) -> stats.Estimate | None:
        """Over seeds; None for fewer than two."""
        return stats.clustered(np.array(list(self.by_seed.values()))) if len(self.by_seed) > 1 else None


@dataclass(frozen=True, kw_only=True)
class Sweep:
    path: Path
    rows: dict[str, tuple[Cell, Cell]]  # before and after RLPT
    differences: list[dict[str, Any]]  # more, less, when, mean, low, high, each: paired by seed
    thoughts: dict[str, dict[str, float]]  # row -> what replaced its thoughts -> accuracy, mean over seeds

    @property
    def num_seeds(self) -> int:
        return max(len(cell.by_seed) for cells in self.rows.values() for cell in cells)


def read(path: Path) -> Sweep:
    """A table.json of benchmarks.mini. UserError: it has no rows."""
    table = read_json(path)
    rows = section(table, "rows")
    rows = rows or {label: cells for label, cells in table.items() if isinstance(cells, dict) and "before" in cells}
    if not rows:
        raise UserError(f"{path}: no row with 'before' and 'after'")
    thoughts = section(table, "thoughts")
    return Sweep(
        path=path,
        rows={label: (cell(section(cells, "before")), cell(section(cells, "after"))) for label, cells in rows.items()},
        differences=[difference(found) for found in items(table.get("differences")) if isinstance(found, dict)],
        thoughts={label: means(section(thoughts, label)) for label in thoughts},
    )


def cell(found: dict[str, Any]) -> Cell:
    by_seed = {seed: value for seed, mean in section(found, "mean").items() if (value := number(mean)) is not None}
    thinking = numbers(items(found.get("thinking")))
    return Cell(by_seed=by_seed, thinking=fmean(thinking) if thinking else None)


def difference(found: dict[str, Any]) -> dict[str, Any]:
    texts = {key: str(found.get(key)) for key in ("more", "less", "when")}
    values = {key: number(found.get(key)) for key in ("mean", "low", "high")}
    return texts | values | {"each": numbers(items(found.get("each")))}


def means(by_name: dict[str, Any]) -> dict[str, float]:
    found = {name: numbers(items(values)) for name, values in by_name.items()}
    return {name: fmean(values) for name, values in found.items() if values}
