"""One training step under the profiler: kernels, how long the device was busy, waits of the host, a Chrome trace."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure.row import Row, settle, wall_s
from benchmarks.measure.sizes import Sizes
from benchmarks.measure.training import Trainer, groups_of, packs_of, units_of
from thinkmid.run.ranks import start_ranks

TRACE = "trace.json.gz"


def run(sizes: Sizes, device: torch.device, folder: Path) -> Iterator[Row]:
    trainer = Trainer(sizes.small, start_ranks())
    packs = packs_of(units_of(groups_of(sizes.rl, vocab=sizes.small.vocab)), sizes.small, sizes.rl_pack_tokens)
    for _ in range(2):
        trainer.step(packs)
    yield Row(what="packs of the step", value=len(packs), unit="")
    if device.type == "cuda":
        for name, given in (("a step", packs), ("a step of one pack less", packs[1:])):
            waits = host_waits(trainer, given)
            yield Row(what=f"host waits of {name}", value=len(waits), unit="", note="; ".join(sorted(set(waits)))[:300])
    plain = wall_s(lambda: trainer.step(packs), device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as seen:
        trainer.step(packs)
        settle(device)
    seen.export_chrome_trace(str(folder / TRACE))
    yield Row(what="a step, unprofiled", value=plain, unit="s", note=f"trace in {TRACE}")
    if device.type == "cuda":
        yield from on_device(seen.events(), plain)
    else:
        yield Row(what="operations of a step", value=sum(e.count for e in seen.key_averages()), unit="")


def on_device(events, plain: float) -> Iterator[Row]:
    """Kernels and copies: how many, how long in all, the longest by name. plain: seconds of the unprofiled step."""
    # FSDP2 and the optimizer name spans of their work, which stand among the events as if they ran themselves
    ran = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
    seconds, calls = Counter[str](), Counter(e.name for e in ran)
    for e in ran:
        seconds[e.name] += e.self_device_time_total / 1e6
    busy = seconds.total()
    yield Row(what="kernels and copies of a step", value=len(ran), unit="")
    yield Row(what="device busy, share of the unprofiled step", value=busy / plain, unit="1")
    for name, s in seconds.most_common(8):
        yield Row(what=f"share of {name[:60]}", value=s / busy if busy else None, unit="1", note=f"{calls[name]} calls")


def host_waits(trainer: Trainer, packs) -> list[str]:
    """Where the host waited for the device in a step: file and line of each, as torch reports them."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            trainer.step(packs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{Path(w.filename).name}:{w.lineno}" for w in seen if "synchroniz" in str(w.message)]
