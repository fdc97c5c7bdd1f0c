"""The reinforcement loop that RLMT and RLPT share: prompts -> rollouts -> rewards -> packs -> update -> sync -> log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from thinkmid.data.pack import duplicated, plan
from thinkmid.data.source import Order
from thinkmid.errors import UserError
from thinkmid.plan import memory
from thinkmid.rollout.engine import weight_sync
from thinkmid.rollout.engine.build import make_engine
from thinkmid.rollout.engine.protocol import Engine, check_vllm
from thinkmid.rollout.engine.slices import places
from thinkmid.run.folder import claim_folder
from thinkmid.run.interrupt import EXIT, Interrupt, Stopped
from thinkmid.run.log import finite
from thinkmid.run.ranks import Ranks, start_ranks
from thinkmid.train import advantage, job
from thinkmid.train.agreement import Agreement
from thinkmid.train.config import RLConfig
from thinkmid.train.likelihood import Scores
from thinkmid.train.loss import policy_loss
from thinkmid.train.metrics import (
    ZEROS,
    Clock,
    Update,
    advice,
    describe,
    gate_line,
    measure,
    rollout_rows,
    summary,
    zeros_in_a_row,
)
from thinkmid.train.optim import Offload
from thinkmid.train.references import next_token_units
from thinkmid.train.rollouts import Reward, finished, judged, refuse_stale, refuse_unjudged, rollouts
from thinkmid.train.step import train_step
from thinkmid.types import Group, Prompt


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """What a run learns from."""

    prompts: Sequence[Prompt]
    longest: int  # tokens of the longest
    digest: str  # of all of them: a run goes on with the data that it began with, or not at all
    held_out: Sequence[Prompt] = ()  # to look at
    notes: Sequence[str] = ()  # for people


def run(
    cfg: RLConfig,
    source,
    model_cfg,
    tokenizer,
    read: Callable[[Ranks, Interrupt], PromptSet],
    make_reward,
    *,
    at_least: int = 0,
    make_scores=lambda run, frozen: None,
    look_every: int = 0,
    judge_folder: str = "",
) -> int:
    """A program's run, from the claim of its folder to the export. Returns the exit code.

    make_reward(prompts, engine, max_len, device, log.note) -> (Reward, what to call in the end). max_len: tokens of the
    longest sequence, or at_least where the engine is asked for other things too. make_scores(job, frozen model or None)
    -> Scores or None. look_every: steps between looks at the held-out prompts, after the one before the first step.
    judge_folder: of weights that judge, if they come from one.
    """
    if cfg.engine.kind == "vllm":
        check_vllm()
    interrupt, ranks = Interrupt(), start_ranks(cfg.engine.tensor_parallel)
    claim_folder(cfg, ranks)
    job.check_source(source, model_cfg, tokenizer, cfg.run, ranks)
    found = read(ranks, interrupt)
    prompts, held_out = found.prompts, found.held_out
    longest = max([found.longest, *(len(p.tokens) for p in held_out)])
    check_room(cfg, longest)
    max_len = min(max(longest + cfg.sampling.max_new, at_least), model_cfg.max_positions)
    options = {"data": found.digest, "ranks": ranks, "interrupt": interrupt, "ema_decay": cfg.ema_decay}
    frozen = {"weights": source} if cfg.keeps_frozen else {}
    frozen |= {"judge's weights": Path(judge_folder)} if judge_folder else {}
    options |= {"num_steps": cfg.run.steps, "held_out": job.fingerprint_of(held_out), "frozen": frozen}
    opened, step, state = job.open_job(cfg, source, model_cfg, tokenizer, **options)
    for note in found.notes:
        opened.log.say(f"note: {note}")
    opened.log.say(f"{len(prompts)} prompts, at most {found.longest} tokens; starts at step {step}")
    frozen = job.sharded_model(source, model_cfg, cfg.model, ranks) if cfg.keeps_frozen else None
    rows = cfg.sampling.max_batch
    engine = make_engine(cfg.engine, source, model_cfg, tokenizer, device=ranks.device, max_len=max_len, rows=rows)
    engine.sleep()
    reward, close = make_reward(prompts, engine, cfg.engine.max_len or max_len, ranks.device, opened.log.note)
    looks = {"held_out": held_out, "look_every": look_every}
    more = {"reference": frozen if cfg.loss.kl else None, "scores": make_scores(opened, frozen), **looks}
    try:
        train(opened, cfg, engine, prompts, reward, step=step, state=state, **more)
        code = 0
    except Stopped:
        opened.log.say("stopped; the same command resumes")
        code = EXIT
    finally:
        opened.watch.rest()
        close()
    if code == 0:
        folder = opened.export()
        if ranks.rank == 0:
            opened.log.say(summary(opened.folder))
        opened.log.say(f"{folder} holds the model")
        job.draw_curves(opened)
    opened.log.close()
    return code


def longest_prompt(cfg: RLConfig, model_cfg, asked: int, num_close: int) -> int:
    """Tokens a prompt may have; asked: what the configuration says, 0 for nothing.

    UserError if the context or a pack does not hold it and the new tokens.
    """
    s, least = cfg.sampling, max(asked, 2)
    if s.force_close and s.max_think < num_close:
        raise UserError(f"sampling.force_close: max_think {s.max_think} cannot hold the {num_close} tokens of </think>")
    rooms = {f"the context of {cfg.model.folder}": model_cfg.max_positions, "batch.pack_tokens": cfg.batch.pack_tokens}
    for name, room in rooms.items():
        if least + s.max_new > room:
            new = f"sampling.max_think {s.max_think} + sampling.max_suffix {s.max_suffix}"
            raise UserError(f"a prefix of {least} tokens + {new} exceed {name}: {room}")
    return asked or min(rooms.values()) - s.max_new


def check_room(cfg: RLConfig, longest: int) -> None:
    """UserError if an engine of engine.max_len tokens does not hold the longest prompt and the new tokens."""
    room = cfg.engine.max_len
    if cfg.engine.kind == "vllm" and 0 < room < longest + cfg.sampling.max_new:
        new = f"sampling.max_think {cfg.sampling.max_think} + sampling.max_suffix {cfg.sampling.max_suffix}"
        raise UserError(f"engine.max_len {room}: a prompt of {longest} tokens + {new} exceed it; 0 makes room for all")


def train(
    run: job.Job,
    cfg: RLConfig,
    engine: Engine,
    prompts: Sequence[Prompt],
    reward: Reward,
    *,
    step: int,
    state: dict,
    reference=None,
    scores: Scores | None = None,
    held_out: Sequence[Prompt] = (),
    look_every: int = 0,
) -> None:
    """Runs steps `step` to cfg.run.steps. Stopped when that was requested and the run is saved."""
    ranks, log, watch = run.ranks, run.log, run.watch
    order, cursor, skipped = Order(len(prompts), cfg.run.seed), state.get("cursor", 0), state.get("skipped", 0)
    agreement, moments = Agreement(run, cfg, engine, weight_sync), Offload(run.optimizer)
    # row: of the last step, until it is written; a run stopped in the look that belongs into it resumes with the look
    zeros, row = state.get("zeros", -1), state.get("row", {})
    looked = (run, cfg, engine, held_out, reward, scores)
    while True:
        now = {"cursor": cursor, "skipped": skipped, "zeros": zeros}
        if held_out and step == 0:
            try:
                gate(log, look(*looked, step, moments))
            except Stopped:  # of a mistake nothing is saved: what it takes to correct it may be another configuration
                save_in_mid_step(run, step, now, engine, moments)
                raise
        if row and held_out and look_every and (step % look_every == 0 or step == cfg.run.steps):
            with stopped_is_saved(run, step, now | {"row": finite(row)}, engine, moments):
                row |= {f"val_{name}": value for name, value in look(*looked, step, moments).items()}
        if row:
            log.write(step, row)
            run.is_stale |= bool(state.pop("row", None))  # the checkpoint of this step still holds it
        due = cfg.run.save_every and step % cfg.run.save_every == 0 and step > 0
        if due or step >= cfg.run.steps:
            watch.beat("save", step)
            run.save(step, now)
        if step >= cfg.run.steps:
            return
        with stopped_is_saved(run, step, now, engine, moments):
            refuse_stopped(run)
            clock = Clock(watch, step)
            with clock("sync"):
                if cfg.optim.offload:
                    moments.away()
                engine.wake_weights()
                agreement.push(step)
                engine.wake_cache()
            with clock("rollout"):
                taken = order.take(cursor, cfg.batch.prompts)
                mine = places(len(taken), ranks, cfg.engine.tensor_parallel)
                # read from the run's store, and found damaged, by this rank alone
                asked = ranks.agree(lambda: [prompts[taken[i]] for i in mine])  # noqa: B023
                groups, pending_P_G = rollouts(run, engine, asked, cfg, step, reward)
                refuse_stopped(run, groups is None)
                draw = lambda again: rollouts(run, engine, again, cfg, step)[0]  # noqa: B023, E731
                checked = agreement.rescore(step, groups, mine, draw)
            with clock("reward"):
                groups = judged(run, cfg, groups, pending_P_G, mine)
                checked |= finished(reward, step, ranks, cfg.engine.tensor_parallel)
                refuse_stopped(run)
                engine.sleep()
                if scores:
                    groups, means = scores(groups)
                    checked.update(means)
                refuse_unjudged(groups, cfg.run.max_failed)
            with clock("train"):
                moments.back()
                refuse_stale(groups, step)
                lr = cfg.optim.lr_at(step, cfg.run.steps)
                done = [
                    update(run, cfg, groups[u :: cfg.batch.updates], lr, u == 0, reference)
                    for u in range(cfg.batch.updates)
                ]
        try:
            for u in done:
                skipped = job.count_skips(run, step, u.stats.broken, skipped, cfg.optim.max_skipped)
        except UserError:
            if all(u.stats.broken for u in done):  # nothing of the step was applied
                save_in_mid_step(run, step, now, engine, moments)
            raise
        run.follow()
        cursor, step = cursor + cfg.batch.prompts, step + 1
        run.refuse_broken(step)
        row = {**describe(groups), **measure(done), **checked, "lr": lr, "skipped": skipped, **clock.row(groups)}
        zeros = zeros_in_a_row(zeros, row["reward"])
        if zeros == ZEROS:
            log.event("reward_collapsed", step=step)
            log.say(f"warning: step {step}: every reward of the last {ZEROS} steps is 0, and earlier ones were not")
        if step == 1 and not held_out:
            for line in advice(row):
                log.say(f"warning: {line}")
        if cfg.run.rollouts_every and step % cfg.run.rollouts_every == 0:
            log.rollouts(step, rollout_rows(groups, run.tokenizer))


def look(run, cfg: RLConfig, engine, prompts, reward, scores, step: int, moments: Offload) -> dict[str, float]:
    """What describe() says of samples of held-out prompts, drawn with the same numbers each time."""
    refuse_stopped(run)
    run.watch.beat("look", step)
    if cfg.optim.offload:
        moments.away()
    engine.wake_weights()
    weight_sync.push(run.model, engine, step, getattr(torch, cfg.engine.dtype), summed=False)
    engine.wake_cache()
    mine = places(len(prompts), run.ranks, cfg.engine.tensor_parallel)
    groups, pending_P_G = rollouts(run, engine, [prompts[i] for i in mine], cfg, 0, reward)
    refuse_stopped(run, groups is None)
    groups = judged(run, cfg, groups, pending_P_G, mine)
    # no step's row holds the metrics of these verdicts; a judge that fails its examination stops the next step
    with suppress(UserError):
        reward.finish(step)
    engine.sleep()
    groups, means = scores(groups) if scores else (groups, {})
    moments.back()
    return {**describe(groups), **means}


def gate(log, seen: dict[str, float]) -> None:
    """Says what a look before the first step saw, and warns where nothing can be learnt."""
    log.event("gate", **seen)
    log.say(gate_line(seen))
    for line in advice(seen):
        log.say(f"warning: {line}")


def refuse_stopped(run: job.Job, early: bool = False) -> None:
    """Stopped where one rank was asked to stop. early: what this rank drew ended early for it. Collective."""
    if run.ranks.any(early or run.interrupt.requested):
        raise Stopped


@contextmanager
def stopped_is_saved(run, step, now, engine, moments):
    """What stops the run in mid-step, on every rank at once, costs that step alone."""
    try:
        yield
    except (UserError, Stopped):
        save_in_mid_step(run, step, now, engine, moments)
        raise


def save_in_mid_step(run, step, now, engine, moments) -> None:
    """The half-done step is drawn again, the same, after a restart."""
    engine.sleep()  # the moments went because they do not fit beside it
    moments.back()
    run.save(step, now)


def update(run: job.Job, cfg: RLConfig, groups: list[Group], lr, first_update, reference) -> Update:
    """One optimiser step on these groups: the same groups on every rank, each rank forwards its part of the plan."""
    units = advantage.units(
        groups,
        estimator=cfg.loss.estimator,
        num_siblings=cfg.batch.siblings,
        denom=cfg.loss.denom,
        keep_dead=cfg.loss.keeps_dead,
        scope=cfg.loss.scope,
    )
    if cfg.loss.next_token:
        units = next_token_units(units, groups, run.tokenizer, cfg.sampling.max_suffix, cfg.loss.next_token)
    unshared = [part for unit in units for part in duplicated(unit)]
    packs_of_ranks = plan(
        units if cfg.batch.share_prefix else unshared,
        capacity=cfg.batch.pack_tokens,
        ranks=run.ranks.world,
        pair_cost=memory.pair_cost(run.model.cfg),
    )
    stats = train_step(
        run.model,
        run.optimizer,
        packs_of_ranks[run.ranks.rank],
        lambda pack: policy_loss(
            run.model,
            pack,
            cfg.loss,
            temperature=cfg.sampling.temperature,
            first_update=first_update,
            reference=reference,
        ),
        run.ranks,
        lr=lr,
        clip=cfg.optim.clip,
        # once an update is applied the step runs to its end
        interrupt=run.interrupt if first_update else None,
    )
    packs = [pack for packs in packs_of_ranks for pack in packs]
    return Update(
        stats,
        sum(u.length for pack in packs for u in pack),
        sum(u.length for u in unshared),
        len(packs),
        cfg.batch.pack_tokens,
    )
