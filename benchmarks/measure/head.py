"""The head at the target shape: loss and both gradients, ours against Liger, naive autograd and the bare products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import gpu, rivals
from benchmarks import head as contest
from benchmarks.measure.row import Row, median_s
from benchmarks.measure.sizes import Sizes
from benchmarks.rivals import Case

FLOOR, OURS, LIVE, NAIVE = "bare products", "ours", "ours, part of the rows live", "naive autograd"
LIGER = ("Liger chunked GRPO", "Liger scaled CE, fused", "Liger scaled CE, fallback")


def run(sizes: Sizes, device: torch.device, folder: Path) -> Iterator[Row]:
    num, width, vocab = sizes.head
    case = contest.make_case(num, width, vocab, torch.bfloat16, device.type)
    yield Row(what=FLOOR, value=floor_s(case, device, sizes.repeats), unit="s", note="three, of 4096 rows at a time")
    yield from timed(OURS, contest.one_pass, case, device, sizes.repeats)
    yield from timed(LIVE, contest.one_pass, gpu.dead_rows(case, sizes.live), device, sizes.repeats)
    theirs = {name: loss for name, loss in rivals.losses(device.type).items() if name in (NAIVE, *LIGER)}
    for name, loss in theirs.items():
        yield from timed(name, loss, case, device, sizes.repeats)
    # naive autograd keeps all scores several times over: at a quarter of the rows it may fit
    part = case.rows(slice(0, num // 4)).to(torch.bfloat16)
    part = replace(part, denom=float(num // 4))
    for name, loss in ((OURS, contest.one_pass), (NAIVE, theirs[NAIVE])):
        yield from timed(f"{name}, a quarter of the rows", loss, part, device, sizes.repeats)


def floor_s(case: Case, device: torch.device, repeats: int) -> float:
    """The three bare products, scaled up from 4096 rows: all scores at once would not fit beside the inputs."""
    part = case.rows(slice(0, 4096))
    return median_s(contest.products(part, backward=True), device, repeats) * len(case.targets) / len(part.targets)


def timed(name: str, loss, case: Case, device: torch.device, repeats: int) -> Iterator[Row]:
    """A rival that cannot run is a finding, not the end of the section; our own failure is."""
    try:
        both = contest.with_gradients(loss, case)
        _, peak = contest.with_peak(both, device)
        s = median_s(both, device, repeats)
    except Exception as problem:
        if name.startswith(OURS):
            raise
        yield Row(what=f"{name}: loss and gradients", value=None, unit="s", note=gpu._line(problem))
        return
    yield Row(what=f"{name}: loss and gradients", value=s, unit="s")
    extra = peak - case.hidden.nbytes - case.weight.nbytes
    if device.type == "cuda":
        yield Row(what=f"{name}: memory beyond inputs and gradients", value=extra, unit="B")
