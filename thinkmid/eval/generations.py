"""Generations on disk: one row a sample in <set>-<rank>.jsonl, and beside them what drew them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from thinkmid import hub
from thinkmid.data.questions import Question
from thinkmid.data.wording import digest, read_shots
from thinkmid.errors import UserError
from thinkmid.eval.config import EvalConfig
from thinkmid.files import Kinds, Row, check_row, is_count, is_text, read_json, read_rows
from thinkmid.rollout.engine.protocol import Sampling

MARK = "drawn-by.json"
NEWER = {"data.system": "", "data.shots": ""}  # settings that marks of older versions lack
PATH_ALONE = "model, template, sampling and seed"
KEYS: Kinds = {"id": is_text, "sample": is_count}  # fields that identify a sample, of a row and of its prompt's meta
DRAWN: Kinds = {"text": is_text, "finish": is_text, "num_think": is_count}


def is_ids(value: Any) -> bool:
    numbers = isinstance(value, list) and {*map(type, value)} <= {int}
    return numbers and 0 <= min(value, default=0) <= max(value, default=0) < 2**31


def key(row: Row, keys: Kinds) -> tuple[Any, ...]:
    return tuple(row[name] for name in keys)


def stored(folder: Path, name: str, keys: Kinds = KEYS) -> list[Row]:
    """Rows of a set, of all ranks, in order of their keys; of duplicates the last counts.

    UserError names the row that is not as generate.draw() writes them.
    """
    # the whole name is compared: a report takes it from files that anyone may have written
    parts = [(path, path.stem.rpartition("-")) for path in sorted(folder.glob("*.jsonl"))]
    paths = [path for path, (set_name, _, rank) in parts if set_name == name and rank.isdigit()]
    rows = {}
    for path in paths:
        for number, row in enumerate(read_rows(path), start=1):
            check_row(f"{path}:{number}", row, {**keys, **DRAWN}, {"ids": is_ids, "asked": is_text})
            rows[key(row, keys)] = row
    return [rows[k] for k in sorted(rows)]


def whole(folder: Path, name: str, questions: Iterable[Question], samples: int) -> list[Row]:
    """The stored rows of these questions' first samples. UserError unless all are there."""
    ids = {q.id for q in questions}
    rows = [r for r in stored(folder, name) if r["id"] in ids and r["sample"] < samples]
    if len(rows) != (wanted := len(ids) * samples):
        raise UserError(f"{folder}: {len(rows)} of {wanted} samples of {name}; eval.run without regrade draws them")
    return rows


def settings(cfg: EvalConfig) -> dict[str, Any]:
    """The settings that decide generations, beside the model."""
    sampling = {f"sampling.{name}": value for name, value in vars(cfg.sampling).items()}
    sampling["sampling.stop"] = list(cfg.drawn.stop) or None  # None: as in the marks of versions without stop texts
    engine = {f"engine.{name}": getattr(cfg.engine, name) for name in ("kind", "dtype")}
    words = {"data.template": cfg.data.template, "data.system": cfg.data.system}
    words["data.shots"] = digest(read_shots(cfg.data))
    return {**words, **sampling, **engine, "run.seed": cfg.run.seed}


def read_mark(folder: Path) -> dict[str, Any]:
    """What drew the generations of a run: settings, "model.folder" and, by part, hashes of the "model".

    {} before any are drawn. UserError: damaged.
    """
    mark = folder / MARK
    if mark.is_file() and (older := mark.read_text("utf-8", "replace")).startswith("["):
        return {PATH_ALONE: older}
    if not mark.exists():
        return {}
    drawn_by = read_json(mark)
    if not isinstance(drawn_by.get("model"), dict):
        raise UserError(f"{mark}: 'model' is missing or not of its kind")
    return drawn_by


def check_folder(folder: Path, cfg: EvalConfig) -> None:
    """UserError if another program's run is there, or generations that other settings drew."""
    was, now = read_mark(folder), settings(cfg)
    if not was and (folder / "config.toml").exists():
        raise UserError(f"{folder}: holds the run of another program; take another folder")
    if PATH_ALONE in was:
        # the mark of versions that knew a model by its path, and gave a sample without a thought the budget of thoughts
        sampling = repr(Sampling(**vars(cfg.sampling)))
        known = [cfg.model.folder, cfg.data.template, sampling, cfg.run.seed]
        now = {PATH_ALONE: json.dumps(known, ensure_ascii=False)}
        if not cfg.run.regrade:
            raise UserError(f"{folder}: which weights drew what is there is unknown; run.regrade true grades it still")
    elif cfg.run.regrade:
        now |= {"model.folder": hub.asked(cfg.model.folder)}
        if was and not was.get("sampling.stop"):  # their texts go on; each is graded up to a stop text all the same
            del now["sampling.stop"]
    if odd := [name for name in now if was and (NEWER | was).get(name) != now[name]]:
        raise UserError(f"{folder}: drawn with {odd[0]} = {was.get(odd[0])}, now {now[odd[0]]}; take another folder")
