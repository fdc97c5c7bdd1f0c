"""The card of an export: which model it began with, and every stage since, with its config, data and metrics."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2

from thinkmid import __version__, hub
from thinkmid.config import to_toml
from thinkmid.errors import UserError, plain
from thinkmid.files import Row, check_row, is_count, is_number, is_text, read_json, read_rows
from thinkmid.run.config import REPOSITORY
from thinkmid.train.config import RLPTData, TrainConfig

CARD, STAGES = "README.md", "stages.json"
NOTHING: Row = {"base": "", "stages": []}
PROGRAMS = ("sft", "rlmt", "rlpt")
# columns of metrics.jsonl that describe the model at the end; a policy's loss does not
SHOWN = ("val_loss", "val_loss_text", "val_loss_thought", "reward", "val_reward", "thinking_tokens", "dead_groups")
SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/")  # in the Hub's cache
LICENCE = re.compile(r"(?m)^(license|license_name|license_link): *[\"']?([\w.+:/ -]+?)[\"']? *$", re.ASCII)
SECRET = re.compile(r"(?<=://)[^/@\s\"]*@")  # user and password of an address


def files(cfg: TrainConfig, source: Path, began: Mapping[str, Any], steps: int, dtype: str) -> dict[str, str]:
    """Text of README.md and stages.json for a run that ends. The same run gives the same bytes, wherever it lies.

    source: the folder that the run began with, whose stages and licence come first; began: what a checkpoint records
    about the run, digests among it; steps: that are done; dtype: of the weights.
    """
    name, data = hub.pinned(cfg.model.folder), vars(cfg)["data"]
    earlier = _earlier(source) if name else NOTHING
    # without what does not decide the result
    run, export = replace(cfg.run, folder="FOLDER", fresh=False), replace(cfg.export, push="", private=True)
    stage = {
        "program": type(cfg).__name__.removesuffix("Config").lower(),
        "thinkmid": __version__,
        "model": name,
        "weights": str(began["model"].get("weights") or ""),
        "data": [hub.pinned(path) for path in ([data.path] if isinstance(data, RLPTData) else data.paths)],
        "data_digest": began["data"],
        "held_out_digest": began["held_out"] if getattr(data, "val_paths", ()) else "",
        "steps": steps,
        "dtype": dtype,
        "metrics": metrics(Path(cfg.run.folder, "metrics.jsonl")),
        "config": to_toml(replace(cfg, run=run, export=export)),
    }
    chain = {"base": hub_id(name, source) or earlier["base"], "stages": [*earlier["stages"], stage]}
    text = SECRET.sub("", json.dumps(chain, indent=1) + "\n")
    return {CARD: render(json.loads(text), cfg.export.push, licence(source)), STAGES: text}


def metrics(path: Path) -> dict[str, float]:
    """Means over the last tenth of a run's rows; {} where they cannot be read: a card is not worth a run."""
    rows: list[Row] = []
    with suppress(UserError):
        rows = read_rows(path)
    is_policy = any("reward" in row for row in rows)
    found: dict[str, float] = {}
    for name in SHOWN if is_policy else ("loss", *SHOWN):
        values = [row[name] for row in rows if is_number(row.get(name))]
        tail = values[-max(1, len(values) // 10) :]
        found |= {name: round(sum(tail) / len(tail), 6)} if tail else {}
    return found


def hub_id(name: str, folder: Path) -> str:
    """ORG/NAME of a model that was named so, or whose folder lies in the Hub's cache; "" for others."""
    if cached := SNAPSHOT.search(f"{os.path.realpath(folder)}/"):
        return f"{cached[1]}/{cached[2]}"
    repository = name.removeprefix("hf://").partition("@")[0]
    return repository if REPOSITORY.fullmatch(repository) and not os.path.isdir(name) else ""


def licence(folder: Path) -> dict[str, str]:
    """The licence keys in the head of a folder's card."""
    card = folder / CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    head = text.partition("---\n")[2].partition("\n---")[0] if text.startswith("---") else ""
    return dict(LICENCE.findall(head))


def _earlier(source: Path) -> Row:
    """stages.json of the source; without stages where there is none of ours."""
    with suppress(UserError):
        chain = read_json(source / STAGES)
        check_row(str(source), chain, {"base": is_text, "stages": _are_stages})
        return chain
    return NOTHING


def _are_stages(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_stage, value))


def _is_stage(value: Any) -> bool:
    texts = ("thinkmid", "model", "weights", "data_digest", "held_out_digest", "dtype", "config")
    return (
        isinstance(value, dict)
        and value.get("program") in PROGRAMS
        and all(is_text(value.get(name)) for name in texts)
        and is_count(value.get("steps"))
        and isinstance(value.get("data"), list)
        and isinstance(value.get("metrics"), dict)
        and all(map(is_number, value["metrics"].values()))
    )


def render(chain: Row, repository: str, licence: Mapping[str, str]) -> str:
    """The card in Markdown, with its head in YAML. Values of any origin stand in code, which ends where they end."""
    place = jinja2.FileSystemLoader(Path(__file__).parent)
    templates = jinja2.Environment(loader=place, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    templates.filters |= {"code": code, "fence": fence}
    programs = list(dict.fromkeys(stage["program"] for stage in chain["stages"]))
    template, tags = templates.get_template("card.md.jinja"), ["thinkmid", *programs]
    text: str = template.render(chain, repository=repository, licence=licence, tags=tags)
    return text


def code(value: object) -> str:
    """Any value as code in a line of Markdown."""
    text = " ".join(plain(str(value)).split()) or " "
    ticks = _longer(text, "`")
    return f"{ticks} {text} {ticks}" if "`" in text else f"{ticks}{text}{ticks}"


def fence(text: str, language: str) -> str:
    """A text as a block of code in Markdown."""
    ticks = _longer(text, "``")
    return f"{ticks}`{language}\n{plain(text).rstrip()}\n{ticks}`"


def _longer(text: str, least: str) -> str:
    """Backticks, more in a row than the text has."""
    runs: list[str] = re.findall("`+", text)
    return max([least, *(f"`{run}" for run in runs)], key=len)
