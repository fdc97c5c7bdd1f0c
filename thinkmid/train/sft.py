"""SFT mid-training: next-token loss over whole sequences, text and thoughts alike, packed.

torchrun --nproc-per-node 2 -m thinkmid.train.sft configs/mini-sft.toml
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from thinkmid import config
from thinkmid.errors import UserError
from thinkmid.run.config import RunConfig
from thinkmid.train.config import ModelSection
from thinkmid.train.init import FreshConfig
from thinkmid.train.optim import OptimConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is learnt."""

    paths: tuple[str, ...]  # jsonl, parquet, txt files or folders; thoughts stand between <think> and </think>
    val_paths: tuple[str, ...] = ()  # held-out documents
    val_every: int = 200  # steps between validations; there is one at the end too
    probe_paths: tuple[str, ...] = ()  # documents with full thoughts: tells whether RLMT is worth starting
    batch_tokens: int = 4096  # tokens of an optimiser step, over all ranks
    pack_tokens: int = 4096  # tokens of one forward on one rank
    max_len: int = 512  # longer documents are cut into sequences of this many tokens
    # with run.steps 0, how long the run is: passes over the data, or tokens
    epochs: float = 0.0
    tokens: int = 0

    def __post_init__(self):
        if not self.paths:
            raise ValueError("paths is empty; --data.paths FILE or FOLDER")
        for name, low in (("batch_tokens", 2), ("pack_tokens", 2), ("max_len", 2), ("val_every", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if self.max_len > min(self.batch_tokens, self.pack_tokens):
            raise ValueError(
                f"max_len {self.max_len} exceeds batch_tokens {self.batch_tokens} or pack_tokens {self.pack_tokens}"
            )
        if self.epochs < 0 or self.tokens < 0:
            raise ValueError(f"epochs {self.epochs} and tokens {self.tokens} must be 0 or more")
        if self.epochs > 1e4 or self.tokens > 1e15:
            raise ValueError(f"epochs {self.epochs:g} or tokens {self.tokens:g}: more than 1e4 or 1e15 have no end")


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """SFT mid-training."""

    run: RunConfig
    model: ModelSection = field(default_factory=ModelSection)
    fresh: FreshConfig = field(default_factory=FreshConfig)
    data: DataConfig
    optim: OptimConfig

    def __post_init__(self):
        given = {"run.steps": self.run.steps, "data.epochs": self.data.epochs, "data.tokens": self.data.tokens}
        if sum(map(bool, given.values())) > 1:
            both = ", ".join(f"{name} {value}" for name, value in given.items() if value)
            raise ValueError(f"the run's length is given more than once: {both}; set all but one to 0")


def main(argv: list[str]) -> int:
    cfg, dry_run = config.load(SFTConfig, argv, prog="torchrun -m thinkmid.train.sft", description=__doc__)

    from thinkmid.data.sequences import read_sequences
    from thinkmid.model import weights
    from thinkmid.plan import memory
    from thinkmid.run.folder import claim_folder
    from thinkmid.run.interrupt import Interrupt
    from thinkmid.run.ranks import start_ranks
    from thinkmid.tokenizer import Tokenizer
    from thinkmid.train import corpus, init, job, probe

    if dry_run:
        at_least = -(-cfg.data.tokens // cfg.data.batch_tokens)  # epochs would need the data
        return memory.dry_run_sft(of_length(cfg, cfg.run.steps or at_least))
    interrupt, ranks = Interrupt(), start_ranks()
    claim_folder(cfg, ranks)
    read = [*cfg.data.paths, *cfg.data.val_paths, *cfg.data.probe_paths]
    corpus.name_left_out(read if cfg.model.folder else [*read, *cfg.fresh.tokenizer_data], ranks)
    source = Path(cfg.model.folder)
    if not cfg.model.folder:
        source = init.make(cfg.fresh, cfg.data.paths, cfg.run, ranks)
    model_cfg, tokenizer = weights.read_config(source), Tokenizer.load(source)
    if model_cfg.max_positions < cfg.data.max_len:
        raise UserError(
            f"data.max_len {cfg.data.max_len} exceeds the model's context of {model_cfg.max_positions} tokens"
        )
    job.check_source(source, model_cfg, tokenizer, cfg.run, ranks)
    held_out = read_sequences(cfg.data.val_paths, tokenizer, cfg.data.max_len) if cfg.data.val_paths else []
    probed = probe.read_thoughts(cfg.data.probe_paths, tokenizer, cfg.data.max_len) if cfg.data.probe_paths else []
    sequences, data = corpus.stored_sequences(cfg.data.paths, tokenizer, cfg.data.max_len, cfg.run, ranks, interrupt)
    steps = num_steps(cfg, sequences.lengths)
    options = {"data": data, "ranks": ranks, "interrupt": interrupt, "num_steps": steps}
    options["held_out"] = job.fingerprint(tokens.tolist() for tokens, _ in held_out)
    run, step, state = job.open_job(cfg, source, model_cfg, tokenizer, **options)
    try:
        code = learn(run, of_length(cfg, steps), sequences, held_out, probed, step, state)
    finally:
        run.watch.rest()
    if code == 0:
        job.draw_curves(run)
    run.log.close()
    return code


def learn(run, cfg: SFTConfig, sequences, held_out, probed, step: int, state: dict) -> int:
    """Steps `step` to cfg.run.steps, then the export. Returns the exit code."""
    from thinkmid.data.pack import plan
    from thinkmid.data.source import Order
    from thinkmid.plan import memory
    from thinkmid.run.interrupt import EXIT, Stopped
    from thinkmid.train import job, probe
    from thinkmid.train.loss import text_loss
    from thinkmid.train.step import train_step

    ranks, pair_cost = run.ranks, memory.pair_cost(run.model.cfg)
    order, cursor, skipped = Order(len(sequences), cfg.run.seed), state.get("cursor", 0), state.get("skipped", 0)

    def packed(units):
        return plan(units, capacity=cfg.data.pack_tokens, ranks=ranks.world, pair_cost=pair_cost)[ranks.rank]

    while step < cfg.run.steps:
        run.watch.beat("train", step)
        began = time.perf_counter()
        # what one rank alone reads wrong ends all
        batch, taken = ranks.agree(lambda: take_batch(order, cursor, sequences, cfg.data.batch_tokens))  # noqa: B023
        num_targets = sum(len(tokens) - 1 for tokens in batch)
        units = [as_unit(tokens, f"sequence {i}", 1 / num_targets) for i, tokens in enumerate(batch)]
        lr = cfg.optim.lr_at(step, cfg.run.steps)
        try:
            stats = train_step(
                run.model,
                run.optimizer,
                packed(units),
                lambda p: text_loss(run.model, p),
                ranks,
                lr=lr,
                clip=cfg.optim.clip,
                interrupt=run.interrupt,
            )
        except Stopped:
            run.save(step, {"cursor": cursor, "skipped": skipped})
            run.log.say("stopped; the same command resumes")
            return EXIT
        if stats.broken:  # the update before may be why
            run.refuse_broken(step)
        skipped = job.count_skips(run, step, stats.broken, skipped, cfg.optim.max_skipped)
        cursor, step = cursor + taken, step + 1
        step_s = time.perf_counter() - began
        row = {"loss": stats.sums["loss"], "grad_norm": stats.grad_norm, "lr": lr, "tokens": num_targets}
        row |= {"step_s": step_s, "tokens_per_s": num_targets / step_s}
        if held_out and (step % cfg.data.val_every == 0 or step == cfg.run.steps):
            row |= probe.validation_loss(run.model, held_out, packed, ranks)
        run.log.write(step, row)
        if cfg.run.save_every and step % cfg.run.save_every == 0:
            run.save(step, {"cursor": cursor, "skipped": skipped})
    run.watch.beat("export", step)
    run.save(step, {"cursor": cursor, "skipped": skipped})
    folder = run.export()
    if probed:
        found = probe.thought_accuracy(run.model, probed, packed, ranks)
        run.log.event("probe", **found)
        run.log.say(probe.advice(found))
    run.log.say(f"{folder} holds the model")
    return 0


def of_length(cfg: SFTConfig, steps: int) -> SFTConfig:
    return replace(cfg, run=replace(cfg.run, steps=steps), data=replace(cfg.data, epochs=0.0, tokens=0))


def num_steps(cfg: SFTConfig, lengths: np.ndarray) -> int:
    """Optimiser steps of the run; with data.epochs or data.tokens the first number that takes as much."""
    from thinkmid.data.source import Order

    passes, tokens = cfg.data.epochs, cfg.data.tokens
    if not passes and not tokens:
        return cfg.run.steps
    order, step, cursor, seen = Order(len(lengths), cfg.run.seed), 0, 0, 0
    while cursor < passes * len(lengths) or seen < tokens:
        size = 0
        while not size or size + lengths[order.take(cursor, 1)[0]] <= cfg.data.batch_tokens:
            size += int(lengths[order.take(cursor, 1)[0]])
            cursor += 1
        step, seen = step + 1, seen + size
    return step


def take_batch(order, cursor, sequences, batch_tokens) -> tuple[list[np.ndarray], int]:
    """The next sequences that fit into batch_tokens, and how many they are."""
    batch, size = [], 0
    while True:
        tokens = sequences[order.take(cursor + len(batch), 1)[0]]
        if batch and size + len(tokens) > batch_tokens:
            return batch, len(batch)
        batch.append(tokens)
        size += len(tokens)


def as_unit(tokens, name, weight):
    from thinkmid.data.pack import Reply, Unit

    return Unit(name=name, prefix=tokens[:1], replies=[Reply.text(tokens[1:], weight)])


if __name__ == "__main__":
    config.run(main)
