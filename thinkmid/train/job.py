"""What every training program has: a run folder, a sharded model with its optimiser, resume, export."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from thinkmid import checkpoint, config
from thinkmid.errors import UserError
from thinkmid.kernels import launch
from thinkmid.log import Log
from thinkmid.model import weights
from thinkmid.model.transformer import ModelConfig, Transformer
from thinkmid.text import Text
from thinkmid.train import optim, shard
from thinkmid.train.config import ModelSection, RunConfig
from thinkmid.train.interrupt import Interrupt

# a run may be resumed with other values of these
FREE_KEYS = ("run.steps", "run.save_every", "run.keep", "run.fresh", "run.trackers", "run.rollouts_every")


@dataclass
class Job:
    """A run in progress."""

    run: RunConfig
    source: Path  # the HF folder the run started from: tokenizer files come from here
    model: Transformer
    text: Text
    optimizer: torch.optim.Optimizer
    ranks: shard.Ranks
    interrupt: Interrupt
    log: Log
    saved_step: int = -1

    @property
    def folder(self) -> Path:
        return Path(self.run.folder)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """A checkpoint of the state before `step`. A full disk costs the checkpoint, not the run."""
        if step == self.saved_step:
            return
        begin = time.perf_counter()
        try:
            tensors = optim.state_tensors(self.model, self.optimizer)
            checkpoint.save(self.folder / "checkpoints", step, tensors, state, keep=self.run.keep)
        except checkpoint.CheckpointError as error:
            self.log.event("save_failed", step=step, why=str(error))
            self.log.say(f"warning: {error}; training goes on")
        else:
            self.saved_step = step
            self.log.event("save", step=step, seconds=round(time.perf_counter() - begin, 3))

    def export(self) -> Path:
        """The model as an HF folder, fp32."""
        folder = self.folder / "export"
        weights.save(folder, self.model.cfg, weights.stream(self.model), dtype=torch.float32, extra_files=self.source)
        return folder


def claim_folder(cfg, run: RunConfig, ranks: shard.Ranks) -> None:
    """Refuse another run's folder, clear it if asked to, write config.toml and env.json. Collective; rank 0 writes."""
    folder, fault = Path(run.folder), ""
    if ranks.rank == 0:
        try:
            if run.fresh:
                _clear(folder)
            _same_config(folder, cfg)
            folder.mkdir(parents=True, exist_ok=True)
            env = config.environment() | {"world": ranks.world, "device": str(ranks.device)}
            env["paths"] = {"attention": launch.attention_path(ranks.device)}
            config.save_run(folder, cfg, env)
        except (UserError, OSError) as error:
            fault = str(error)
    fault = ranks.gather_bytes(fault.encode())[0].decode()
    if fault:
        raise UserError(fault)


def open_job(
    cfg,
    run: RunConfig,
    section: ModelSection,
    opt: optim.OptimConfig,
    ranks: shard.Ranks,
    *,
    num_steps: int,
    interrupt: Interrupt,
    source: Path | None = None,
) -> tuple[Job, int, dict]:
    """Model, optimiser and log, resumed if there is something to resume: (job, first step, saved state or {})."""
    source = source or Path(section.folder)
    shape, text = weights.read_config(source), Text.load(source)
    check_vocabulary(source, shape, text)
    model = sharded_model(source, shape, section, ranks)
    optimizer = optim.adamw(model, opt)
    folder = Path(run.folder)
    found = checkpoint.latest(folder / "checkpoints", warn=lambda line: print(f"warning: {line}"))
    state = checkpoint.load(found, optim.state_tensors(model, optimizer)) if found else {}
    start = int(found.name.split("-")[1]) if found else 0
    log = Log(folder, ranks.rank, start, num_steps=num_steps, trackers=run.trackers, config=dataclasses.asdict(cfg))
    log.event("start", step=start, world=ranks.world)
    return Job(run, source, model, text, optimizer, ranks, interrupt, log, start if found else -1), start, state


def sharded_model(source: Path, shape: ModelConfig, section: ModelSection, ranks: shard.Ranks) -> Transformer:
    """Meta device first, sharded, then each rank reads its own rows; master weights in fp32."""
    with torch.device("meta"):
        model = Transformer(shape, checkpointing=section.checkpointing)
    shard.shard(model, ranks, compute_dtype=getattr(torch, section.dtype))
    weights.materialise(model, ranks.device)
    weights.load_into(model, source)
    return model


def check_vocabulary(source: Path, shape: ModelConfig, text: Text) -> None:
    if text.vocab_size > shape.vocab:
        raise UserError(
            f"{source}/tokenizer.json: {text.vocab_size} tokens, but config.json has vocab_size {shape.vocab}"
        )


def fingerprint(sequences) -> str:
    """Hash of token sequences: a run is resumed on the data it began with, or not at all."""
    import hashlib

    import numpy as np

    digest = hashlib.blake2b(digest_size=16)
    for tokens in sequences:
        digest.update(np.asarray(tokens, np.int32).tobytes() + b"/")
    return digest.hexdigest()


def same_data(state: dict, data: str, folder: str) -> None:
    if state and state["data"] != data:
        raise UserError(f"{folder}: the data has changed since this run began; --run.fresh starts over")


def _same_config(folder: Path, cfg) -> None:
    path = folder / "config.toml"
    if not path.exists() or not (folder / "checkpoints").exists():
        return
    import tomllib

    def flat(tree, prefix=""):
        for key, value in tree.items():
            yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]

    old = dict(flat(tomllib.loads(path.read_text())))
    new = dict(flat(tomllib.loads(config.to_toml(cfg))))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and key not in FREE_KEYS:
            was, now = (json.dumps(x.get(key)) for x in (old, new))
            raise UserError(f"{folder}: this run began with {key} = {was}, now {now}; --run.fresh starts over")


def _clear(folder: Path) -> None:
    for name in ("checkpoints", "rollouts", "export"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("metrics.jsonl", "events.jsonl", "config.toml", "env.json", "curves.png"):
        (folder / name).unlink(missing_ok=True)


def count_skips(job: Job, step: int, broken: list[str], skipped: int, limit: int) -> int:
    """Non-finite updates in a row, after this one. UserError past the limit: the run would only burn time."""
    if not broken:
        return 0
    names = ", ".join(broken[:8]) + (f" and {len(broken) - 8} more" if len(broken) > 8 else "")
    job.log.event("skipped_update", step=step, samples=broken)
    job.log.say(f"warning: step {step}: loss or gradient not finite, update skipped; in {names}")
    if skipped + 1 > limit:
        raise UserError(f"step {step}: {skipped + 1} updates in a row were not finite; the last in {names}")
    return skipped + 1


def draw_curves(job: Job) -> None:
    """curves.png in the run folder; without matplotlib a line says what is missing."""
    if job.ranks.rank == 0:
        from thinkmid.curves import draw

        try:
            draw(job.folder, job.folder / "curves.png")
        except UserError as error:
            job.log.say(f"no picture: {error}")
