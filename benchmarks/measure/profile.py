"""One training step under the profiler: kernels, how long the device was busy, waits of the host, a Chrome trace."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure.row import Row, settle, wall_s
from benchmarks.measure.sizes import Sizes
from benchmarks.measure.training import Trainer, groups_of, packs_of, units_of
from thinkmid.train import shard

TRACE = "trace.json.gz"


def run(sizes: Sizes, device: torch.device, folder: Path) -> Iterator[Row]:
    trainer = Trainer(sizes.small, shard.start())
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
        kernels = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        yield Row(what="kernels of a step", value=len(kernels), unit="")
        busy = sum(e.self_device_time_total for e in kernels) / 1e6
        yield Row(what="device busy, share of the unprofiled step", value=busy / plain, unit="1")
        for event in sorted(seen.key_averages(), key=lambda e: -e.self_device_time_total)[:8]:
            share = event.self_device_time_total / 1e6 / busy
            yield Row(what=f"share of {event.key[:60]}", value=share, unit="1", note=f"{event.count} calls")
    else:
        yield Row(what="operations of a step", value=sum(e.count for e in seen.key_averages()), unit="")


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
