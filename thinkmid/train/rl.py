"""The reinforcement loop that RLMT and RLPT share: prompts -> rollouts -> rewards -> packs -> update -> sync -> log."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

from thinkmid.data.pack import duplicated
from thinkmid.data.source import Order
from thinkmid.errors import UserError, counted
from thinkmid.files import finite
from thinkmid.model.transformer import ModelConfig
from thinkmid.rollout.engine.build import make_engine
from thinkmid.rollout.engine.protocol import check_vllm
from thinkmid.rollout.judge.ask import Policy
from thinkmid.run.folder import claim_folder
from thinkmid.run.interrupt import Interrupt, Stopped
from thinkmid.run.ranks import Ranks, start_ranks
from thinkmid.train import advantage, metrics
from thinkmid.train.config import RLConfig
from thinkmid.train.job import Job, Source, State, check_source
from thinkmid.train.loss import policy_loss
from thinkmid.train.metrics import Clock, Update
from thinkmid.train.packing import Packing
from thinkmid.train.references import next_token_units
from thinkmid.train.rollouts import finished, refuse_stale, refuse_unjudged
from thinkmid.train.sampler import Sampler, refuse_stopped
from thinkmid.train.step import train_step
from thinkmid.types import Group, Prompt

ZEROS = 20  # steps in a row without any reward, after some with, at which the policy counts as collapsed


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Held-out prompts, sampled before the first step and, above every = 0, again after so many steps and the last."""

    prompts: Sequence[Prompt]  # at least one
    every: int

    def is_due(self, step: int, num_steps: int) -> bool:
        return self.every > 0 and (step % self.every == 0 or step == num_steps)


@dataclass(kw_only=True)
class Progress:
    """Where the loop stands between two steps: what a checkpoint holds beside its tensors."""

    step: int  # steps done
    cursor: int = 0  # prompts taken from the order
    skipped: int = 0  # updates in a row that were not finite
    zeros: int = -1  # steps in a row without any reward; -1 before the first with one
    row: dict[str, float] = field(default_factory=dict)  # the last step's metrics until they are written

    def state(self) -> State:
        """A run stopped in the validation that belongs into a row resumes with that validation."""
        state: State = {"cursor": self.cursor, "skipped": self.skipped, "zeros": self.zeros}
        return state | ({"row": finite(self.row)} if self.row else {})


def start(cfg: RLConfig, source: Source) -> tuple[Ranks, Interrupt]:
    """Joins the other ranks, claims the run folder, and checks that the model's folder fits together. Collective."""
    if cfg.engine.kind == "vllm":
        check_vllm()
    interrupt, ranks = Interrupt(), start_ranks(cfg.engine.tensor_parallel)
    claim_folder(cfg, ranks)
    check_source(source, cfg.run, ranks)
    return ranks, interrupt


def longest_prompt(cfg: RLConfig, model_cfg: ModelConfig, asked: int, num_close: int) -> int:
    """Tokens a prompt may have. asked: the configured limit, 0 for none; num_close: tokens of </think>.

    UserError if the context or a pack does not hold it and the new tokens.
    """
    s, least = cfg.sampling, max(asked, 2)
    if s.force_close and s.max_think < num_close:
        raise UserError(f"sampling.force_close: max_think {s.max_think} cannot hold the {num_close} tokens of </think>")
    rooms = {f"the context of {cfg.model.folder}": model_cfg.max_positions, "batch.pack_tokens": cfg.batch.pack_tokens}
    for name, room in rooms.items():
        if least + s.max_new > room:
            raise UserError(f"a prefix of {least} tokens + {_new_tokens(cfg)} exceed {name}: {room}")
    return asked or min(rooms.values()) - s.max_new


def check_room(cfg: RLConfig, longest: int) -> None:
    """UserError if an engine of engine.max_len tokens does not hold the longest prompt and the new tokens."""
    room = cfg.engine.max_len
    if cfg.engine.kind == "vllm" and 0 < room < longest + cfg.sampling.max_new:
        needs = f"a prompt of {longest} tokens + {_new_tokens(cfg)}"
        raise UserError(f"engine.max_len {room}: {needs} exceed it; 0 makes room for all")


def _new_tokens(cfg: RLConfig) -> str:
    return f"sampling.max_think {cfg.sampling.max_think} + sampling.max_suffix {cfg.sampling.max_suffix}"


