"""A step's rollouts: each rank draws and judges its share, then every rank holds all groups."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

import numpy as np

from thinkmid.errors import UserError
from thinkmid.rollout.engine.protocol import Engine, Sampling, requests_of, seed
from thinkmid.rollout.engine.slices import leads
from thinkmid.rollout.verdict import Pending, Reward
from thinkmid.run.ranks import Ranks
from thinkmid.run.watch import Watch
from thinkmid.train.config import RLConfig
from thinkmid.train.job import Job
from thinkmid.types import STREAMS, Group, Prompt, Request, Sample, Tally

# engine steps between two polls of whether neighbours that share an engine were asked to stop
STEPS_BETWEEN_POLLS = 16


def rollouts(
    run: Job, engine: Engine, prompts: Sequence[Prompt], cfg: RLConfig, step: int, reward: Reward | None = None
) -> tuple[list[Group] | None, list[list[Pending]]]:
    """This rank's groups, or None when stopped, and their verdicts to come: judged while others are still being drawn.

    Draws depend on (run seed, step, prompt, sibling) alone. Collective: a UserError on one rank is raised on all.
    """
    siblings = range(cfg.batch.siblings)
    requests = requests_of(prompts, [[seed(cfg.run.seed, step, p.id, g) for g in siblings] for p in prompts])
    samples, pending = run.ranks.run_on_all(draw, run, engine, requests, cfg.drawn, reward)
    if len(samples) < len(requests):
        return None, []
    groups = [Group(prompt=prompt, samples=[samples[p, g] for g in siblings]) for p, prompt in enumerate(prompts)]
    return groups, [[pending[p, g] for g in siblings] for p in range(len(prompts))] if reward else []


def draw(
    run: Job, engine: Engine, requests: list[Request], sampling: Sampling, reward: Reward | None
) -> tuple[dict[tuple[int, ...], Sample], dict[tuple[int, ...], Pending]]:
    """Samples, and verdicts to come, by the keys of their requests; not all of them when stopped."""
    samples: dict[tuple[int, ...], Sample] = {}
    pending: dict[tuple[int, ...], Pending] = {}
    for number, finished in enumerate(engine.generate(requests, sampling), start=1):
        run.watch.beat()
        for request, sample in finished:
            samples[request.key] = sample
            if reward:
                pending[request.key] = reward(request.prompt, sample)
            run.log.progress(len(samples), len(requests))
        if stopped(run, number):
            break
    return samples, pending


def stopped(run: Job, number: int) -> bool:
    """Whether to stop after the engine's step of that number."""
    ranks, requested = run.ranks, run.interrupt.requested
    if ranks.neighbours is None:
        return requested
    # they must take the same steps, so they agree, among themselves: other engines take more steps or fewer
    return number % STEPS_BETWEEN_POLLS == 0 and ranks.any(requested, ranks.neighbours)


def judged(
    run: Job, cfg: RLConfig, groups: list[Group], pending_P_G: list[list[Pending]], mine: list[int]
) -> list[Group]:
    """The groups of all ranks with their verdicts. mine: places of this rank's groups in the step. Collective."""
    pairs = zip(groups, pending_P_G, strict=True)
    groups = run.ranks.run_on_all(lambda: [rewarded(group, pending, run.watch) for group, pending in pairs])
    is_lead = leads(run.ranks, cfg.engine.tensor_parallel)
    return all_groups(groups if is_lead else [], mine if is_lead else [], run.ranks)


def rewarded(group: Group, pending: list[Pending], watch: Watch) -> Group:
    verdicts = []
    for future in pending:
        verdicts.append(future.result())
        watch.beat()
    return replace(group, rewards=[v.reward for v in verdicts], whys=[v.why for v in verdicts])


