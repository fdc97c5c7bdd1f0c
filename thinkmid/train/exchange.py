"""What ranks tell each other in a step of RL: each sees all groups, so that all compute the same plan and metrics."""

from __future__ import annotations

import json

import numpy as np

from thinkmid.run.ranks import Ranks
from thinkmid.types import Group, Prompt, Sample, Tally

_STREAMS = (("tokens", np.int32), ("logp", np.float32), ("drawn", np.bool_))


def all_groups(groups: list[Group], indices: list[int], ranks: Ranks) -> list[Group]:
    """The groups of all ranks in the order of their indices."""
    if ranks.world == 1:
        return groups
    parts = [unpack(payload) for payload in ranks.gather_bytes(pack(groups, indices))]
    return [group for _, group in sorted((pair for part in parts for pair in part), key=lambda pair: pair[0])]


def finished(reward, step: int, ranks: Ranks, share: int) -> dict[str, float]:
    """What reward.finish() says on all ranks, as one row; `share` neighbours judge the same groups and count once.

    Names may differ between ranks. Collective; a UserError on one rank is raised on all.
    """
    mine: Tally = {}
    ranks.run_on_all(lambda: mine.update(reward.finish(step)))
    told = ranks.gather_bytes(json.dumps(mine if ranks.rank % share == 0 else {}).encode())
    return merged([json.loads(payload) for payload in told])


def merged(tallies: list[Tally]) -> dict[str, float]:
    """Numbers added up, pairs (sum, count) as means over all counts, NaN where nothing was counted."""
    row = {}
    for name in dict.fromkeys(name for tally in tallies for name in tally):
        found = np.array([tally[name] for tally in tallies if name in tally], np.float64)
        total = found.sum(axis=0).tolist()
        row[name] = total if found.ndim == 1 else total[0] / total[1] if total[1] else float("nan")
    return row


def pack(groups: list[Group], indices: list[int]) -> bytes:
    """One line of JSON, then the token streams one after the other."""
    head = [
        {
            "index": i,
            "prompt": {"id": g.prompt.id, "tokens": list(map(int, g.prompt.tokens)), "meta": g.prompt.meta},
            "rewards": [None if r != r else r for r in g.rewards],
            "whys": g.whys,
            "samples": [[len(s.tokens), s.finish, s.num_think, s.version] for s in g.samples],
        }
        for i, g in zip(indices, groups, strict=True)
    ]
    body = [
        np.concatenate([getattr(s, name) for g in groups for s in g.samples] or [[]]).astype(dtype).tobytes()
        for name, dtype in _STREAMS
    ]
    return b"".join([json.dumps(head).encode(), b"\n", *body])


def unpack(payload: bytes) -> list[tuple[int, Group]]:
    end = payload.index(b"\n")
    head = json.loads(payload[:end])
    total = sum(row[0] for g in head for row in g["samples"])
    streams, at = {}, end + 1
    for name, dtype in _STREAMS:
        streams[name] = np.frombuffer(payload, dtype, total, at)
        at += total * np.dtype(dtype).itemsize
    out, start = [], 0
    for g in head:
        samples = []
        for length, finish, num_think, version in g["samples"]:
            cut = {name: x[start : start + length] for name, x in streams.items()}
            samples.append(Sample(**cut, finish=finish, num_think=num_think, version=version))
            start += length
        rewards = [float("nan") if r is None else r for r in g["rewards"]]
        out.append((g["index"], Group(prompt=Prompt(**g["prompt"]), samples=samples, rewards=rewards, whys=g["whys"])))
    return out