def headline(job: Job, cfg: RLConfig, stage: str, num_prompts: int, longest: int) -> None:
    """The first line of a run. longest: tokens of the longest prompt."""
    b = cfg.batch
    data = f"{counted(num_prompts, 'prompt')} of at most {longest} tokens, {b.prompts} x {b.siblings} a step"
    job.headline(stage, data, cfg.run.steps * cfg.batch.prompts / num_prompts)


def open_policy(job: Job, cfg: RLConfig, longest: int, question: int = 0) -> Policy:
    """The policy's engine, asleep. longest: tokens of the longest prompt; question: tokens of a judge's longest
    question to the same engine. Collective for vllm."""
    source, device, sampling = job.source, job.ranks.device, cfg.sampling
    max_len = min(max(longest + sampling.max_new, question), source.model_cfg.max_positions)
    shape, tokenizer, rows = source.model_cfg, source.tokenizer, sampling.max_batch
    engine = make_engine(cfg.engine, source.folder, shape, tokenizer, device=device, max_len=max_len, rows=rows)
    engine.sleep()
    room = cfg.engine.max_len or max_len
    return Policy(
        engine=engine, engine_cfg=cfg.engine, tokenizer=tokenizer, sampling=sampling, max_len=room, device=device
    )


def train(
    job: Job, cfg: RLConfig, sampler: Sampler, prompts: Sequence[Prompt], validation: Validation | None = None
) -> None:
    """Runs the steps that are left of cfg.run.steps. Stopped when that was requested and the run is saved."""
    order, at = Order(len(prompts), cfg.run.seed), Progress(step=job.saved_step, **job.saved_state)
    if validation and at.step == 0:
        preflight(job, cfg, sampler, validation, at)
    close_step(job, cfg, sampler, validation, at)  # what a stopped run left to do
    while at.step < cfg.run.steps:
        clock = Clock(job, at.step)
        with saved_where_stopped(job, at):
            refuse_stopped(job)
            with sampler.awake(at.step, clock):
                taken = order.take(at.cursor, cfg.batch.prompts)
                groups, checks = sampler.rollout(prompts, taken, at.step, clock)
                judged = finished(sampler.reward, at.step, job.ranks, cfg.engine.tensor_parallel)
                refuse_stopped(job)
            groups, terms = sampler.scored(groups)
            refuse_unjudged(groups, cfg.run.max_failed)
            refuse_stale(groups, at.step)
            clock.begin("train")
            lr, num = cfg.optim.lr_at(at.step, cfg.run.steps), cfg.batch.updates
            updates = [update(job, cfg, groups[u::num], lr, is_first=u == 0) for u in range(num)]
        at.skipped = count_skips(job, at, updates)
        job.update_average()
        at.cursor, at.step = at.cursor + cfg.batch.prompts, at.step + 1
        job.refuse_broken(at.step)
        row = {**metrics.describe(groups), **metrics.measure(updates), **checks, **judged, **terms}
        at.row = {**row, "lr": lr, "skipped": at.skipped, **clock.row(groups)}
        warn(job, cfg, at, is_preflighted=validation is not None)
        if cfg.run.rollouts_every and at.step % cfg.run.rollouts_every == 0:
            job.log.rollouts(at.step, metrics.rollout_rows(groups, job.tokenizer))
        close_step(job, cfg, sampler, validation, at)


def update(job: Job, cfg: RLConfig, groups: list[Group], lr: float, *, is_first: bool) -> Update:
    """One optimiser step on these groups: the same groups on every rank, each rank forwards its part of the plan."""
    units = advantage.units(groups, cfg.loss, cfg.batch.siblings)
    if cfg.loss.next_token:
        units = next_token_units(units, groups, job.tokenizer, cfg.sampling.max_suffix, cfg.loss.next_token)
    if not cfg.batch.share_prefix:
        units = [part for unit in units for part in duplicated(unit)]
    packs_of_ranks = Packing(cfg.batch.pack_tokens, job.model.cfg, job.ranks).of_ranks(units)
    reference, heat = job.frozen if cfg.loss.kl else None, cfg.sampling.temperature
    loss_fn = partial(
        policy_loss, job.model, cfg=cfg.loss, temperature=heat, first_update=is_first, reference=reference
    )
    mine, clip = packs_of_ranks[job.ranks.rank], cfg.optim.clip
    # once an update is applied the step runs to its end
    interrupt = job.interrupt if is_first else None
    stats = train_step(job.model, job.optimizer, mine, loss_fn, job.ranks, lr=lr, clip=clip, interrupt=interrupt)
    packs = [pack for packs in packs_of_ranks for pack in packs]
    return Update(
        stats=stats,
        num_rows=sum(unit.length for pack in packs for unit in pack),
        num_rows_unshared=sum(len(unit.prefix) + len(r.tokens) - 1 for unit in units for r in unit.replies),
        capacity=len(packs) * cfg.batch.pack_tokens,
    )


