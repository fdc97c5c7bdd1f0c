"""What every training program has: a run folder, a sharded model with its optimiser, checkpoints, resume, export."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor

from thinkmid import hub
from thinkmid.errors import UserError, counted, short
from thinkmid.files import read_json
from thinkmid.kernels import launch
from thinkmid.model import adapters, lora, weight_files, weights
from thinkmid.model.hf_config import read_config
from thinkmid.model.init import ModelSection
from thinkmid.model.transformer import ModelConfig, Transformer
from thinkmid.run import checkpoint, curves, push
from thinkmid.run.config import RunConfig
from thinkmid.run.folder import begun, clear_folder, describe_run, has_moved, same_data, same_model
from thinkmid.run.interrupt import EXIT, Interrupt
from thinkmid.run.log import Log
from thinkmid.run.ranks import Ranks
from thinkmid.run.watch import Watch
from thinkmid.tokenizer import Tokenizer
from thinkmid.train import card, fsdp, optim
from thinkmid.train.config import RLConfig, TrainConfig
from thinkmid.types import Prompt

GENERATION = "generation_config.json"
State = dict[str, Any]  # what a checkpoint holds beside its tensors


@dataclass(frozen=True, kw_only=True)
class Source:
    """The Hugging Face folder that a run starts from. Its tokenizer files are copied into the export."""

    folder: Path
    model_cfg: ModelConfig
    tokenizer: Tokenizer

    @staticmethod
    def read(folder: str | Path) -> Source:
        """UserError where a file is missing or damaged. Weights are not read."""
        return Source(folder=Path(folder), model_cfg=read_config(folder), tokenizer=Tokenizer.load(folder))


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a run is made from beside configuration and model: the run that resumes it must bring the same."""

    data: str  # fingerprint of the training data
    held_out: str = ""  # fingerprint of the validation data
    num_steps: int  # length of the whole run
    frozen: Mapping[str, Path] = field(default_factory=dict)  # folders of weights that every start reads, by their part


