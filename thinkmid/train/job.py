"""What every training program has: a run folder, a sharded model with its optimiser, resume, export."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor

from thinkmid.errors import UserError
from thinkmid.model import weight_files, weights
from thinkmid.model.transformer import ModelConfig, Transformer
from thinkmid.run import checkpoint
from thinkmid.run.config import RunConfig
from thinkmid.run.folder import begun, clear_folder, describe_run, has_moved, same_data, same_model
from thinkmid.run.interrupt import Interrupt
from thinkmid.run.log import Log
from thinkmid.run.ranks import Ranks
from thinkmid.run.watch import Watch
from thinkmid.tokenizer import Tokenizer
from thinkmid.train import fsdp, optim
from thinkmid.train.config import ModelSection
from thinkmid.types import Prompt

State = dict[str, Any]  # of a checkpoint, beside its tensors


@dataclass
class Job:
    """A run in progress."""

    run: RunConfig
    source: Path  # the HF folder the run started from: tokenizer files come from here
    model: Transformer
    tokenizer: Tokenizer
    optimizer: torch.optim.Optimizer
    ranks: Ranks
    interrupt: Interrupt
    log: Log
    watch: Watch
    same: State  # what a checkpoint says of the run, for the one that resumes it
    saved_step: int = -1
    ema: Transformer | None = None  # moving average of the weights, in fp32
    ema_decay: float = 0.0
    is_stale: bool = False  # the checkpoint of saved_step says something that is no longer so

    @property
    def folder(self) -> Path:
        return Path(self.run.folder)

    def save(self, step: int, state: State) -> None:
        """A checkpoint of the state before `step`. A full disk costs the checkpoint, not the run. UserError: what would
        be saved is not finite."""
        if step == self.saved_step and not self.is_stale:
            return
        begin = time.perf_counter()
        self.refuse_broken(step)
        # where losses are not finite any more an older checkpoint may be the last that is worth anything
        keep = sys.maxsize if state["skipped"] else self.run.keep
        try:
            tensors = _tensors(self.model, self.optimizer, self.ema)
            checkpoint.save(self.folder / "checkpoints", step, tensors, {**state, **self.same}, keep=keep)
        except checkpoint.CheckpointError as error:
            self.log.event("save_failed", step=step, why=str(error))
            self.log.say(f"warning: {error}; training goes on")
        else:
            self.saved_step, self.is_stale = step, False
            self.log.event("save", step=step, seconds=round(time.perf_counter() - begin, 3))

    def refuse_broken(self, step: int) -> None:
        """UserError if weights or moments are not finite after update `step`: none of it may be saved, sampled from or
        exported. Collective; the host waits for the device once."""
        parts = [_local(x) for x in _tensors(self.model, self.optimizer, self.ema).values()]
        # one fused reduction, without temporaries: NaN and infinity win a maximum
        largest = torch.nn.utils.get_total_norm([x for x in parts if x.numel()], math.inf)
        if self.ranks.any(not math.isfinite(largest.item())):
            self.log.event("not_finite", step=step)
            cause, start = self.same["rate"], max(0, self.saved_step)
            raise UserError(
                f"step {step}: weights or Adam's moments are not finite after this update (optim.lr {cause['lr']:g}, "
                f"optim.weight_decay {cause['weight_decay']:g}); with lower values too, the same command resumes from "
                f"step {start}"
            )

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
        self.refuse_broken(step)
        try:
            weights.save(folder, self.model.cfg, named, dtype=torch.float32, extra_files=self.source)
        except (OSError, SafetensorError) as error:
            again = f"the same command goes on from step {step}"
            raise UserError(f"{folder}: cannot be written ({error}); {again}") from error
        return folder


def open_job(
    cfg,
    source: Path,
    model_cfg: ModelConfig,
    tokenizer: Tokenizer,
    *,
    data: str,
    ranks: Ranks,
    interrupt: Interrupt,
    num_steps: int,
    held_out: str = "",
    frozen: Mapping[str, Path] = MappingProxyType({}),
    ema_decay: float = 0.0,
) -> tuple[Job, int, State]:
    """Model, optimiser and log, resumed if there is something to resume: (job, first step, saved state or {}).

    Collective. data, held_out: fingerprints of what is learnt from and of what is only looked at. num_steps: of the
    whole run. frozen: folders of weights that the run reads each time it starts, by their part in it. ema_decay: above
    0 the job has a moving average.
    With run.fresh the folder is cleared here: of what may be wrong, config, data and the model's folder were looked at.
    """
    folder = Path(cfg.run.folder)
    clear_folder(cfg, ranks)
    found = checkpoint.latest(folder / "checkpoints", warn=lambda line: print(f"warning: {line}"))
    if not found and begun(cfg.run):
        raise UserError(f"{folder}/checkpoints: no checkpoint is whole; --run.fresh starts over")

    # a run that reads no weights again compares them where model.folder is another; what it began with is known for
    # nothing where an export's seal says it
    moved = ranks.any(bool(found) and ranks.rank == 0 and has_moved(cfg))
    sealed = not found and ranks.agree(lambda: weight_files.is_sealed(source))
    frozen = {**frozen, "weights": source} if moved or sealed else frozen
    parts = {part: weights_digest(place, ranks) for part, place in frozen.items()}
    parts |= {"config.json": json.loads(json.dumps(dataclasses.asdict(model_cfg))), "tokenizer": tokenizer.digest}

    def make():
        # a checkpoint holds every weight
        return empty_model(model_cfg, cfg.model, ranks) if found else sharded_model(source, model_cfg, cfg.model, ranks)

    model = make()
    optimizer = optim.adamw(model, cfg.optim)
    ema = make() if ema_decay else None
    state = checkpoint.load(found, _tensors(model, optimizer, ema), verified=True) if found else {}
    if found:
        known = ({"weights": None} if moved else {}) | state.get("model", {})
        same_model(known, parts, {"config.json": source, "tokenizer": source, **frozen})
        parts = known | parts
        same_data(state["data"], data, folder)
        same_data(state.get("held_out", held_out), held_out, folder, "held-out data")
    start = checkpoint.step(found) if found else 0
    rate = {"steps": num_steps, "lr": cfg.optim.lr, "weight_decay": cfg.optim.weight_decay}
    same = {"data": data, "held_out": held_out, "model": parts, "rate": rate}
    describe_run(cfg, ranks)
    options = {"num_steps": num_steps, "trackers": cfg.run.trackers, "config": dataclasses.asdict(cfg)}
    # a row that the state holds is written by this run
    log = Log(folder, ranks.rank, start - ("row" in state), **options)
    log.event("start", step=start, world=ranks.world)
    for line in changes(state.get("rate", {}), rate, cfg.optim.schedule):
        log.say(f"warning: {line}")
    if found and start >= num_steps:
        log.say(f"nothing is left to do: {start} steps are done, the run has {num_steps}")
    saved_step = start if found else -1
    watch = Watch(folder, ranks.rank, cfg.run.timeout_s)
    watch.beat("start", start)
    fields = (
        cfg.run,
        source,
        model,
        tokenizer,
        optimizer,
        ranks,
        interrupt,
        log,
        watch,
        same,
        saved_step,
        ema,
        ema_decay,
    )
    return Job(*fields), start, state


def changes(was: State, now: State, schedule: str) -> list[str]:
    """Lines about what decides the learning rate of a resumed run and is not what it began with. was: {} if unknown."""
    if not was:
        return []
    both = [(f"optim.{key}", now[key], was[key]) for key in ("lr", "weight_decay") if now[key] != was[key]]
    lines = [f"{key} is {new:g}; up to here it was {old:g}" for key, new, old in both]
    if was["steps"] != now["steps"] and schedule != "constant":
        lines.append(f"schedule {schedule!r} over {now['steps']} steps; it began over {was['steps']}")
    return lines


def _tensors(model: Transformer, optimizer, ema: Transformer | None) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds, by name."""
    tensors = optim.state_tensors(model, optimizer)
    if ema is not None:
        weights.reshard(ema)
        tensors |= {f"ema.{name}": p.detach() for name, p in ema.named_parameters()}
    return tensors


