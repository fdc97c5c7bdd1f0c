"""The folder of a training run: whose it is, whether this configuration may resume there, what it holds."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tomllib
from pathlib import Path
from typing import Any

from thinkmid import config, hub
from thinkmid.errors import UserError
from thinkmid.kernels import launch
from thinkmid.model import weights
from thinkmid.run.config import ProgramConfig, RunConfig
from thinkmid.run.push import check_push
from thinkmid.run.ranks import ALLOCATOR_VARIABLES, Ranks

# a run may be resumed with other values of these; changes of its learning rate and length are reported, and what paths
# lead to is compared by content
FREE_KEYS = (
    *("run.folder", "run.steps", "run.save_every", "run.save_minutes", "run.keep", "run.fresh", "run.trackers"),
    *("run.rollouts_every", "run.max_failed", "run.timeout_s", "optim.offload", "optim.lr", "optim.weight_decay"),
    *("data.epochs", "data.tokens", "data.paths", "data.path", "data.val_paths", "data.probe_paths"),
    *("data.probe_parts", "data.shots", "model.folder", "judge.folder"),
    *("engine.kv_gb", "engine.sleep", "engine.check_every", "engine.check_samples", "engine.max_gap"),
    *("export.dtype", "export.lora", "export.push", "export.private"),
    *("judge.kv_gb", "judge.url", "judge.workers", "judge.timeout_s", "judge.retries", "judge.canary_every"),
)
# what a run writes into its folder, and what --run.fresh forgets; a start from nothing writes MADE anew
FOLDERS = ("checkpoints", "rollouts", "export", "watch")
FILES = ("metrics.jsonl", "events.jsonl", "config.toml", "env.json", "curves.png", hub.RECORD)
MADE = ("init", "tokenizer")
STORE = "store"  # --run.fresh leaves it, for the next run may learn from the same
LOCK = ".train.lock"  # held by the one process that trains here


def claim_folder(cfg: ProgramConfig, ranks: Ranks) -> None:
    """Refuse a folder that another run began. Nothing in it changes. Collective."""
    check_commits(cfg, ranks)
    ranks.run_on_first(_claim, Path(cfg.run.folder), cfg)


def check_commits(cfg: Any, ranks: Ranks) -> None:
    """UserError where a name of the Hub's means another commit to another rank. Collective."""
    if len(set(ranks.gather_bytes(json.dumps(hub.record(cfg)).encode()))) > 1:
        raise UserError("the Hub named other commits to other ranks: a branch moves; the same command tries again")


def clear_folder(cfg: ProgramConfig, ranks: Ranks) -> None:
    """With run.fresh: forget what the run before left, once all inputs have been validated. Collective."""
    if cfg.run.fresh:
        ranks.run_on_first(_clear, Path(cfg.run.folder), cfg)


def begun(run: RunConfig) -> bool:
    """True if there is a checkpoint to resume from. Local to this rank; shared file systems may lag."""
    return not run.fresh and any(Path(run.folder, "checkpoints").glob("step-*"))


def describe_run(cfg: ProgramConfig, ranks: Ranks) -> None:
    """Write what runs, and where, into the folder. Collective."""
    ranks.run_on_first(_describe, Path(cfg.run.folder), cfg, ranks)


def _describe(folder: Path, cfg: ProgramConfig, ranks: Ranks) -> None:
    hold(folder)
    env = config.environment() | {"world": ranks.world, "device": str(ranks.device)}
    env["allocator"] = {name: os.environ[name] for name in ALLOCATOR_VARIABLES if name in os.environ}
    config.save_run(folder, cfg, env | {"paths": launch.paths(ranks.device)})


def _claim(folder: Path, cfg: ProgramConfig) -> None:
    check_push(cfg.export.push)
    values = _flat(tomllib.loads(config.to_toml(cfg)))
    _refuse_own_files(folder, values)
    if (folder / "config.toml").exists() and not any((folder / name).exists() for name in (LOCK, "metrics.jsonl")):
        raise UserError(f"{folder}/config.toml: not of a training run (no metrics.jsonl); name another run.folder")
    if folder.exists():
        hold(folder)
    weights.replaceable(folder / "export")
    if not cfg.run.fresh and (folder / "config.toml").exists() and (folder / "checkpoints").exists():
        _same_config(folder, values)


def _refuse_own_files(folder: Path, values: dict[str, Any]) -> None:
    """No text of the config may be a path to what the run itself writes, or clears."""
    own = [Path(os.path.realpath(folder), name) for name in (*FOLDERS, *MADE, STORE, *FILES)]
    for key, value in values.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and any(Path(os.path.realpath(text)).is_relative_to(place) for place in own):
                raise UserError(f"{key} {text} lies in run.folder {folder}, which the run writes to")


def hold(folder: Path) -> None:
    """The folder is this process's until it ends. A record lock: no child inherits it, and a second call is free."""
    try:
        os.stat(folder)  # for a circular link its message is right, mkdir's is not: "exists"
    except FileNotFoundError:
        folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder}: another process trains here") from None
    except OSError:  # a file system without locks
        pass


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    parts = [_flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {prefix + k: v} for k, v in tree.items()]
    return {key: value for part in parts for key, value in part.items()}


def _same_config(folder: Path, new: dict[str, Any]) -> None:
    old = _flat(config.read_toml(folder / "config.toml"))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and key not in FREE_KEYS:
            was, now = (json.dumps(x.get(key), default=str) for x in (old, new))
            raise UserError(f"{folder}: this run began with {key} = {was}, now {now}; --run.fresh starts over")


def same_data(was: str | None, now: str, folder: Path, what: str = "data") -> None:
    """UserError where a run would resume with other data than it began with. was, now: digests."""
    if was != now:
        raise UserError(f"{folder}: the {what} has changed since this run began; --run.fresh starts over")


def same_model(was: dict[str, Any], now: dict[str, Any], folders: dict[str, Path]) -> None:
    """UserError where a run would resume with another model than it began with. folders: where each part lies. What an
    older checkpoint does not record is not compared."""
    for part, folder in folders.items():
        if part in was and was[part] != now[part]:
            raise UserError(f"{folder}: not the {part} that this run began with; --run.fresh starts over")


def has_moved(cfg: ProgramConfig) -> bool:
    """True if the run folder's config.toml names another model.folder."""
    written = Path(cfg.run.folder, "config.toml")
    was: dict[str, Any] = config.read_toml(written).get("model", {}) if written.exists() else {}
    return bool(was.get("folder", hub.pinned(cfg.model.folder)) != hub.pinned(cfg.model.folder))


def _clear(folder: Path, cfg: ProgramConfig) -> None:
    for name in FOLDERS + (MADE if cfg.model.folder else ()):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