def validate(job: Job, sampler: Sampler, validation: Validation, step: int) -> dict[str, float]:
    """metrics.describe() of samples of the held-out prompts, drawn with the same seeds each time."""
    refuse_stopped(job)
    clock = Clock(job, step, of="validation")
    with sampler.awake(step, clock, check=False):
        groups, _ = sampler.rollout(validation.prompts, range(len(validation.prompts)), 0, clock)
        # no step's row holds the metrics of these verdicts; a judge that fails its examination stops the next step
        with suppress(UserError):
            sampler.reward.finish(step)
    groups, terms = sampler.scored(groups)
    return {**metrics.describe(groups), **terms}


def preflight(job: Job, cfg: RLConfig, sampler: Sampler, validation: Validation, at: Progress) -> None:
    """Validates the start, and warns where nothing can be learnt from it."""
    try:
        row = validate(job, sampler, validation, at.step)
    except Stopped:  # a mistake saves nothing: another configuration may be what corrects it
        job.save(at.step, at.state())
        raise
    job.log.event("gate", **row)
    job.log.say(metrics.preflight_line(row))
    for line in metrics.advice(row, cfg):
        job.log.say(f"warning: {line}")


def close_step(job: Job, cfg: RLConfig, sampler: Sampler, validation: Validation | None, at: Progress) -> None:
    """Validates where that is due, writes the last step's row, saves where that is due or the run is done."""
    if at.row:
        if validation and validation.is_due(at.step, cfg.run.steps):
            with saved_where_stopped(job, at):
                row = validate(job, sampler, validation, at.step)
            at.row = at.row | {f"val_{name}": value for name, value in row.items()}
        job.log.write(at.step, at.row)
        at.row = {}
    if job.is_save_due(at.step) or at.step >= cfg.run.steps:
        job.begin("save", at.step)
        job.save(at.step, at.state())


@contextmanager
def saved_where_stopped(job: Job, at: Progress) -> Iterator[None]:
    """What stops the run in mid-step, on every rank at once, costs that step alone: it is drawn again, the same, after
    a restart."""
    try:
        yield
    except (UserError, Stopped):
        job.save(at.step, at.state())
        raise


def count_skips(job: Job, at: Progress, updates: list[Update]) -> int:
    """Non-finite updates in a row, after these. UserError past optim.max_skipped."""
    skipped = at.skipped
    try:
        for u in updates:
            skipped = job.count_skips(at.step, u.stats.broken, skipped)
    except UserError:
        if all(u.stats.broken for u in updates):  # nothing of the step was applied
            job.save(at.step, at.state())
        raise
    return skipped


def warn(job: Job, cfg: RLConfig, at: Progress, *, is_preflighted: bool) -> None:
    """Warns of a reward that is gone, and after the first step of a start from which nothing can be learnt."""
    at.zeros = metrics.zeros_in_a_row(at.zeros, at.row["reward"])
    if at.zeros == ZEROS:
        job.log.event("reward_collapsed", step=at.step)
        job.log.say(f"warning: step {at.step}: every reward of the last {ZEROS} steps is 0, and earlier ones were not")
    if at.step == 1 and not is_preflighted:
        for line in metrics.advice(at.row, cfg):
            job.log.say(f"warning: {line}")


def finish(job: Job) -> int:
    """Exports the model and draws the curves; exit code 0."""
    job.begin("export", job.saved_step)
    exported = job.export()
    if job.ranks.rank == 0:
        job.log.say(metrics.summary(job.folder))
    return job.finish(exported)
