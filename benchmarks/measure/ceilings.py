"""Clocks and ceilings of this machine: product, copies, memory that is gone before the first tensor."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.measure.row import Row, median_s, settle
from benchmarks.measure.sizes import Sizes


def run(sizes: Sizes, device: torch.device, folder: Path) -> Iterator[Row]:
    if device.type == "cuda":
        torch.zeros((), device=device)
        free, total = torch.cuda.mem_get_info(device)
        yield Row(what="memory taken by the context", value=total - free, unit="B")
    n = sizes.square
    # random data: products of zeros run faster than any real ones
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    yield Row(what="product bf16", value=2 * n**3 / median_s(lambda: a @ b, device, sizes.repeats), unit="FLOP/s")
    source = torch.ones(sizes.copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    copied = median_s(lambda: target.copy_(source), device, sizes.repeats)
    yield Row(what="copy", value=2 * source.nbytes / copied, unit="B/s", note="bytes read and written")
    host = torch.ones(sizes.upload_bytes // 4)
    target = target[: len(host)]
    s = median_s(lambda: target.copy_(host), device, sizes.repeats)
    yield Row(what="host to device, pageable", value=host.nbytes / s, unit="B/s")
    if device.type == "cuda":
        host = host.pin_memory()
    s = median_s(lambda: target.copy_(host, non_blocking=True), device, sizes.repeats)
    yield Row(what="host to device, pinned", value=host.nbytes / s, unit="B/s")
    if device.type == "cuda":
        yield from clocks(a, b, device)


def clocks(a: torch.Tensor, b: torch.Tensor, device: torch.device) -> Iterator[Row]:
    """Read by nvidia-smi while two seconds of products are under way."""
    for _ in range(int(2 / median_s(lambda: a @ b, device, 3))):
        a @ b
    names = {
        "clocks.sm": "SM clock under load",
        "clocks.mem": "memory clock under load",
        "power.draw": "power draw under load",
    }
    query = ["nvidia-smi", f"--query-gpu={','.join([*names, 'power.limit'])}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
        *found, limit = (number(x) for x in said.split(","))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError) as problem:
        found, limit = [None] * len(names), f"nvidia-smi: {problem}"
    settle(device)
    for what, value in zip(names.values(), found, strict=True):
        unit = "W" if "power" in what else "Hz"
        scaled = value * 1e6 if value is not None and unit == "Hz" else value
        yield Row(what=what, value=scaled, unit=unit, note=f"limit {limit}" if unit == "W" else "")


def number(text: str) -> float | None:
    """None where the driver says [N/A]."""
    return float(text) if text.strip()[:1].isdigit() else None
