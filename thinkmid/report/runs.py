"""Folders -> runs: which kind each is, read from the files it holds."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinkmid.errors import UserError
from thinkmid.files import is_number, read_json, read_rows


@dataclass(frozen=True, kw_only=True)
class Training:
    """A run with metrics.jsonl."""

    folder: Path
    kind: str  # "sft", "rlmt" or "rlpt"
    config: dict[str, Any]  # of config.toml; {} if the folder has none
    rows: list[dict]

    @property
    def start(self) -> str:
        """Hugging Face folder it began from; "" for a fresh model."""
        return str(section(self.config, "model").get("folder", ""))


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A run with results.json."""

    folder: Path
    results: dict[str, Any]
    config: dict[str, Any]

    @property
    def sets(self) -> dict[str, dict[str, Any]]:
        return {name: of for name, of in self.results["sets"].items() if isinstance(of, dict)}

    @property
    def model(self) -> str:
        return str(self.results.get("model", ""))


Run = Training | Evaluation


def find(folders: Sequence[str | Path]) -> list[Run]:
    """Runs in the order given; a folder that is none stands for the runs in it, two levels deep. UserError: no run."""
    found = {path: None for folder in folders for path in expand(Path(folder))}
    return [read(path) for path in found]


def expand(folder: Path) -> list[Path]:
    if is_run(folder):
        return [folder]
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    inside = [path for pattern in ("*/", "*/*/") for path in sorted(folder.glob(pattern)) if is_run(path)]
    if not inside:
        raise UserError(f"{folder}: no run: neither metrics.jsonl nor results.json, here or in its folders")
    return inside


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


def kind_of(config: dict[str, Any], rows: list[dict]) -> str:
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


def section(table: Any, name: str) -> dict[str, Any]:
    """A table's table, {} where there is none."""
    found = table.get(name) if isinstance(table, dict) else None
    return found if isinstance(found, dict) else {}


def number(value: Any) -> float | None:
    """A finite number, None for anything else."""
    return float(value) if is_number(value) else None
