"""What every training program has: a run folder, a sharded model with its optimiser, resume, export."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor

from thinkmid import checkpoint
from thinkmid.errors import UserError
from thinkmid.log import Log
from thinkmid.model import weights
from thinkmid.model.transformer import ModelConfig, Transformer
from thinkmid.text import Text
from thinkmid.train import optim, shard
from thinkmid.train.config import ModelSection, RunConfig
from thinkmid.train.folder import begun, clear_folder, describe_run, same_data
from thinkmid.train.interrupt import Interrupt
from thinkmid.train.watch import Watch


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
    watch: Watch
    data: str  # fingerprint of what is learnt from
    saved_step: int = -1
    ema: Transformer | None = None  # moving average of the weights, in fp32
    ema_decay: float = 0.0

    @property
    def folder(self) -> Path:
        return Path(self.run.folder)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """A checkpoint of the state before `step`. A full disk costs the checkpoint, not the run."""
        if step == self.saved_step:
            return
        begin = time.perf_counter()
        try:
            tensors = _tensors(self.model, self.optimizer, self.ema)
            state = {**state, "data": self.data}
            checkpoint.save(self.folder / "checkpoints", step, tensors, state, keep=self.run.keep)
        except checkpoint.CheckpointError as error:
            self.log.event("save_failed", step=step, why=str(error))
            self.log.say(f"warning: {error}; training goes on")
        else:
            self.saved_step = step
            self.log.event("save", step=step, seconds=round(time.perf_counter() - begin, 3))

    @torch.no_grad()
    def follow(self) -> None:
        """After a step: the moving average takes its share of the weights."""
        if self.ema is None:
            return
        for model in (self.ema, self.model):
            weights.reshard(model)
        pairs = zip(self.ema.parameters(), self.model.parameters(), strict=True)
        for ours, theirs in pairs:
            _local(ours).lerp_(_local(theirs), 1 - self.ema_decay)

    def export(self) -> Path:
        """The model as an HF folder, fp32."""
        folder, named, step = self.folder / "export", weights.stream(self.model), max(0, self.saved_step)
        try:
            weights.save(folder, self.model.cfg, named, dtype=torch.float32, extra_files=self.source)
        except (OSError, SafetensorError) as error:
            again = f"the same command goes on from step {step}"
            raise UserError(f"{folder}: cannot be written ({error}); {again}") from error
        return folder


def open_job(
    cfg,
    source: Path,
    shape: ModelConfig,
    text: Text,
    *,
    data: str,
    ranks: shard.Ranks,
    interrupt: Interrupt,
    ema_decay: float = 0.0,
) -> tuple[Job, int, dict]:
    """Model, optimiser and log, resumed if there is something to resume: (job, first step, saved state or {}).

    Collective. data: fingerprint of what is learnt from. ema_decay: above 0 the job has a moving average.
    With run.fresh the folder is cleared here: of what may be wrong, config, data and the model's folder were looked at.
    """
    folder = Path(cfg.run.folder)
    clear_folder(cfg, ranks)
    found = checkpoint.latest(folder / "checkpoints", warn=lambda line: print(f"warning: {line}"))
    if not found and begun(cfg.run):
        raise UserError(f"{folder}/checkpoints: no checkpoint is whole; --run.fresh starts over")

    def make():
        # a checkpoint holds every weight
        return empty_model(shape, cfg.model, ranks) if found else sharded_model(source, shape, cfg.model, ranks)

    model = make()
    optimizer = optim.adamw(model, cfg.optim)
    ema = make() if ema_decay else None
    state = checkpoint.load(found, _tensors(model, optimizer, ema), verified=True) if found else {}
    if found:
        same_data(state["data"], data, folder)
    start = int(found.name.rpartition("-")[2]) if found else 0
    describe_run(cfg, ranks)
    options = {"num_steps": cfg.run.steps, "trackers": cfg.run.trackers, "config": dataclasses.asdict(cfg)}
    log = Log(folder, ranks.rank, start, **options)
    log.event("start", step=start, world=ranks.world)
    saved_step = start if found else -1
    watch = Watch(folder, ranks.rank, cfg.run.timeout_s)
    watch.beat("start", start)
    parts = (cfg.run, source, model, text, optimizer, ranks, interrupt, log, watch, data, saved_step, ema, ema_decay)
    return Job(*parts), start, state


def _tensors(model: Transformer, optimizer, ema: Transformer | None) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds, by name."""
    tensors = optim.state_tensors(model, optimizer)
    if ema is not None:
        weights.reshard(ema)
        tensors |= {f"ema.{name}": p.detach() for name, p in ema.named_parameters()}
    return tensors


def _local(p: torch.Tensor) -> torch.Tensor:
    return p.to_local() if isinstance(p, DTensor) else p


def sharded_model(source: Path, shape: ModelConfig, section: ModelSection, ranks: shard.Ranks) -> Transformer:
    """The model in an HF folder, of which each rank reads its own rows."""
    model = empty_model(shape, section, ranks)
    ranks.agree(lambda: weights.load_into(model, source))
    return model


def empty_model(shape: ModelConfig, section: ModelSection, ranks: shard.Ranks) -> Transformer:
    """Meta device first, sharded, then memory for each rank's rows; master weights in fp32."""
    with torch.device("meta"):
        model = Transformer(shape, checkpointing=section.checkpointing, deterministic=section.deterministic)
    shard.shard(model, ranks, compute_dtype=getattr(torch, section.dtype))
    return weights.materialise(model, ranks.device)


def check_source(source: Path, shape: ModelConfig, text: Text, run: RunConfig, ranks: shard.Ranks) -> None:
    """UserError unless what is in an HF folder fits together: before data is read, and memory taken. A run that goes on
    does not need the weights. Collective."""
    ranks.agree(lambda: _check_vocabulary(source, shape, text))
    if not ranks.any(begun(run)):
        with torch.device("meta"):
            model = Transformer(shape)
        ranks.agree(lambda: weights.matched(model, source))


def _check_vocabulary(source: Path, shape: ModelConfig, text: Text) -> None:
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