@dataclass
class Job:
    """A run in progress."""

    cfg: TrainConfig
    source: Source
    model: Transformer
    optimizer: torch.optim.Optimizer
    ranks: Ranks
    interrupt: Interrupt
    log: Log
    watch: Watch
    same: State  # what a checkpoint records about the run, for the one that resumes it
    saved_step: int  # of the newest checkpoint, where the loop begins; 0 without one
    saved_state: State  # the loop's, in that checkpoint; {} without one
    ema: Transformer | None  # moving average of the weights, in fp32
    frozen: Transformer | lora.Base | None  # the starting weights, for a KL or as a scorer
    saved_at: float = field(default_factory=time.monotonic)  # when the newest checkpoint was written, or the run began

    @property
    def folder(self) -> Path:
        return Path(self.cfg.run.folder)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.source.tokenizer

    def headline(self, stage: str, data: str, epochs: float) -> None:
        """The first line of a run: what is trained, on what, for how long. stage: what it is called; data: in words."""
        num, steps, ranks = sum(p.numel() for p in self.model.parameters()), self.same["rate"]["steps"], self.ranks
        where = f"{self.cfg.model.dtype} on {ranks.device}, {counted(ranks.world, 'rank')}"
        model = hub.asked(self.cfg.model.folder) or self.source.folder
        self.log.say(
            f"{stage} of {model}: {short(num)} parameters, {where}; {data}; "
            f"{counted(steps, 'step')} = {epochs:.3g} epoch{'s' * (epochs != 1)}, from step {self.saved_step}"
        )

    def begin(self, phase: str, step: int) -> None:
        """Another phase of the run begins: console and watch file name it."""
        self.log.phase(phase)
        self.watch.beat(phase, step)

    def is_save_due(self, step: int) -> bool:
        """Whether a checkpoint is due after this many steps. Collective."""
        run = self.cfg.run
        if run.save_every:
            return step > 0 and step % run.save_every == 0
        late = time.monotonic() - self.saved_at > 60 * run.save_minutes
        return run.save_minutes > 0 and self.ranks.any(self.ranks.rank == 0 and late)

    def save(self, step: int, state: State) -> None:
        """A checkpoint of the state before `step`. A full disk costs the checkpoint, not the run. UserError: what would
        be saved is not finite."""
        if step == self.saved_step and state == self.saved_state:
            return
        begin = time.perf_counter()
        self.saved_at = time.monotonic()
        self.refuse_broken(step)
        # where losses are not finite any more an older checkpoint may be the last that is worth anything
        keep = sys.maxsize if state["skipped"] else self.cfg.run.keep
        try:
            tensors = _tensors(self.model, self.optimizer, self.ema)
            checkpoint.save(self.folder / "checkpoints", step, tensors, {**state, **self.same}, keep=keep)
        except checkpoint.CheckpointError as error:
            self.log.event("save_failed", step=step, why=str(error))
            self.log.say(f"warning: {error}; training continues")
        else:
            self.saved_step, self.saved_state = step, state
            self.log.event("save", step=step, seconds=round(time.perf_counter() - begin, 3))

    def refuse_broken(self, step: int) -> None:
        """UserError if weights or moments are not finite after update `step`: none of it may be saved, sampled from or
        exported. Collective; the host waits for the device once."""
        parts = [_local(x) for x in _tensors(self.model, self.optimizer, self.ema).values()]
        # one fused reduction, without temporaries: NaN and infinity win a maximum
        largest = torch.nn.utils.get_total_norm([x for x in parts if x.numel()], math.inf)
        if self.ranks.any(not math.isfinite(largest.item())):
            self.log.event("not_finite", step=step)
            rate = self.cfg.optim
            raise UserError(
                f"step {step}: weights or Adam's moments are not finite after this update (optim.lr {rate.lr:g}, "
                f"optim.weight_decay {rate.weight_decay:g}); with lower values too, the same command resumes from "
                f"step {self.saved_step}"
            )

    @torch.no_grad()
    def update_average(self) -> None:
        """After a step: the moving average takes its share of the weights."""
        if self.ema is None:
            return
        for model in (self.ema, self.model):
            weights.reshard(model)
        for ours, theirs in zip(self.ema.parameters(), self.model.parameters(), strict=True):
            _local(ours).lerp_(_local(theirs), 1 - self.cfg.ema_decay)

    def count_skips(self, step: int, broken: list[str], skipped: int) -> int:
        """Non-finite updates in a row, after this one. UserError past optim.max_skipped: more would burn time."""
        if not broken:
            return 0
        names = ", ".join(broken[:8]) + (f" and {len(broken) - 8} more" if len(broken) > 8 else "")
        self.log.event("skipped_update", step=step, samples=broken)
        self.log.say(f"warning: step {step}: loss or gradient not finite, update skipped; in {names}")
        if skipped + 1 > self.cfg.optim.max_skipped:
            raise UserError(f"step {step}: {skipped + 1} updates in a row were not finite; the last in {names}")
        return skipped + 1

    @property
    def export_dtype(self) -> str:
        """Name of the dtype that the export's weights get. A run that began when exports were fp32 ends so."""
        asked = self.cfg.export.dtype
        return str(self.same["model"].get("dtype", "float32")) if asked == "source" else asked

    def export(self) -> Path:
        """The model as an HF folder, adapters merged in; or those alone as a PEFT folder, by export.lora."""
        folder, dtype, source = self.folder / "export", self.export_dtype, self.source.folder
        self.refuse_broken(self.saved_step)
        try:
            if self.cfg.export.lora == "adapter":
                adapters.save(folder, self.model, self.cfg.model)
                return folder
            texts: dict[str, str] = {}
            if self.ranks.rank == 0:
                texts = card.files(self.cfg, source, self.same, self.saved_step, dtype) | generation_config(self.source)
            named = weights.stream(self.model, dtype)
            weights.save(folder, self.model.cfg, named, dtype=dtype, extra_files=source, texts=texts)
        except (OSError, SafetensorError) as error:
            again = f"the same command resumes from step {self.saved_step}"
            raise UserError(f"{folder}: cannot be written ({error}); {again}") from error
        return folder

    def finish(self, exported: Path) -> int:
        """Draws curves.png, pushes the export and closes the log; exit code 0. Without matplotlib, or where the push
        fails, a line reports it."""
        if self.cfg.export.lora == "adapter":
            self.log.say(f"{exported} holds the adapters, a PEFT folder (export.lora = 'adapter')")
        else:
            asked = f"export.dtype = {self.cfg.export.dtype!r}"
            self.log.say(f"{exported} holds the model in {self.export_dtype} ({asked})")
        if self.ranks.rank == 0:
            try:
                curves.draw(self.folder, self.folder / "curves.png")
            except UserError as error:
                self.log.say(f"no picture: {error}")
            if self.cfg.export.push:
                self._push(exported)
        self.log.close()
        return 0

    def _push(self, exported: Path) -> None:
        repository = self.cfg.export.push
        try:
            address = push.push(exported, repository, private=self.cfg.export.private)
        except UserError as error:
            self.log.event("push_failed", repository=repository, why=str(error))
            later = f"the same command, or hf upload {repository} {exported} ., pushes it"
            self.log.say(f"warning: {exported} is whole, but not on the Hub: {error}; {later}")
        else:
            self.log.event("push", repository=repository, address=address)
            self.log.say(f"{address} holds it too")

    def stop(self) -> int:
        """Closes the log of a run that was asked to stop, and saved; its exit code."""
        # without a state no save has succeeded
        done = f"saved step {self.saved_step}" if self.saved_state else "nothing is saved"
        self.log.say(f"stopped: {done}; the same command resumes")
        self.log.close()
        return EXIT


