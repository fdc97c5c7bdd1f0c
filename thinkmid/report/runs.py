"""Folders -> runs: which kind each is, read from the files it holds."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from thinkmid.errors import UserError
from thinkmid.eval import stats
from thinkmid.files import Row, is_number, read_json, read_rows


@dataclass(frozen=True, kw_only=True)
class Training:
    """A run with metrics.jsonl."""

    folder: Path
    kind: str  # "sft", "rlmt" or "rlpt"
    config: dict[str, Any]  # of config.toml; {} if the folder has none
    rows: list[Row]

    @property
    def start(self) -> str:
        """Hugging Face folder it began from; "" for a fresh model."""
        return str(section(self.config, "model").get("folder", ""))

    @property
    def steps(self) -> float | None:
        """The last step that was logged."""
        return number(self.rows[-1].get("step")) if self.rows else None

    def ends(self, column: str) -> tuple[float, float] | None:
        """Means of the first and of the last tenth of a column's values; None without any."""
        values = numbers(row.get(column) for row in self.rows)
        tenth = max(1, len(values) // 10)
        return (sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth) if values else None


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What results.json has of one set; None for what is not a number."""

    mean: float | None = None
    se: float | None = None
    low: float | None = None
    high: float | None = None
    num_questions: float | None = None
    num_samples: float | None = None
    unparsed: float | None = None
    truncated: float | None = None
    unclosed: float | None = None
    failed: float | None = None
    mean_think: float | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A run with results.json."""

    folder: Path
    results: dict[str, Any]
    config: dict[str, Any]

    @property
    def sets(self) -> dict[str, Scores]:
        names = [field.name for field in fields(Scores)]
        tables = {name: table for name, table in self.results["sets"].items() if isinstance(table, dict)}
        return {name: Scores(**{key: number(table.get(key)) for key in names}) for name, table in tables.items()}

    @property
    def model(self) -> str:
        return str(self.results.get("model", ""))

    @property
    def mean(self) -> stats.Estimate | None:
        return average(self.sets.values())


Run = Training | Evaluation


def average(sets: Iterable[Scores]) -> stats.Estimate | None:
    """Mean of the sets, of equal weight, with its interval; None if one of them lacks a number."""
    found = []
    for s in sets:
        if s.mean is None or s.se is None or s.low is None or s.high is None or s.num_questions is None:
            return None
        found.append(stats.Estimate(mean=s.mean, se=s.se, low=s.low, high=s.high, num_questions=int(s.num_questions)))
    return stats.average(found) if found else None


def find(folders: Sequence[str | Path]) -> tuple[list[Run], list[str]]:
    """Runs in the order given, and a line for each folder that is skipped. A folder that is no run stands for the runs
    in it, two levels deep. UserError: there is no such folder."""
    expanded = {folder: expand(Path(folder)) for folder in folders}
    none = "no run: neither metrics.jsonl nor results.json, here or in its folders"
    skipped = [f"{folder}: {none}" for folder, paths in expanded.items() if not paths]
    found = dict.fromkeys(path for paths in expanded.values() for path in paths)
    return [read(path) for path in found], skipped


def expand(folder: Path) -> list[Path]:
    if is_run(folder):
        return [folder]
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    return [path for pattern in ("*/", "*/*/") for path in sorted(folder.glob(pattern)) if is_run(path)]


def is_run(folder: Path) -> bool:
    return (folder / "metrics.jsonl").exists() or (folder / "results.json").exists()


def read(folder: Path) -> Run:
    """UserError names the file that cannot be read."""
    config = read_config(folder)
    if (folder / "results.json").exists():
        results = read_json(folder / "results.json")
        if not isinstance(results.get("sets"), dict):
            raise UserError(f"{folder}/results.json: no table 'sets'")
        return Evaluation(folder=folder, results=results, config=config)
    rows = read_rows(folder / "metrics.jsonl")
    return Training(folder=folder, kind=kind_of(config, rows), config=config, rows=rows)


def kind_of(config: dict[str, Any], rows: list[Row]) -> str:
    if "verify" in config or "task" in section(config, "data"):
        return "rlpt"
    return "rlmt" if "sampling" in config or any("reward" in row for row in rows) else "sft"


def read_config(folder: Path) -> dict[str, Any]:
    """A run's config.toml as plain tables, {} if it has none: a run of another version may hold other keys."""
    try:
        return tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder}/config.toml: cannot read it: {error}") from None


# Values of JSON and TOML files that anyone may have written.


def section(table: Any, name: str) -> dict[str, Any]:
    """A table's table, {} where there is none."""
    found = table.get(name) if isinstance(table, dict) else None
    return found if isinstance(found, dict) else {}


def items(value: Any) -> list[Any]:
    """A list's items or a table's values, [] for anything else."""
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def number(value: Any) -> float | None:
    """A finite number, None for anything else."""
    return float(value) if is_number(value) else None


def numbers(values: Iterable[Any]) -> list[float]:
    """The finite numbers among the values."""
    return [float(value) for value in values if is_number(value)]
