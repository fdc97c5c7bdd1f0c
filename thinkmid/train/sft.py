"""SFT mid-training: next-token loss over whole sequences, text and thoughts alike, packed.

torchrun --nproc-per-node 2 -m thinkmid.train.sft configs/mini-sft.toml
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from thinkmid import config
from thinkmid.errors import UserError, at_least
from thinkmid.model.init import FreshConfig, ModelSection
from thinkmid.run.config import RunConfig
from thinkmid.train.config import OptimConfig

if TYPE_CHECKING:
    from thinkmid.data.pack import Unit
    from thinkmid.data.sequences import Sequences
    from thinkmid.data.source import Order
    from thinkmid.train.job import Job
    from thinkmid.train.packing import Packing
    from thinkmid.train.step import Stats


@dataclass(frozen=True, kw_only=True)
class SFTData:
    """What is learnt."""

    paths: tuple[str, ...]  # jsonl, parquet, txt files or folders; thoughts stand between <think> and </think>
    val_paths: tuple[str, ...] = ()  # held-out documents
    val_every: int = 200  # steps between validations; there is one at the end too
    probe_paths: tuple[str, ...] = ()  # documents with full thoughts: is RLMT worth starting?
    # what of a thought is probed: name=pattern, whose last character's token is to be predicted; a name that ends in ?
    # is measured and not required
    probe_parts: tuple[str, ...] = ("thought=(?s).",)
    batch_tokens: int = 4096  # tokens of an optimiser step, over all ranks
    pack_tokens: int = 4096  # tokens of one forward on one rank
    max_len: int = 512  # longer documents are cut into sequences of this many tokens
    # with run.steps 0, how long the run is: passes over the data, or tokens
    epochs: float = 0.0
    tokens: int = 0

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError("paths is empty; --data.paths FILE or FOLDER")
        at_least(self, batch_tokens=2, pack_tokens=2, max_len=2, val_every=1, epochs=0, tokens=0)
        if self.max_len > min(self.batch_tokens, self.pack_tokens):
            raise ValueError(
                f"max_len {self.max_len} exceeds batch_tokens {self.batch_tokens} or pack_tokens {self.pack_tokens}"
            )
        read_parts(self.probe_parts)
        if self.epochs > 1e4 or self.tokens > 1e15:
            raise ValueError(f"epochs {self.epochs:g} or tokens {self.tokens:g}: more than 1e4 or 1e15 have no end")


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """SFT mid-training."""

    run: RunConfig
    model: ModelSection = field(default_factory=ModelSection)
    fresh: FreshConfig = field(default_factory=FreshConfig)
    data: SFTData
    optim: OptimConfig

    def __post_init__(self) -> None:
        given = {"run.steps": self.run.steps, "data.epochs": self.data.epochs, "data.tokens": self.data.tokens}
        if sum(map(bool, given.values())) > 1:
            both = ", ".join(f"{name} {value}" for name, value in given.items() if value)
            raise ValueError(f"the run's length is given more than once: {both}; set all but one to 0")


def main(argv: list[str]) -> int:
    cfg, dry_run = config.load(SFTConfig, argv, prog="torchrun -m thinkmid.train.sft", description=__doc__)

    from thinkmid.data.sequences import read_sequences
    from thinkmid.plan import memory
    from thinkmid.run.folder import claim_folder
    from thinkmid.run.interrupt import Interrupt, Stopped
    from thinkmid.run.ranks import start_ranks
    from thinkmid.train import corpus, init, probe
    from thinkmid.train.job import Inputs, Source, check_source, fingerprint, open_job

    if dry_run:
        least = -(-cfg.data.tokens // cfg.data.batch_tokens)  # epochs would need the data
        return memory.dry_run_sft(of_length(cfg, cfg.run.steps or least))
    interrupt, ranks = Interrupt(), start_ranks()
    claim_folder(cfg, ranks)
    read = [*cfg.data.paths, *cfg.data.val_paths, *cfg.data.probe_paths]
    corpus.name_left_out(read if cfg.model.folder else [*read, *cfg.fresh.tokenizer_data], ranks)

    source = Source.read(cfg.model.folder or init.make(cfg.fresh, cfg.data.paths, cfg.run, ranks))
    context = source.model_cfg.max_positions
    if context < cfg.data.max_len:
        raise UserError(f"data.max_len {cfg.data.max_len} exceeds the model's context of {context} tokens")
    check_source(source, cfg.run, ranks)

    tokenizer, max_len = source.tokenizer, cfg.data.max_len
    held_out = read_sequences(cfg.data.val_paths, tokenizer, max_len) if cfg.data.val_paths else []
    parts = read_parts(cfg.data.probe_parts)
    probed = probe.read_thoughts(cfg.data.probe_paths, tokenizer, max_len, parts) if cfg.data.probe_paths else []
    sequences, data = corpus.stored_sequences(cfg.data.paths, tokenizer, max_len, cfg.run, ranks, interrupt)

    steps = num_steps(cfg, sequences.lengths)
    inputs = Inputs(data=data, held_out=fingerprint(tokens.tolist() for tokens, _ in held_out), num_steps=steps)
    job = open_job(cfg, source, inputs, ranks, interrupt)
    try:
        learn(job, of_length(cfg, steps), sequences, held_out)
        exported = job.export()
        report_thoughts(job, cfg, probed)
    except Stopped:
        return job.stop()
    finally:
        job.watch.rest()
    return job.finish(exported)


def learn(job: Job, cfg: SFTConfig, sequences: Sequences, held_out: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Runs the steps from job.start to cfg.run.steps. Stopped when that was requested and the run is saved."""
    from thinkmid.data.source import Order
    from thinkmid.run.interrupt import Stopped
    from thinkmid.train import probe
    from thinkmid.train.packing import Packing

    packing, order = Packing(cfg.data.pack_tokens, job.model.cfg, job.ranks), Order(len(sequences), cfg.run.seed)
    step, state = job.start, {"cursor": 0, "skipped": 0} | job.saved_state
    while step < cfg.run.steps:
        job.watch.beat("train", step)
        began = time.perf_counter()
        num, _ = batch_size(order, state["cursor"], sequences.lengths, cfg.data.batch_tokens)
        # what one rank alone reads wrong ends all
        batch = job.ranks.run_on_all(read_batch, sequences, order.take(state["cursor"], num))
        num_targets = sum(len(tokens) - 1 for tokens in batch)
        lr = cfg.optim.lr_at(step, cfg.run.steps)
        try:
            stats = update(job, cfg, packing, batch, lr)
        except Stopped:
            job.save(step, state)
            raise
        if stats.broken:  # the update before may be why
            job.refuse_broken(step)
        skipped = job.count_skips(step, stats.broken, state["skipped"], cfg.optim.max_skipped)
        step, state = step + 1, {"cursor": state["cursor"] + num, "skipped": skipped}
        step_s = time.perf_counter() - began
        row = {"loss": stats.sums["loss"], "grad_norm": stats.grad_norm, "lr": lr, "tokens": num_targets}
        row |= {"step_s": step_s, "tokens_per_s": num_targets / step_s}
        if held_out and (step % cfg.data.val_every == 0 or step == cfg.run.steps):
            row |= probe.validation_loss(job.model, held_out, packing)
        job.log.write(step, row)
        if cfg.run.save_every and step % cfg.run.save_every == 0:
            job.save(step, state)
    job.watch.beat("export", step)
    job.save(step, state)