def open_job(cfg: TrainConfig, source: Source, inputs: Inputs, ranks: Ranks, interrupt: Interrupt) -> Job:
    """Model, optimiser and log, resumed if there is something to resume. Collective.

    Called after config, data and model folder have been validated: with run.fresh the run folder is cleared here.
    """
    folder, saved = Path(cfg.run.folder), _latest(cfg, ranks)
    moved = saved is not None and ranks.any(ranks.rank == 0 and has_moved(cfg))
    compared = dict(inputs.frozen)
    # a run that reads no weights again compares them where model.folder is another; what it began with is known for
    # nothing where an export's seal holds it
    is_read = bool(cfg.keeps_frozen or cfg.model.lora_rank)
    if is_read or moved or (not saved and ranks.run_on_all(weight_files.is_sealed, source.folder)):
        compared["weights"] = source.folder
    parts: State = {part: weights_digest(folder, ranks) for part, folder in compared.items()}
    parts["config.json"] = json.loads(json.dumps(dataclasses.asdict(source.model_cfg)))
    parts["tokenizer"] = source.tokenizer.digest
    if not saved:
        parts["dtype"] = ranks.run_on_all(weights.dtype_of, source.folder)
    # a checkpoint holds every weight that is not frozen: with one, nothing else is read from the source
    model = sharded_model(source, cfg.model, ranks, filled=not saved)
    adapters.initialise(model, cfg.run.seed)
    optimizer = optim.adamw(model, cfg.optim)
    ema = sharded_model(source, cfg.model, ranks, filled=not saved) if cfg.ema_decay else None
    state: State = {}
    if saved:
        state = checkpoint.load(saved, _tensors(model, optimizer, ema), verified=True)
        known = ({"weights": None} if moved else {}) | state.get("model", {})
        same_model(known, parts, {"config.json": source.folder, "tokenizer": source.folder, **compared})
        same_data(state["data"], inputs.data, folder)
        same_data(state.get("held_out", inputs.held_out), inputs.held_out, folder, "held-out data")
        parts = known | parts
    start = checkpoint.step(saved) if saved else 0
    rate = {"steps": inputs.num_steps, "lr": cfg.optim.lr, "weight_decay": cfg.optim.weight_decay}
    same: State = {"data": inputs.data, "held_out": inputs.held_out, "model": parts, "rate": rate}
    describe_run(cfg, ranks)
    log, watch = _open_log(cfg, rate, ranks, start, state), Watch(folder, ranks.rank, cfg.run.timeout_s)
    if cfg.model.lora_rank:
        numbers = sum(p.numel() for p in optimizer.state), source.model_cfg.num_parameters
        log.say("adapters: {:,} numbers are trained, {:,} are frozen in {}".format(*numbers, cfg.model.dtype))
    watch.beat("start", start)
    state = {key: value for key, value in state.items() if key not in same}
    frozen: Transformer | lora.Base | None = None
    if cfg.keeps_frozen:
        frozen = lora.Base(model) if cfg.model.lora_rank else sharded_model(source, cfg.model, ranks)
    return Job(cfg, source, model, optimizer, ranks, interrupt, log, watch, same, start, state, ema=ema, frozen=frozen)


def _latest(cfg: TrainConfig, ranks: Ranks) -> Path | None:
    """The checkpoint to resume from, if one is whole; run.fresh clears the folder. UserError if there are only broken
    ones. Collective."""
    checkpoints = Path(cfg.run.folder, "checkpoints")
    clear_folder(cfg, ranks)
    saved = checkpoint.latest(checkpoints)
    if not saved and begun(cfg.run):
        raise UserError(f"{checkpoints}: no checkpoint is whole; --run.fresh starts over")
    return saved


def _open_log(cfg: TrainConfig, rate: State, ranks: Ranks, start: int, state: State) -> Log:
    # a row that the state holds is written by this run
    begin, shown = start - ("row" in state), dataclasses.asdict(cfg)
    log = Log(cfg.run.folder, ranks.rank, begin, num_steps=rate["steps"], trackers=cfg.run.trackers, config=shown)
    log.event("start", step=start, world=ranks.world)
    dtypes = {"model.dtype": cfg.model.dtype}
    if isinstance(cfg, RLConfig):
        dtypes["engine.dtype"] = cfg.engine.dtype
    warnings = [*changes(state.get("rate", {}), rate, cfg.optim.schedule), *launch.slow_dtypes(ranks.device, dtypes)]
    for line in warnings:
        log.say(f"warning: {line}")
    if state and start >= rate["steps"]:
        log.say(f"nothing is left to do: {start} steps are done, the run has {rate['steps']}")
    return log