def _local(p: torch.Tensor) -> torch.Tensor:
    return p.to_local() if isinstance(p, DTensor) else p


def sharded_model(source: Path, model_cfg: ModelConfig, section: ModelSection, ranks: Ranks) -> Transformer:
    """The model in an HF folder, of which each rank reads its own rows."""
    model = empty_model(model_cfg, section, ranks)
    ranks.agree(lambda: weights.load_into(model, source))
    return model


def empty_model(model_cfg: ModelConfig, section: ModelSection, ranks: Ranks) -> Transformer:
    """Meta device first, sharded, then memory for each rank's rows; master weights in fp32."""
    with torch.device("meta"):
        model = Transformer(model_cfg, checkpointing=section.checkpointing, deterministic=section.deterministic)
    fsdp.shard(model, ranks, compute_dtype=getattr(torch, section.dtype))
    return weights.materialise(model, ranks.device)


def check_source(source: Path, model_cfg: ModelConfig, tokenizer: Tokenizer, run: RunConfig, ranks: Ranks) -> None:
    """UserError unless what is in an HF folder fits together: before data is read, and memory taken. A run that goes on
    does not need the weights. Collective."""
    ranks.agree(lambda: _check_vocabulary(source, model_cfg, tokenizer))
    if not ranks.any(begun(run)):
        with torch.device("meta"):
            model = Transformer(model_cfg)
        ranks.agree(lambda: weights.matched(model, source))


def _check_vocabulary(source: Path, model_cfg: ModelConfig, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > model_cfg.vocab:
        raise UserError(
            f"{source}/tokenizer.json: {tokenizer.vocab_size} tokens, but config.json has vocab_size {model_cfg.vocab}"
        )


def weights_digest(folder: Path, ranks: Ranks) -> str:
    """Of all weights in an HF folder, each file hashed by one rank where no seal does. Collective."""
    mine = ranks.agree(lambda: weight_files.hashes(folder, ranks.rank, ranks.world))
    shares = ranks.gather_bytes(json.dumps(mine).encode())
    return fingerprint(sorted(item for share in shares for item in json.loads(share).items()))


def fingerprint(items: Iterable) -> str:
    """Hash of JSON-able items, in order: a run is resumed on the data it began with, or not at all."""
    digest = hashlib.blake2b(digest_size=16)
    for item in items:
        digest.update(json.dumps(item).encode() + b"\n")
    return digest.hexdigest()


def fingerprint_of(prompts: Iterable[Prompt]) -> str:
    """All that decides draws and rewards; not where the prompts come from."""
    return fingerprint([p.id, p.tokens, {k: v for k, v in p.meta.items() if k != "where"}] for p in prompts)


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
        from thinkmid.run.curves import draw

        try:
            draw(job.folder, job.folder / "curves.png")
        except UserError as error:
            job.log.say(f"no picture: {error}")