def update(job: Job, cfg: SFTConfig, packing: Packing, batch: list[np.ndarray], lr: float) -> Stats:
    """One optimiser step: the mean loss of all targets of these sequences, which every rank brings."""
    from thinkmid.data.pack import Reply, Unit
    from thinkmid.train import loss, step

    weight = 1 / sum(len(tokens) - 1 for tokens in batch)
    units = [
        Unit(name=f"sequence {i}", prefix=tokens[:1], replies=[Reply.text(tokens[1:], weight)])
        for i, tokens in enumerate(batch)
    ]
    return step.train_step(
        job.model,
        job.optimizer,
        packing.mine(units),
        partial(loss.text_loss, job.model),
        job.ranks,
        lr=lr,
        clip=cfg.optim.clip,
        interrupt=job.interrupt,
    )


def read_parts(texts: tuple[str, ...]) -> dict[str, re.Pattern[str]]:
    """Patterns by name, of "name=pattern". ValueError names a text that is none."""
    parts = {}
    for text in texts:
        name, _, pattern = text.partition("=")
        if not name or not pattern:
            raise ValueError(f"probe_parts: {text!r} is not name=pattern")
        try:
            parts[name] = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"probe_parts: {text!r}: {error}") from None
    return parts


def report_thoughts(job: Job, cfg: SFTConfig, probed: list[Unit]) -> None:
    """Are thoughts predictable enough for RLMT to start? probed: of probe.read_thoughts, may be empty."""
    from thinkmid.train import probe
    from thinkmid.train.packing import Packing

    if probed:
        packing = Packing(cfg.data.pack_tokens, job.model.cfg, job.ranks)
        accuracy = probe.thought_accuracy(job.model, probed, packing, read_parts(cfg.data.probe_parts))
        job.log.event("probe", **{name.removesuffix("?"): share for name, share in accuracy.items()})
        job.log.say(probe.advice(accuracy))


def of_length(cfg: SFTConfig, steps: int) -> SFTConfig:
    """The config with the number of steps that its epochs or tokens come to."""
    return replace(cfg, run=replace(cfg.run, steps=steps), data=replace(cfg.data, epochs=0.0, tokens=0))


def num_steps(cfg: SFTConfig, lengths: np.ndarray) -> int:
    """Optimiser steps of the run; with data.epochs or data.tokens the first number that takes as much."""
    from thinkmid.data.source import Order

    passes, tokens = cfg.data.epochs, cfg.data.tokens
    if not passes and not tokens:
        return cfg.run.steps
    order, step, cursor, seen = Order(len(lengths), cfg.run.seed), 0, 0, 0
    while cursor < passes * len(lengths) or seen < tokens:
        num, size = batch_size(order, cursor, lengths, cfg.data.batch_tokens)
        step, cursor, seen = step + 1, cursor + num, seen + size
    return step


def batch_size(order: Order, cursor: int, lengths: np.ndarray, batch_tokens: int) -> tuple[int, int]:
    """How many of the next sequences fit into batch_tokens, at least one, and their tokens."""
    num = size = 0
    while True:
        length = int(lengths[order.take(cursor + num, 1)[0]])
        if num and size + length > batch_tokens:
            return num, size
        num, size = num + 1, size + length


def read_batch(sequences: Sequences, indices: list[int]) -> list[np.ndarray]:
    return [sequences[i] for i in indices]


if __name__ == "__main__":
    config.run(main)