def changes(was: State, now: State, schedule: str) -> list[str]:
    """Lines about what decides the learning rate of a resumed run and is not what it began with. was: {} if unknown."""
    if not was:
        return []
    both = [(f"optim.{key}", now[key], was[key]) for key in ("lr", "weight_decay") if now[key] != was[key]]
    lines = [f"{key} is {new:g}; up to here it was {old:g}" for key, new, old in both]
    if was["steps"] != now["steps"] and schedule != "constant":
        lines.append(f"schedule {schedule!r} over {now['steps']} steps; it began over {was['steps']}")
    return lines


def _tensors(model: Transformer, optimizer: torch.optim.Optimizer, ema: Transformer | None) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds, by name."""
    tensors = optim.state_tensors(model, optimizer)
    if ema is not None:
        weights.reshard(ema)
        tensors |= {f"ema.{name}": p.detach() for name, p in ema.named_parameters()}
    return tensors


def _local(p: torch.Tensor) -> torch.Tensor:
    return p.to_local() if isinstance(p, DTensor) else p


def sharded_model(source: Source, section: ModelSection, ranks: Ranks, *, filled: bool = True) -> Transformer:
    """The source's model, master weights in fp32, of which each rank has its own rows. Collective.

    With adapters, which are not drawn yet, its weights are frozen, in section.dtype, and filled in any case.
    filled: with the weights in the folder. Meta device first, sharded, then memory for each rank's rows.
    """
    dtype: torch.dtype = getattr(torch, section.dtype)
    with torch.device("meta"):
        model = Transformer(source.model_cfg, checkpointing=section.checkpointing, deterministic=section.deterministic)
        if section.lora_rank:
            lora.attach(model.to(dtype), section)
    fsdp.shard(model, ranks, compute_dtype=dtype)
    weights.materialise(model, ranks.device)
    if filled or section.lora_rank:
        ranks.run_on_all(weights.load_into, model, source.folder)
    return model


def generation_config(source: Source) -> dict[str, str]:
    """Text of generation_config.json where the folder's does not know all ends of the run's texts, as where those of a
    chat template's turns are ends too: what reads the export would run on. Else {}."""
    ends, path = source.tokenizer.eos_ids, source.folder / GENERATION
    if ends == Tokenizer.load(source.folder).eos_ids:
        return {}
    values = read_json(path if path.is_file() else path.with_name("config.json"))
    values = {key: values.get(key) for key in values if path.is_file() or key in ("bos_token_id", "pad_token_id")}
    listed = values.get("eos_token_id", list(source.model_cfg.eos_ids))
    ids = [*(listed if isinstance(listed, list) else [listed] if listed is not None else []), *ends]
    return {GENERATION: json.dumps(values | {"eos_token_id": list(dict.fromkeys(ids))}, indent=2) + "\n"}


def check_source(source: Source, run: RunConfig, ranks: Ranks) -> None:
    """UserError unless what is in an HF folder fits together: before data is read, and memory taken. A resumed run does
    not need the weights. Collective."""
    ranks.run_on_all(_check_vocabulary, source)
    if not ranks.any(begun(run)):
        ranks.run_on_all(weights.matched, weights.build(source.model_cfg, device="meta"), source.folder)


def _check_vocabulary(source: Source) -> None:
    size, room = source.tokenizer.vocab_size, source.model_cfg.vocab
    if size > room:
        raise UserError(f"{source.folder}/tokenizer.json: {size} tokens, but config.json has vocab_size {room}")


def weights_digest(folder: Path, ranks: Ranks) -> str:
    """Digest of all weights in an HF folder, each file hashed by one rank where no seal holds its hash. Collective."""
    mine = ranks.run_on_all(weight_files.hashes, folder, ranks.rank, ranks.world)
    shares = ranks.gather_bytes(json.dumps(mine).encode())
    return fingerprint(sorted(item for share in shares for item in json.loads(share).items()))


def fingerprint(items: Iterable[Any]) -> str:
    """Hash of JSON-able items, in order: a run is resumed on the data it began with, or not at all."""
    digest = hashlib.blake2b(digest_size=16)
    for item in items:
        digest.update(json.dumps(item).encode() + b"\n")
    return digest.hexdigest()


def fingerprint_of(prompts: Iterable[Prompt]) -> str:
    """All that decides draws and rewards; not where the prompts come from."""
    return fingerprint([p.id, p.tokens, {k: v for k, v in p.meta.items() if k != "where"}] for p in prompts)
