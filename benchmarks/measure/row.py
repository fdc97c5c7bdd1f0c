"""One figure of the session, and the clocks that it comes from."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Row:
    """A measurement. unit: "s", "B", "FLOP/s", "B/s", "1/s", "Hz", "W", "nats", "1": a ratio, "": a count."""

    what: str
    value: float | None  # None: it could not be measured, the note says why
    unit: str
    note: str = ""


def median_s(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of work on the device: the median of single runs after two that do not count, each by its own events."""
    for _ in range(2):
        run()
    return statistics.median(once_s(run, device) for _ in range(repeats))


def once_s(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(stop) / 1e3


def wall_s(run: Callable[[], object], device: torch.device) -> float:
    """Seconds until everything that was launched is done, the host's work included."""
    settle(device)
    began = time.perf_counter()
    run()
    settle(device)
    return time.perf_counter() - began


def walls(run: Callable[[], object], device: torch.device, repeats: int) -> tuple[float, str]:
    """Median of wall_s over so many runs, and their spread in words."""
    found = sorted(wall_s(run, device) for _ in range(repeats))
    return statistics.median(found), spread(found)


def spread(found: list[float]) -> str:
    return f"{min(found):.4f} to {max(found):.4f} s"


def free(device: torch.device) -> None:
    """After a model went: FSDP's modules hold each other, so that only the collector frees them. A backward that ran
    out of memory may have left torch in the deterministic mode that it ran in."""
    torch.set_deterministic_debug_mode("default")
    torch.utils.deterministic.fill_uninitialized_memory = True
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most that torch's allocator held for tensors while it ran; 0 on a CPU, which keeps no such count."""
    if device.type != "cuda":
        run()
        return 0
    settle(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    settle(device)
    return torch.cuda.max_memory_allocated(device)