def refuse_unjudged(groups: list[Group], limit: float) -> None:
    """UserError if more than this share of samples has no verdict."""
    whys = [why for g in groups for r, why in zip(g.rewards, g.whys, strict=True) if np.isnan(r)]
    total = sum(len(g.samples) for g in groups)
    if len(whys) > limit * total:
        [(most, _)] = Counter(whys).most_common(1)
        why = f"most of them for: {most}; the same command resumes here"
        raise UserError(f"{len(whys)} of {total} samples have no verdict, {why}")


def refuse_stale(groups: list[Group], version: int) -> None:
    """RuntimeError if a token was not drawn with the trainer's weights."""
    for group in groups:
        for sample in group.samples:
            wrong = sample.versions[sample.versions != version]
            if len(wrong):
                drawn = f"drawn with weights of version {wrong[0]}"
                raise RuntimeError(f"{group.prompt.id}: {drawn}, the trainer holds {version}")


def all_groups(groups: list[Group], indices: list[int], ranks: Ranks) -> list[Group]:
    """The groups of all ranks in the order of their indices, on every rank. Collective."""
    if ranks.world == 1:
        return groups
    pairs = [pair for payload in ranks.gather_bytes(pack(groups, indices)) for pair in unpack(payload)]
    return [group for _, group in sorted(pairs, key=itemgetter(0))]


def finished(reward: Reward, step: int, ranks: Ranks, share: int) -> dict[str, float]:
    """reward.finish() of all ranks as one row. Only the first of the `share` ranks that hold one engine contributes.

    Names may differ between ranks. Collective; a UserError on one rank is raised on all.
    """
    mine = ranks.run_on_all(reward.finish, step)
    rows = ranks.gather_bytes(json.dumps(mine if leads(ranks, share) else {}).encode())
    return merged([json.loads(payload) for payload in rows])


def merged(tallies: list[Tally]) -> dict[str, float]:
    """Numbers added up, pairs (sum, count) as means over all counts, NaN where nothing was counted."""
    row: dict[str, float] = {}
    for name in dict.fromkeys(name for tally in tallies for name in tally):
        found = np.array([tally[name] for tally in tallies if name in tally], np.float64)
        total = found.sum(axis=0).tolist()
        row[name] = total if found.ndim == 1 else total[0] / total[1] if total[1] else float("nan")
    return row


def pack(groups: list[Group], indices: list[int]) -> bytes:
    """One line of JSON, then the token streams one after the other."""
    samples = [s for g in groups for s in g.samples]
    head = [
        {
            "index": i,
            "prompt": {"id": g.prompt.id, "tokens": list(map(int, g.prompt.tokens)), "meta": g.prompt.meta},
            "rewards": g.rewards,
            "whys": g.whys,
            "samples": [[len(s.tokens), s.finish, s.num_think] for s in g.samples],
        }
        for i, g in zip(indices, groups, strict=True)
    ]
    body = [
        np.concatenate([getattr(s, name) for s in samples] or [np.zeros(0)]).astype(dtype).tobytes()
        for name, dtype in STREAMS.items()
    ]
    return b"".join([json.dumps(head).encode(), b"\n", *body])


def unpack(payload: bytes) -> list[tuple[int, Group]]:
    """(index, group) pairs of pack()."""
    line, _, body = payload.partition(b"\n")
    head = json.loads(line)
    total = sum(length for g in head for length, *_ in g["samples"])
    streams: dict[str, np.ndarray[Any, Any]] = {}
    for name, dtype in STREAMS.items():
        streams[name], body = np.frombuffer(body, dtype, total), body[total * np.dtype(dtype).itemsize :]
    out, start = [], 0
    for g in head:
        samples = []
        for length, finish, num_think in g["samples"]:
            cut = {name: x[start : start + length] for name, x in streams.items()}
            samples.append(Sample(**cut, finish=finish, num_think=num_think))
            start += length
        group = Group(prompt=Prompt(**g["prompt"]), samples=samples, rewards=g["rewards"], whys=g["whys"])
        out.append((g["index"], group))
    return out
