"""The run of SFT: sequences -> batches -> packs -> update -> validation -> log."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

import numpy as np

from thinkmid.data.chat import Chat
from thinkmid.data.conversations import Conversations
from thinkmid.data.pack import Reply, Unit
from thinkmid.data.sequences import Sequences, read_sequences, with_loss
from thinkmid.data.source import Order
from thinkmid.errors import UserError, counted, short
from thinkmid.plan import memory
from thinkmid.run.folder import claim_folder
from thinkmid.run.interrupt import Interrupt, Stopped
from thinkmid.run.ranks import start_ranks
from thinkmid.train import corpus, init, probe
from thinkmid.train.config import SFTConfig, read_parts
from thinkmid.train.job import Inputs, Job, Source, check_source, fingerprint, open_job
from thinkmid.train.loss import text_loss
from thinkmid.train.packing import Packing
from thinkmid.train.step import Stats, train_step


def plan(cfg: SFTConfig) -> int:
    """Prints the plan; exit code 0."""
    least = -(-cfg.data.tokens // cfg.data.batch_tokens)  # epochs would need the data
    return memory.dry_run_sft(of_length(cfg, cfg.run.steps or least))


def run(cfg: SFTConfig) -> int:
    """Exit code."""
    interrupt, ranks = Interrupt(), start_ranks()
    claim_folder(cfg, ranks)
    read = [*cfg.data.paths, *cfg.data.val_paths, *cfg.data.probe_paths]
    corpus.name_left_out(read if cfg.model.folder else [*read, *cfg.fresh.tokenizer_data], ranks)

    source = Source.read(cfg.model.folder or init.make(cfg.fresh, cfg.data, cfg.run, ranks))
    context = source.model_cfg.max_positions
    if context < cfg.data.max_len:
        raise UserError(f"data.max_len {cfg.data.max_len} exceeds the model's context of {context} tokens")
    check_source(source, cfg.run, ranks)

    if chats := conversations(cfg, source):
        source = replace(source, tokenizer=chats.chat.tokenizer)
    tokenizer, max_len = source.tokenizer, cfg.data.max_len
    column, held_out = cfg.data.column, []
    if cfg.data.val_paths:
        held_out = read_sequences(cfg.data.val_paths, tokenizer, max_len, chats, column)
    parts, probed = read_parts(cfg.data.probe_parts), []
    if cfg.data.probe_paths:
        probed = probe.read_thoughts(cfg.data.probe_paths, tokenizer, max_len, parts, column)
    stored = corpus.stored_documents(cfg.data, tokenizer, cfg.run, ranks, interrupt, chats)
    sequences = Sequences(stored, max_len)

    steps = num_steps(cfg, sequences.lengths)
    held_out_digest = fingerprint(tokens.tolist() for tokens, _ in held_out)
    inputs = Inputs(data=stored.digest, held_out=held_out_digest, num_steps=steps)
    job = open_job(cfg, source, inputs, ranks, interrupt)
    total, documents = int(sequences.lengths.sum()), counted(sequences.num_documents, "document")
    data = f"{documents}, {short(total)} tokens, at most {cfg.data.batch_tokens:,} a step"
    job.headline("SFT", data, steps * cfg.data.batch_tokens / total)
    packing = Packing(cfg.data.pack_tokens, job.model.cfg, ranks)
    try:
        learn(job, of_length(cfg, steps), packing, sequences, held_out)
        exported = job.export()
        if probed:
            job.begin("probe", job.saved_step)
            accuracy = probe.thought_accuracy(job.model, probed, packing, parts)
            job.log.event("probe", **{name.removesuffix("?"): share for name, share in accuracy.items()})
            job.log.say(probe.advice(accuracy))
    except Stopped:
        return job.stop()
    finally:
        job.watch.rest()
    return job.finish(exported)


def conversations(cfg: SFTConfig, source: Source) -> Conversations | None:
    """How the rows of messages are read; None where documents are texts. UserError: no chat template, a broken one."""
    if cfg.data.template != "chat":
        return None
    chat = Chat(source.folder, source.tokenizer)
    return Conversations(chat=chat, system=cfg.data.system, loss=cfg.data.loss)


def learn(
    job: Job, cfg: SFTConfig, packing: Packing, sequences: Sequences, held_out: list[tuple[np.ndarray, np.ndarray]]
) -> None:
    """Runs the steps that are left of cfg.run.steps. Stopped when that was requested and the run is saved."""
    order, step = Order(len(sequences), cfg.run.seed), job.saved_step
    state = {"cursor": 0, "skipped": 0} | job.saved_state
    while step < cfg.run.steps:
        job.begin("train", step)
        began = time.perf_counter()
        num, _ = batch_size(order, state["cursor"], sequences.lengths, cfg.data.batch_tokens)
        # what one rank alone reads wrong ends all
        batch = job.ranks.run_on_all(read_batch, sequences, order.take(state["cursor"], num))
        num_targets = sum(int(np.count_nonzero(tokens[1:] >= 0)) for tokens in batch)
        lr = cfg.optim.lr_at(step, cfg.run.steps)
        try:
            stats = update(job, packing, batch, 1 / max(1, num_targets), lr)
        except Stopped:
            job.save(step, state)
            raise
        if stats.broken:  # the update before may be why
            job.refuse_broken(step)
        skipped = job.count_skips(step, stats.broken, state["skipped"])
        step, state = step + 1, {"cursor": state["cursor"] + num, "skipped": skipped}
        step_s = time.perf_counter() - began
        row = {"loss": stats.sums["loss"], "grad_norm": stats.grad_norm, "lr": lr, "tokens": num_targets}
        row |= {"step_s": step_s, "tokens_per_s": num_targets / step_s}
        if held_out and (step % cfg.data.val_every == 0 or step == cfg.run.steps):
            job.begin("validation", step)
            row |= probe.validation_loss(job.model, held_out, packing)
        job.log.write(step, row)
        if job.is_save_due(step):
            job.begin("save", step)
            job.save(step, state)
    job.begin("export", step)
    job.save(step, state)


def update(job: Job, packing: Packing, batch: list[np.ndarray], weight: float, lr: float) -> Stats:
    """One optimiser step on the targets of these sequences, which every rank brings; weight: of each target's loss."""
    pairs = [with_loss(tokens) for tokens in batch]
    texts = [Reply.text(ids[1:], weight * has_loss[1:]) for ids, has_loss in pairs]
    both = enumerate(zip(pairs, texts, strict=True))
    units = [Unit(name=f"sequence {i}", prefix=ids[:1], replies=[text]) for i, ((ids, _), text) in both]
    packs, loss_fn = packing.mine(units), partial(text_loss, job.model)
    clip, interrupt = job.cfg.optim.clip, job.interrupt
    return train_step(job.model, job.optimizer, packs, loss_fn, job.ranks, lr=lr, clip=clip, interrupt=interrupt)


def of_length(cfg: SFTConfig, steps: int) -> SFTConfig:
    """The config with the number of steps that its epochs or tokens come to."""
    return replace(cfg, run=replace(cfg.run, steps=steps), data=replace(cfg.data, epochs=0.0, tokens=0))


def num_steps(cfg: SFTConfig, lengths: np.ndarray) -> int:
    """Optimiser steps of the run; with data.epochs or data.tokens the first number that takes as much."""
    passes, tokens = cfg.data.epochs, cfg.data.tokens
    if not passes and not tokens:
        return cfg.run.steps
    order, steps, cursor, seen = Order(len(lengths), cfg.run.seed), 0, 0, 0
    while cursor < passes * len(lengths) or seen < tokens:
        num, size = batch_size(order, cursor, lengths, cfg.data.batch_tokens)
        steps, cursor, seen = steps + 1, cursor + num, seen + size
    return steps


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
